"""Everything that the system refuses is one line: "cannot write PATH: REASON" or "cannot read PATH: REASON"."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from farout.cli import main
from farout.core import store
from farout.core.errors import FaroutError, ReadError, WriteError
from farout.core.file_errors import describe_system_error, read_errors
from small import pictures

resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may have more than 20 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


TENSOR = torch.zeros(100_000)
WRITERS = {
    "safetensors": lambda path: store.save_tensors(path, {"a": TENSOR}),
    "torch": lambda path: torch.save({"a": TENSOR}, path),
    "parquet": lambda path: pd.DataFrame({"a": np.random.default_rng(0).random(50_000)}).to_parquet(path),
    "csv": lambda path: pd.DataFrame({"a": np.random.default_rng(0).random(50_000)}).to_csv(path),
    "numpy": lambda path: TENSOR.numpy().tofile(path),
    "text": lambda path: path.write_text("x" * 100_000),
    "json": lambda path: store.write_json(path, {"a": "x" * 100_000}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_nothing(writer: str, small_disk: None, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with pytest.raises(WriteError) as raised, store.atomic_file(path) as temporary:
        WRITERS[writer](temporary)
    assert str(raised.value).startswith(f"cannot write {path}: ")
    assert "\n" not in str(raised.value)
    assert list(path.parent.iterdir()) == []


def test_errors_about_other_files_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.atomic_file(tmp_path / "out.json"):
        (tmp_path / "lost.txt").read_text()
    with pytest.raises(KeyError), store.atomic_file(tmp_path / "out.json"):
        raise KeyError("a bug")
    assert list(tmp_path.iterdir()) == []


def test_file_errors_are_both_errors_of_farout_and_of_the_system() -> None:
    with pytest.raises(OSError, match=r"^cannot read d: Is a directory$") as raised, read_errors("d"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "x")
    assert isinstance(raised.value, FaroutError)
    copy = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - our own
    assert (str(copy), copy.errno, type(copy)) == (str(raised.value), errno.EISDIR, ReadError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/o/x"), "cannot write /o/x: No space left on device; free"),
        (PermissionError(errno.EACCES, "Permission denied", "/o/x"), "cannot write /o/x: Permission denied"),
        (PermissionError(errno.EACCES, "Permission denied", "/i/x"), "cannot read /i/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/i/x"), "cannot write /i/x: Read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write to the output stream: No space"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "cannot read from the network"),
        (TimeoutError("timed out"), "cannot read from the network or a device: timed out"),
        (MemoryError(), "out of memory; give a smaller --batch-size"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "out of memory (7.28 TiB more were needed)"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "out of memory (20.00 GiB more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes."), "out of memory"),
    ],
)
def test_errors_of_the_system_get_one_line(error: Exception, expected: str) -> None:
    line = describe_system_error(error, "/o")
    assert line is not None
    assert line.startswith(expected)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape mismatch"), ValueError("x"), IndexError()])
def test_errors_in_the_program_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_system_error(error) is None
    monkeypatch.setattr("farout.cli._run_command", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as raised:
        main(["list", "sets"])
    assert "please report it at https://" in raised.value.__notes__[0]


# -- commands --------------------------------------------------------------------------------------------------------


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farout", *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_to_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = run("list", "sets", stdout=full)
    assert result.returncode == 1
    assert result.stderr.startswith("farout: cannot write to the output stream: No space left on device")
    assert len(result.stderr.splitlines()) == 1


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    result = run("list", "sets", preexec_fn=lambda: [os.close(number) for number in (0, 1)])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not delete folders that are in use")
def test_a_current_folder_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); os.execv({sys.executable!r}, ["
    words = f"{sys.executable!r}, '-m', 'farout', 'fit', 'pca', 'x', '--out', 'y'])"
    result = subprocess.run([sys.executable, "-c", script + words], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("farout: cannot read the current folder: it no longer exists")


OUT_PROBLEMS = {
    "file": "exists",
    "file/below": "cannot write ",
    "x" * 300: "File name too long",
    "/proc/nowhere/x": "No such file or directory",
    "link": "",
}


@pytest.mark.parametrize("out", OUT_PROBLEMS)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="paths of Linux")
def test_an_out_that_cannot_be_written_is_one_line(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("link").symlink_to("link")  # to itself
    images = pictures(tmp_path / "images", 40)
    words = ["fit", "pca", str(images), "--size", "32", "--statistics", "20", "--alpha", "0.1", "--out", out]
    assert main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("farout: ")]
    assert len(lines) == 1
    assert OUT_PROBLEMS[out] in lines[0]
    assert Path("file").read_text() == "mine"


def test_a_training_on_a_full_disk_says_so(
    small_disk: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = pictures(tmp_path / "images", 40), tmp_path / "model"
    words = ["train", "diffusion", images, "--out", out, "--alpha", "0.2", "--statistics", "20", "--model.size", "8"]
    assert main([*map(str, words), "--training.steps", "1", "--training.batch-size", "2"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("farout: ")]
    assert "cannot write" in line
    assert "File too large" in line
    assert not out.exists()
    assert not list((tmp_path / "model.training").rglob("*.safetensors"))
