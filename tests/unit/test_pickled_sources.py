"""A pickled subset of a source has its own images only, and they are the same."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from farout.core.errors import UnreadableImageError
from farout.data.image_source import ImageSource
from farout.data.sources import open_source

COUNT = 40


def encode(number: int, kind: type = np.uint8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 200, (6, 5)).astype(kind)).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root: Path) -> Path:
    for number in range(COUNT):
        folder = root / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.png").write_bytes(encode(number))
    return root


def write_parquet(root: Path) -> Path:
    root.mkdir()
    for shard in range(4):
        rows = range(shard * 10, shard * 10 + 10)
        table = pa.table({"image": [encode(row) for row in rows], "label": [row % 3 for row in rows]})
        pq.write_table(table, root / f"{shard}.parquet", row_group_size=4)
    return root


def write_archives(root: Path) -> Path:
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for number in range(shard, COUNT, 2):
                member = tarfile.TarInfo(f"{number:03}.png")
                data = encode(number)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root


def write_table(root: Path) -> Path:
    write_files(root)
    lines = [f"class_{number % 2}/{number:03}.png,{number % 5}" for number in range(COUNT)]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]))
    return root / "list.csv"


def make_arrays(root: Path) -> torch.Tensor:
    return torch.randint(0, 255, (COUNT, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_list(root: Path) -> list[bytes]:
    return [encode(number) for number in range(COUNT)]


SOURCES = [write_files, write_parquet, write_archives, write_table, make_arrays, make_list]


def assert_same(first: ImageSource, second: ImageSource) -> None:
    assert second.keys == first.keys
    assert second.labels == first.labels
    assert second.groups == first.groups
    assert second.class_names == first.class_names
    for index in range(len(first)):
        assert torch.equal(first[index], second[index])
        assert first.content_hash(index) == second.content_hash(index)


@pytest.mark.parametrize("write", SOURCES)
def test_a_pickled_subset_has_the_same_images(write: Callable[[Path], object], tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "set"))
    for indices in ([3, 4, 5], [39, 0, 17, 18], range(8, 24), [7]):
        subset = source.subset(indices)
        copy = pickle.loads(pickle.dumps(subset))  # noqa: S301 - written one line above
        assert_same(subset, copy)
        again = pickle.loads(pickle.dumps(copy.subset(range(len(copy) - 1, -1, -1))))  # noqa: S301
        assert_same(subset.subset(range(len(subset) - 1, -1, -1)), again)


@pytest.mark.parametrize("write", SOURCES[:4])
def test_its_size_does_not_grow_with_the_set(write: Callable[[Path], object], tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "set")).with_value_range("full")  # otherwise with those that it depends on
    source.content_hashes()
    whole, one = len(pickle.dumps(source)), len(pickle.dumps(source.subset([11])))
    assert one < 4000
    assert whole - one > 30 * COUNT


def test_a_read_error_is_kept(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set")
    (root / "class_0" / "004.png").write_bytes(b"no image")
    source = open_source(root, policy="nan")
    source.content_hashes()
    subset = source.subset([1, 2, 3])
    copy = pickle.loads(pickle.dumps(subset))  # noqa: S301
    assert copy.unreadable == subset.unreadable
    assert list(copy.unreadable) == ["class_0/004.png"]
    with pytest.raises(UnreadableImageError):
        copy[1]


def test_the_value_range_is_that_of_the_whole_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(10):
        values = np.full((4, 4), 100 if number else 4000, dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "set" / f"{number}.png")
    subset = open_source(tmp_path / "set").subset([5, 6])
    copy = pickle.loads(pickle.dumps(subset))  # noqa: S301
    assert_same(subset, copy)


def test_a_variant_that_needs_other_images_keeps_them(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set")
    subset = open_source(f"{root}@patch").subset([1, 2])
    assert_same(subset, pickle.loads(pickle.dumps(subset)))  # noqa: S301


def test_without_memory_nothing_is_kept(tmp_path: Path) -> None:
    source = open_source(write_files(tmp_path / "set"), memory_mib=0)
    hashes = source.content_hashes()
    assert not source._store._hashes
    assert not source._store._images
    assert hashes == open_source(tmp_path / "set").content_hashes()
