"""Files and folders on disk: complete or not at all, on disk before they are renamed, hashed, and checked."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farout.core import files, store
from farout.core.errors import FaroutError, StoreError, WriteError
from farout.core.network_size import check_network, limit_parameters, read_shapes
from farout.core.runtime import Runtime
from farout.core.schema import check_content, create_dataclass


def write_folder(path: Path, text: str = "a") -> Path:
    with store.atomic_folder(path, "detector") as temporary:
        store.write_config(temporary, "detector", {"text": text})
        (temporary / "inner").mkdir()
        (temporary / "inner" / "x.txt").write_text(text)
    return path


# -- hashes -------------------------------------------------------------------------------------------------------


def test_a_folder_contains_the_hashes_of_its_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    content = store.read_json(folder / "hashes.json")
    assert list(content["files"]) == ["config.json", "inner/x.txt"]
    assert content["files"]["inner/x.txt"] == files.hash_file(folder / "inner" / "x.txt")
    store.check_hashes(folder)
    assert store.describe_damage(folder) == ""


def test_inner_folders_with_hashes_are_hashed_once(tmp_path: Path) -> None:
    with store.atomic_folder(tmp_path / "d", "detector") as temporary:
        store.write_config(temporary, "detector", {})
        write_folder(temporary / "model")
    assert list(store.read_json(tmp_path / "d" / "hashes.json")["files"]) == ["config.json", "model/hashes.json"]
    (tmp_path / "d" / "model" / "inner" / "x.txt").write_text("b")
    store.check_hashes(tmp_path / "d")
    with pytest.raises(StoreError, match=r"x\.txt was changed"):
        store.check_hashes(tmp_path / "d" / "model")
    assert "x.txt was changed" in store.describe_damage(tmp_path / "d")


@pytest.mark.parametrize("position", range(0, 200, 7))
@pytest.mark.parametrize("bit", [1, 2, 4, 32])
def test_any_change_of_the_list_is_noticed(tmp_path: Path, position: int, bit: int) -> None:
    folder = write_folder(tmp_path / "d")
    data = bytearray((folder / "hashes.json").read_bytes())
    data[position] ^= bit
    (folder / "hashes.json").write_bytes(bytes(data))
    with pytest.raises(StoreError):
        store.check_hashes(folder)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "inner", "inner/../config.json", "", "inner/."])
def test_names_outside_the_folder_are_never_opened(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "d")
    content = store.read_json(folder / "hashes.json")
    content["files"][name] = "0" * 64
    store.write_json(folder / "hashes.json", content)
    with pytest.raises(StoreError):
        store.check_hashes(folder)


def test_a_link_that_leads_back_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    (folder / "inner" / "up").symlink_to("..")
    with pytest.raises(StoreError, match="up"):
        store.check_hashes(folder)


def test_files_may_be_links(tmp_path: Path) -> None:
    """As in the cache of the hub."""
    folder = write_folder(tmp_path / "d")
    (folder / "inner" / "x.txt").rename(tmp_path / "blob")
    (folder / "inner" / "x.txt").symlink_to(tmp_path / "blob")
    store.check_hashes(folder)


def test_folders_of_the_first_layout_are_refused_with_advice(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    config = store.read_json(folder / "config.json")
    config["farout"]["format"] = 1
    store.write_json(folder / "config.json", config)
    with pytest.raises(StoreError, match="layout 1, this farout reads layout 2; write the detector again"):
        store.read_config(folder, "detector")
    write_folder(folder)
    store.read_config(folder, "detector")


def test_sealed_files_notice_changes(tmp_path: Path) -> None:
    path, content = tmp_path / "m.json", {"a": (1, 2), "b": {"é": None}, "c": 0.1}
    store.write_sealed_json(path, content)
    assert store.read_sealed_json(path) == json.loads(json.dumps(content))
    path.write_text(path.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(StoreError, match=r"m\.json was changed"):
        store.read_sealed_json(path)
    store.write_json(path, content)
    with pytest.raises(StoreError, match=r"m\.json was changed"):
        store.read_sealed_json(path)


# -- writing ------------------------------------------------------------------------------------------------------


def test_files_are_on_disk_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power failure leaves a renamed file without content."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def record_rename(old: Any, new: Any) -> None:
        calls.append(("rename", Path(new).name))
        rename(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("requires /proc")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_rename)
    store.write_json(tmp_path / "a.json", {})
    assert [kind for kind, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[0][1].startswith(".a.json.")
    assert calls[-1][1] == tmp_path.name
    calls.clear()
    with store.atomic_folder(tmp_path / "d", None) as folder:
        (folder / "weights").write_bytes(b"1")
    assert calls[0] == ("fsync", "weights")
    assert calls[-2:] == [("rename", "d"), ("fsync", tmp_path.name)]
    calls.clear()
    with store.atomic_file(tmp_path / "image.png", flush=False) as temporary:
        temporary.write_bytes(b"1")
    assert calls == [("rename", "image.png")]


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=r"cannot write .*a\.json: Input/output error"):
        store.write_json(tmp_path / "a.json", {"new": 1})
    assert store.read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_that_cannot_flush_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    store.write_json(tmp_path / "a.json", {"new": 1})
    assert store.read_json(tmp_path / "a.json") == {"new": 1}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "full"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def write_large(path: Path, how: str) -> None:
    if how == "tensors":
        store.save_tensors(path, {"a": torch.ones(2**18)})
    elif how == "json":
        store.write_json(path, {"a": "x" * 2**20})
    elif how == "folder":
        with store.atomic_folder(path, "detector") as folder:
            store.write_config(folder, "detector", {})
            store.save_tensors(folder / "inner.safetensors", {"a": torch.ones(2**18)})
    elif how == "table":
        from farout.detectors.results import Measurements

        table = Measurements(tuple(map(str, range(20_000))), vectors={"v": torch.rand(20_000, 8)})
        with store.atomic_file(path) as temporary:
            table.write_parquet(temporary)
    elif how == "image":
        from farout.data.decoding import save_png

        save_png(torch.rand(3, 500, 500), path)
    elif how == "checkpoint":
        from farout.training.checkpoints import write_checkpoint

        write_checkpoint(path, {"a": torch.ones(2)}, None, {"state": {0: torch.ones(2**18)}}, {"step": 1})


@pytest.mark.parametrize("how", ["tensors", "json", "folder", "table", "image", "checkpoint"])
def test_a_full_disk_leaves_what_was_there(full_disk: Path, how: str) -> None:
    path = full_disk / "result"
    if how in ("folder", "checkpoint"):
        write_folder(path)
    else:
        path.write_text("earlier")
    before = {each.relative_to(path): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with pytest.raises(WriteError) as caught:
        write_large(path, how)
    assert str(caught.value).startswith(f"cannot write {path}: No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert [each.name for each in full_disk.iterdir()] == ["result"]
    after = {each.relative_to(path): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    assert after == before
    assert path.is_dir() or path.read_text() == "earlier"


# -- reading ------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "loop", "zero", "missing"):
        for read in (store.read_json, store.load_tensors, store.read_hashes, read_shapes):
            with pytest.raises(StoreError, match=name):
                read(tmp_path / name)
    with pytest.raises(OSError, match="a named pipe"):
        files.read_file(tmp_path / "pipe", 10)
    with pytest.raises(OSError, match="not a file name"):
        files.read_file("a\0b", 10)


def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.json").chmod(0)
    if os.geteuid() == 0:
        code = (
            "import os, sys\nfrom farout.core import store\nos.setuid(65534)\n"
            "try: store.read_json(sys.argv[1])\nexcept store.StoreError as error: print(error)"
        )
        for folder in (tmp_path, *tmp_path.parents):
            if folder != Path(folder.anchor) and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o711)
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a.json"], capture_output=True, text=True, check=False
        )
        assert "a.json cannot be read: Permission denied" in done.stdout, done.stderr
    else:
        with pytest.raises(StoreError, match="Permission denied"):
            store.read_json(tmp_path / "a.json")


def test_size_limits_hold_for_files_without_a_size(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("requires /proc")
    with pytest.raises(OSError, match="more than 10 bytes"):
        files.read_file("/proc/self/maps", 10)


# -- schemas and sizes --------------------------------------------------------------------------------------------


def test_values_are_checked_strictly() -> None:
    assert create_dataclass(Runtime, {"batch_size": 5, "device": "cpu"}, "c") == Runtime(device="cpu", batch_size=5)
    for values, message in (
        ({"batch_size": True}, "c: batch_size is True; expected a valid integer or 'auto'"),
        ({"batch_size": "5"}, "c: batch_size is '5'"),
        ({"workers": 1.0}, "c: workers is 1.0"),
        ({"rows": 1}, "c has an unknown entry 'rows'; expected device"),
        ([1], r"c is \[1\]; expected an object"),
        ({"device": "x" * 10_000}, "x"),
    ):
        with pytest.raises(FaroutError, match=message):
            create_dataclass(Runtime, values, "c").resolve_auto()
    check_content({"a": [1]}, dict[str, list[int]], "c")
    with pytest.raises(StoreError, match=r"c: a\.1 is 'x'; expected a valid integer"):
        check_content({"a": [1, "x"]}, dict[str, list[int]], "c")
    with pytest.raises(StoreError) as caught:
        check_content({"a": "x" * 10**6}, dict[str, int], "c")
    assert len(str(caught.value)) < 300


def test_networks_that_are_too_large_are_given_up() -> None:
    with limit_parameters(110, "net", Path("w")):
        torch.nn.Linear(10, 10)
    with (
        pytest.raises(StoreError, match="net has more than the 109 parameters"),
        limit_parameters(109, "net", Path("w")),
    ):
        torch.nn.Linear(10, 10)
    torch.nn.Linear(100, 100)


class ComputesWithValues(torch.nn.Module):
    """As networks of older versions of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.layer = torch.nn.Linear(2, 3)


def test_networks_are_compared_with_the_header_of_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    store.save_tensors(path, torch.nn.Linear(2, 3).state_dict())
    check_network(lambda: torch.nn.Linear(2, 3), path, "net")
    check_network(ComputesWithValues, path, "net")
    with pytest.raises(
        StoreError, match=r"not contain the weights of net: weight has shape \(3, 2\), expected \(2, 3\)"
    ):
        check_network(lambda: torch.nn.Linear(3, 2), path, "net", largest=100)
    with pytest.raises(StoreError, match="1 are unexpected, first bias"):
        check_network(lambda: torch.nn.Linear(2, 3, bias=False), path, "net")
    with pytest.raises(StoreError, match="more than the 9 parameters"):
        check_network(lambda: torch.nn.Linear(10**7, 10**7), path, "net")
