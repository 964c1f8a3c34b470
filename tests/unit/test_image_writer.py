"""Images are written while the next ones are made: nothing is half written, nothing swallowed, and a full disk is no
end of it.
"""

import csv
import errno
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from farout import reconstruct
from farout.core.errors import StoreError
from farout.core.runtime import Runtime
from farout.synthesis import writer as _writer
from farout.synthesis.class_noise import ClassNoise
from farout.synthesis.editing.sona import SONA
from farout.synthesis.generated_folder import read_manifest_rows
from farout.synthesis.writer import ImageWriter
from small import conditional, pictures

CPU = Runtime(device="cpu", precision="fp32", batch_size=3, workers=0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Labelled images of the classes that `conditional()` knows."""
    for number, name in enumerate("abc"):
        pictures(tmp_path / "images" / name, 4, low=60 * number, seed=number)
    return tmp_path / "images"


def opened(folder: Path, *, resume: bool = False) -> ImageWriter:
    writer = ImageWriter(folder, ("a",), 0, "outliers")
    writer.begin({"config": {}}, {}, resume=resume)
    return writer


def add(writer: ImageWriter, *indices: int) -> None:
    writer.write(indices, [0] * len(indices), torch.rand(len(indices), 1, 8, 8), [""] * len(indices), {})


def fill(writer: ImageWriter, batches: Iterable[Sequence[int]], error: BaseException | None = None) -> None:
    """Add batches, then finish or raise an error."""
    with writer:
        for batch in batches:
            add(writer, *batch)
        if error is not None:
            raise error
        writer.finish()


def test_images_are_written_while_the_next_batch_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is released by the next call: if `write` waited for its own images, this would never end."""
    release, written, save = threading.Event(), [], _writer.save_png

    def waits(image: Tensor, path: Path, working: Path) -> None:
        assert release.wait(60)
        # the rows of a batch come after its images
        manifest = tmp_path / "o" / "manifest.csv"
        assert not manifest.is_file() or path.name not in manifest.read_text()
        written.append(path.stem)
        save(image, path, working)

    monkeypatch.setattr(_writer, "save_png", waits)
    with opened(tmp_path / "o") as writer:
        add(writer, 0, 1)
        assert (written, writer.num_images) == ([], 0)
        release.set()
        add(writer, 2)
        assert writer.num_images == 2
        assert sorted(written)[:2] == ["000000", "000001"]
        writer.finish()
    assert sorted(written) == ["000000", "000001", "000002"]
    assert list(read_manifest_rows(tmp_path / "o")[1]) == [0, 1, 2]
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"config.json", "images", "manifest.csv"}


def test_an_interruption_leaves_the_images_that_were_passed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(opened(tmp_path / "o"), [(3, 1)], KeyboardInterrupt())
    (tmp_path / "o" / ".working-000002").write_text("half")
    again = opened(tmp_path / "o", resume=True)
    assert (again.num_images, again.missing_indices(4)) == (2, [0, 2])
    assert not (tmp_path / "o" / ".working-000002").exists()


def test_errors_of_a_thread_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(image: Tensor, path: Path, working: Path) -> None:
        raise ValueError("no such picture")

    monkeypatch.setattr(_writer, "save_png", fails)
    for name, batches in {"o": [(0,), (1,)], "p": [(0,)]}.items():
        with pytest.raises(ValueError, match="no such picture"):
            fill(opened(tmp_path / name), batches)
    assert opened(tmp_path / "o", resume=True).num_images == 0


# full disks


@contextmanager
def full_after(images: int) -> Iterator[None]:
    """Only half of each image is written after the first ones."""
    save, lock, left = Image.Image.save, threading.Lock(), [images]

    def fills(self: Image.Image, path: Path, **settings: Any) -> None:
        save(self, path, **settings)
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                return
        Path(path).write_bytes(Path(path).read_bytes()[:40])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", fills)
        yield


def make(kind: str, images: Path, out: Path, **settings: Any) -> Any:
    given = {"runtime": CPU, **settings}
    if kind == "reconstruct":
        return reconstruct(images, conditional(), out, steps=2, **given)
    method = SONA(steps=4, reconstructions=True) if kind == "sona" else ClassNoise(steps=2)
    return method.synthesize(images, out, count=12, diffusion=conditional(), **given)


def files(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize("kind", ["sona", "class_noise", "reconstruct"])
def test_a_full_disk_leaves_complete_images_and_says_how_to_continue(kind: str, images: Path, tmp_path: Path) -> None:
    whole = files(make(kind, images, tmp_path / "whole").folder)
    out = tmp_path / "o"
    said = r"cannot be written to: No space left on device; (\d+) images are complete, and .* --resume"
    with pytest.raises(StoreError, match=said) as told, full_after(8):
        make(kind, images, out)
    there = files(out)
    assert 0 < len(there) < len(whole)
    assert {name: whole[name] for name in there if name.endswith(".png")} == {
        name: content for name, content in there.items() if name.endswith(".png")
    }
    full = out / "reconstructions" if "reconstructions cannot be written" in str(told.value) else out
    assert f"; {len(read_manifest_rows(full)[1])} images are complete" in str(told.value)
    assert not list(out.glob(".*"))
    done = make(kind, images, out, resume=True)
    assert (done.images, done.folder) == (12, out)
    assert files(out) == whole


def test_a_manifest_on_a_full_disk_has_complete_rows(tmp_path: Path) -> None:
    """By a limit of the operating system, which writes the part that fits."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    manifest = tmp_path / "o" / "manifest.csv"
    writer = opened(tmp_path / "o")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        with pytest.raises(StoreError, match=r"too large; 9 images are complete"):
            fill(writer, [range(start, start + 3) for start in range(0, 30, 3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert manifest.stat().st_size < 300
    assert [row["index"] for row in csv.DictReader(manifest.read_text().splitlines())] == list("012345678")
    again = opened(tmp_path / "o", resume=True)
    assert again.missing_indices(12) == [9, 10, 11]
    fill(again, [(9, 10, 11)])
    assert list(read_manifest_rows(tmp_path / "o")[1]) == list(range(12))
