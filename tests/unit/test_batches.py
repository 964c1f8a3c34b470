"""Policies for broken images, batches, and bounded memory: nothing shifts, whatever is broken."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from farout.core.errors import SourceError, UnreadableImageError
from farout.data import image_files
from farout.data.batching import PreparedImages, iterate_batches
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from image_files import pixels, write_folder, write_parquet


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Nine images, three of them broken in different ways."""
    write_folder(tmp_path, pixels(9), [f"{i}.png" for i in range(9)])
    (tmp_path / "1.png").write_text("text named .png")
    (tmp_path / "4.png").write_bytes(b"")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


PLAIN = Preprocessing((8, 8), 1, (8, 8))


def test_raise_names_the_first_broken_image(damaged):
    with pytest.raises(UnreadableImageError, match=r"^1\.png: not an image"):
        list(iterate_batches(open_source(damaged), PLAIN, 4))


@pytest.mark.parametrize("policy", ["skip", "nan"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_broken_images_are_listed_and_nothing_else_shifts(damaged, policy, workers):
    source = open_source(damaged, policy=policy)
    chunks = list(iterate_batches(source, PLAIN, 4, workers=workers))
    assert [batch.indices for batch in chunks] == [(0, 2, 3), (6, 7), (8,)]
    for batch in chunks:
        assert batch.keys == tuple(f"{i}.png" for i in batch.indices)
        assert torch.equal(batch.images, pixels(9)[list(batch.indices)].float() / 255)
    assert set(source.unreadable) == {"1.png", "4.png", "5.png"}
    assert "not an image" in source.unreadable["1.png"]
    assert source.unreadable["4.png"] == "the file is empty"
    assert len(source) == 9


def test_a_chunk_of_broken_images_is_an_empty_batch(tmp_path):
    (tmp_path / "a.png").write_text("x")
    (batch,) = iterate_batches(open_source(tmp_path, policy="nan"), Preprocessing((6, 5), 3, (6, 5)), 4)
    assert batch.images.shape == (0, 3, 6, 5)
    assert batch.keys == batch.indices == ()


def test_a_file_that_vanished_is_unreadable_not_a_crash(tmp_path):
    source = open_source(write_folder(tmp_path, pixels(2), ["a.png", "b.png"]), policy="nan")
    (tmp_path / "a.png").unlink()
    (batch,) = iterate_batches(source, PLAIN, 4)
    assert batch.keys == ("b.png",)
    assert "No such file" in source.unreadable["a.png"]


def test_unknown_policy_is_refused():
    with pytest.raises(SourceError, match="raise, skip, nan"):
        open_source(pixels(1), policy="ignore")


def test_parquet_rows_without_bytes_are_unreadable(tmp_path):
    cells = pa.array([None, {"bytes": None}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", policy="nan")
    assert sum(len(batch.keys) for batch in iterate_batches(source, PLAIN, 1)) == 0
    assert set(source.unreadable) == {"0", "1"}


def test_fingerprint_with_unreadable_images_follows_the_policy(damaged):
    with pytest.raises(UnreadableImageError):
        open_source(damaged).fingerprint()
    assert open_source(damaged, policy="nan").fingerprint()
    assert open_source(damaged, policy="nan").content_hashes()[4] is None


def test_chunks_lie_on_one_grid_from_any_start(house):
    source = open_source("fashion_mnist")
    whole = [batch.indices for batch in iterate_batches(source, PLAIN, 6)]
    assert whole == [tuple(range(0, 6)), tuple(range(6, 12)), tuple(range(12, 18)), (18, 19)]
    assert [batch.indices for batch in iterate_batches(source, PLAIN, 6, start=12)] == whole[2:]
    assert [batch.indices for batch in iterate_batches(source, PLAIN, 6, start=9)] == [(9, 10, 11), *whole[2:]]
    assert list(iterate_batches(source, PLAIN, 6, start=20)) == []
    assert list(iterate_batches(source, PLAIN, 6, start=25)) == []
    assert next(iterate_batches(source, PLAIN, 6)).labels.tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(ValueError, match="size 0"):
        iterate_batches(source, PLAIN, 0)


def test_batches_can_be_left_early(house):
    stream = iterate_batches(open_source("fashion_mnist"), PLAIN, 2, workers=2)
    assert next(stream).indices == (0, 1)
    stream.close()


def test_training_items_are_prepared_images(house):
    data = PreparedImages(open_source("fashion_mnist@hflip"), PLAIN)
    assert len(data) == 20
    assert torch.equal(data[5], pixels(20)[5].flip(2).float() / 255)
    assert data.labels.tolist() == [i % 4 for i in range(20)]


def test_training_raises_whatever_the_policy(damaged):
    with pytest.raises(UnreadableImageError):
        PreparedImages(open_source(damaged, policy="skip"), PLAIN)[1]


def test_a_set_is_decoded_once_and_subsets_share(tmp_path, monkeypatch):
    source = open_source(write_folder(tmp_path, pixels(4), [f"{name}.png" for name in "abcd"]))
    reads = []
    monkeypatch.setattr(image_files, "read_bytes", lambda path, limit: reads.append(path.name) or path.read_bytes())
    for _ in range(3):
        assert len(list(source)) == 4
        source.subset([3, 1])[0]
        source.fingerprint()
    assert sorted(reads) == [f"{name}.png" for name in "abcd"]


def test_memory_is_bounded_and_what_does_not_fit_is_decoded_again(tmp_path):
    images = pixels(80, 3, 64)
    path = write_parquet(tmp_path / "x.parquet", images, row_group=4)
    source = open_source(path, memory_mib=0)
    small = open_source(path, memory_mib=0)
    small._store._budget = 10 * (images[0].numel() + 256)
    before = pa.total_allocated_bytes()
    for i in (*range(80), 3, 39, 0):
        assert torch.equal(source[i], images[i])
        assert torch.equal(small[i], images[i])
        assert len(source._store.listing.read.groups) <= 2
    assert source._store.cached_bytes == 0
    assert small._store.cached_bytes == small._store._budget
    assert pa.total_allocated_bytes() - before < path.stat().st_size / 2


def test_a_returned_image_may_be_written_to(house):
    source = open_source("fashion_mnist")
    source[0].zero_()
    assert torch.equal(source[0], pixels(20)[0])


def test_sources_reach_worker_processes(house):
    for source in (open_source("fashion_mnist"), open_source(pixels(20))):
        source[0]
        again = pickle.loads(pickle.dumps(source))  # noqa: S301 - what a DataLoader does
        assert all(torch.equal(again[i], source[i]) for i in range(20))
        assert again.fingerprint() == source.fingerprint()


def test_random_numbers_follow_the_content_of_an_image(tmp_path: Path) -> None:
    """Not its name: a file that is renamed or moved gets the same noise, and so the same score."""
    images = pixels(3)
    write_folder(tmp_path / "a", images[:2], ["x.png", "y.png"])
    write_folder(tmp_path / "b", images[1:], ["deep/renamed.png", "other.png"])
    ready = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    found = [next(iter(iterate_batches(open_source(tmp_path / name), ready, 8))) for name in ("a", "b")]
    named = [dict(zip(batch.keys, batch.identities, strict=True)) for batch in found]
    assert named[0]["y.png"] == named[1]["deep/renamed.png"]
    assert len({*named[0].values(), *named[1].values()}) == 3
    flipped = next(iter(iterate_batches(open_source(f"{tmp_path / 'a'}@vflip"), ready, 8)))
    assert set(flipped.identities).isdisjoint(found[0].identities), "a variant is another image"
