"""The cache of features: what was computed once is not computed again, and nothing foreign is read as features."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from farout.core.errors import StoreError, UnreadableImageError
from farout.data import image_files, parquet_files
from farout.data.batching import Batch, iterate_batches
from farout.data.decoding import DecodedImage, decode
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from farout.features import cache as module
from farout.features import cache_folder as folder_module
from farout.features import feature_files as files_module
from farout.features import feature_store as store_module
from farout.features.cache import FeatureCache
from farout.features.cache_folder import cache_folder, clear_cache, list_cached_features, measure_cache
from image_files import pixels, write_folder, write_parquet

pytestmark = pytest.mark.numerics

PLAIN = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
WIDTH = 3


class Counting:
    """Stands for a backbone: three numbers of an image, and how many images it was asked for."""

    def __init__(self) -> None:
        self.images, self.calls = 0, 0
        self.before: Callable[[], None] = lambda: None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.before()
        self.images, self.calls = self.images + len(images), self.calls + 1
        return torch.stack([images.mean((1, 2, 3)), images[:, 0, 0, 0], images.amax((1, 2, 3))], dim=1)


def read(
    source: ImageSource, root: Path, compute: Counting | None = None, *, size: int = 8, workers: int = 2, **more: object
) -> tuple[list[Batch], FeatureCache]:
    """All batches of a source, four images a call."""
    cache = FeatureCache(WIDTH, {"kind": "test", **more}, root)
    return list(cache.batches(source, PLAIN, size, workers, compute or Counting(), 4)), cache


def features(made: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.features for batch in made if batch.features is not None])


def computed(source: ImageSource, root: Path, **more: object) -> int:
    """How many images a further reading computes."""
    compute = Counting()
    read(source, root, compute, **more)
    return compute.images


def start_again() -> None:
    """Forget what this process knows of the cache, as a new process would."""
    store_module._flush_stores()
    store_module._stores.clear()


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Twenty gray pictures with labels."""
    return open_source(write_parquet(tmp_path / "set.parquet", pixels(20), [i % 3 for i in range(20)]))


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What was logged as a warning; each is logged once a process."""
    folder_module.warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


# -- what is kept -------------------------------------------------------------------------------------------------


def test_the_second_reading_computes_nothing_and_gives_the_same_bits(source: ImageSource, tmp_path: Path) -> None:
    compute = Counting()
    first, cache = read(source, tmp_path, compute)
    assert (compute.images, cache.hits) == (20, 0)
    second, again = read(source, tmp_path, compute)
    assert (compute.images, again.hits) == (20, 20)
    assert torch.equal(features(first), features(second))
    assert features(second).dtype == torch.float32


@pytest.mark.parametrize(("size", "workers"), [(8, 2), (7, 0), (1, 1), (64, 3)])
def test_keys_labels_and_places_are_those_of_images(
    size: int, workers: int, source: ImageSource, tmp_path: Path
) -> None:
    """A label beside the wrong image would spoil every statistic by class."""
    plain = list(iterate_batches(source, PLAIN, size))
    for _ in range(2):
        made, _ = read(source, tmp_path, size=size, workers=workers)
        assert len(made) == len(plain)
        for one, other in zip(made, plain, strict=True):
            assert one.keys == other.keys
            assert one.indices == other.indices
            assert one.labels is not None
            assert other.labels is not None
            assert one.labels.dtype == torch.int64
            assert torch.equal(one.labels, other.labels)
            assert len(one.images) == 0
            assert torch.equal(one.features, Counting()(other.images))


def test_calls_are_filled_where_much_is_known(source: ImageSource, tmp_path: Path) -> None:
    """A call of four rows costs the same with one image in it."""
    read(source.subset(range(0, 20, 2)), tmp_path)
    compute = Counting()
    read(source, tmp_path, compute, size=20)
    assert (compute.images, compute.calls) == (10, 3)


def test_an_image_is_decoded_once_even_if_pixels_do_not_fit_in_memory(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "set.parquet", pixels(20), [0] * 20), memory_mib=0)
    store, decoded = source._store, list[int]()
    decode = store.listing.read
    counting = replace(store.listing, read=lambda index, size: decoded.append(index) or decode(index, size))
    store.listing = counting
    read(source, tmp_path)
    assert sorted(decoded) == list(range(20))
    decoded.clear()
    assert computed(source, tmp_path) == 0
    assert len(decoded) <= 20


@pytest.mark.parametrize("form", ["folder", "parquet"])
@pytest.mark.parametrize("memory_mib", [0, 64])
def test_images_that_were_read_before_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, memory_mib: int
) -> None:
    """In another process, or by another detector: the content hash is found by the hash of the encoded bytes."""
    if form == "folder":
        images = write_folder(tmp_path / "set", pixels(20), [f"{i:02d}.png" for i in range(20)])
    else:
        images = write_parquet(tmp_path / "set.parquet", pixels(20), [0] * 20)
    decoded = Counter[str]()

    def count(data: bytes, key: str, *more: object, **settings: object) -> DecodedImage:
        decoded[key] += 1
        return decode(data, key, *more, **settings)

    for reader in (image_files, parquet_files):
        monkeypatch.setattr(reader, "decode", count)
    first, _ = read(open_source(images, memory_mib=memory_mib), tmp_path)
    assert set(decoded.values()) == {1}
    decoded.clear()
    second, _ = read(open_source(images, memory_mib=memory_mib), tmp_path)
    assert not decoded
    assert torch.equal(features(first), features(second))
    assert [batch.identities for batch in first] == [batch.identities for batch in second]
    assert computed(open_source(images), tmp_path, weights="other") == 20, "another backbone needs the pixels"
    assert set(decoded.values()) == {1}
    assert measure_cache(tmp_path) > 0
    clear_cache(root=tmp_path)
    assert measure_cache(tmp_path) == 0


def test_an_image_that_became_too_large_or_has_more_frames_is_decoded(tmp_path: Path) -> None:
    """What decoding finds out about an image is not lost."""
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "a.gif", save_all=True, append_images=[Image.fromarray(np.full((8, 8), 9, np.uint8))])
    image.save(tmp_path / "set" / "b.png")
    for _ in range(2):
        source = open_source(tmp_path / "set", policy="skip")
        read(source, tmp_path)
        assert source.further_frames == {"a.gif": 1}
    limited = open_source(tmp_path / "set", policy="skip", reading=ReadSettings(max_pixels=10))
    read(limited, tmp_path)
    assert set(limited.unreadable) == {"a.gif", "b.png"}


def test_sets_that_share_images_share_features(source: ImageSource, tmp_path: Path) -> None:
    """A sample, a split and the whole set are the same images."""
    read(source.subset([3, 4, 5]), tmp_path)
    assert computed(source, tmp_path) == 17
    assert computed(open_source(source, limit=6), tmp_path) == 0
    copies = write_folder(tmp_path / "copies", pixels(20), [f"{i:02d}.png" for i in range(20)])
    assert computed(open_source(copies), tmp_path) == 0, "the same pixels under other names"


def test_variants_are_other_images(tmp_path: Path) -> None:
    """Features of turned images read as those of the originals would make a hard test of an easy one."""
    folder = write_folder(tmp_path / "set", pixels(10), [f"{i}.png" for i in range(10)])
    read(open_source(folder), tmp_path)
    found = {}
    for variant in ("vflip", "patch", "noise"):
        varied = open_source(f"{folder}@{variant}")
        assert computed(varied, tmp_path) == 10, variant
        assert computed(varied, tmp_path) == 0, variant
        found[variant] = features(read(varied, tmp_path)[0])
        fresh = torch.cat([Counting()(batch.images) for batch in iterate_batches(varied, PLAIN, 8)])
        assert torch.equal(found[variant], fresh)
    assert not torch.equal(found["vflip"], found["patch"])


def test_other_settings_and_versions_have_folders_of_their_own(
    source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(source, tmp_path)
    assert computed(source, tmp_path, precision="bf16") == 20
    assert computed(source, tmp_path) == 0
    versions = {**module.store.versions(), "torch": "9.9"}
    monkeypatch.setattr(module.store, "versions", lambda: versions)
    assert computed(source, tmp_path) == 20
    assert len(list_cached_features(tmp_path)) == 3


def test_information_for_readers_does_not_change_the_folder(tmp_path: Path) -> None:
    one, other = (FeatureCache(WIDTH, {"kind": 1}, tmp_path, {"weights": path}) for path in ("a", "b"))
    assert one.folder == other.folder


def test_features_that_are_not_numbers_are_never_kept(source: ImageSource, tmp_path: Path) -> None:
    """A broken graphics card must not be remembered for ever."""

    class Broken(Counting):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            found = super().__call__(images)
            found[0] = float("nan")
            return found

    made, _ = read(source, tmp_path, Broken())
    assert int(features(made).isnan().any(1).sum()) == 5
    assert computed(source, tmp_path) == 5
    assert computed(source, tmp_path) == 0


# -- interruptions, damage, company -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_was_computed(error: type, source: ImageSource, tmp_path: Path) -> None:
    compute = Counting()

    def stop() -> None:
        if compute.images >= 12:
            raise error

    compute.before = stop
    with pytest.raises(error):
        read(source, tmp_path, compute)
    assert computed(source, tmp_path) == 8


def test_a_killed_run_goes_on_with_the_same_calls(tmp_path: Path) -> None:
    """Rounding depends on the batch: what is computed after a kill must not be grouped in another way than before."""

    class Recording(Counting):
        def __init__(self, stop: int = 100) -> None:
            super().__init__()
            self.stop, self.groups = stop, list[list[float]]()

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if self.calls == self.stop:
                raise KeyboardInterrupt
            self.groups.append(images.mean((1, 2, 3)).tolist())
            return super().__call__(images)

    images = pixels(20)
    images[13] = images[2]  # equal images are computed once
    source = open_source(write_parquet(tmp_path / "twins.parquet", images, [0] * 20))
    whole = Recording()
    expected = features(read(source, tmp_path / "whole", whole)[0])
    killed = Recording(stop=3)
    with pytest.raises(KeyboardInterrupt):
        read(source, tmp_path / "killed", killed)
    resumed = Recording()
    again = features(read(source, tmp_path / "killed", resumed)[0])
    assert killed.groups + resumed.groups == whole.groups
    assert torch.equal(again, expected)
    assert sum(map(len, whole.groups)) == 19


def test_a_reader_that_leaves_early_keeps_what_was_computed(source: ImageSource, tmp_path: Path) -> None:
    cache, compute = FeatureCache(WIDTH, {"kind": "test"}, tmp_path), Counting()
    for _ in cache.batches(source, PLAIN, 8, 2, compute, 4):
        break
    assert compute.images == 8
    assert computed(source, tmp_path) == 12


def test_long_runs_write_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: ImageSource) -> None:
    """A killed process loses at most one block."""
    monkeypatch.setattr(store_module, "_ROWS_PER_WRITE", 8)
    cache = FeatureCache(WIDTH, {"kind": "test"}, tmp_path)
    made = cache.batches(source, PLAIN, 8, 0, Counting(), 4)
    next(made)
    next(made)
    start_again()
    assert computed(source, tmp_path) == 4
    made.close()  # type: ignore[attr-defined]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _half_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def _foreign(path: Path) -> None:
    table = pa.table({"image": ["a"] * 20, "features": [[0.0] * WIDTH] * 20})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _wider(path: Path) -> None:
    hashes = [bytes([number]) * 16 for number in range(20)]
    files_module.write_feature_file(path, hashes, np.zeros((20, WIDTH + 1), dtype=np.float32))


def _no_table(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path.with_suffix(".npy").replace(path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_truncate, _half_header, _foreign, _wider, _no_table, _empty, _folder])
def test_damaged_files_are_passed_over(
    damage: Callable[[Path], None], source: ImageSource, tmp_path: Path, warned: Callable[[], str]
) -> None:
    first, cache = read(source, tmp_path)
    file = next(cache.folder.glob("*.arrow"))
    damage(file)
    start_again()
    made, _ = read(source, tmp_path)
    assert torch.equal(features(made), features(first))
    assert file.name in warned()
    assert "ignored" in warned()
    assert computed(source, tmp_path) == 0, "recomputed and kept"
    assert warned().count("ignored") == 1
    assert [kind.images for kind in list_cached_features(tmp_path)] in ([20], [40]), "the rest is still listed"


@pytest.mark.parametrize("damage", [_half_header, _empty])
def test_files_that_change_under_a_running_process_are_computed_again(
    damage: Callable[[Path], None], source: ImageSource, tmp_path: Path, warned: Callable[[], str]
) -> None:
    first, cache = read(source, tmp_path)
    damage(next(cache.folder.glob("*.arrow")))
    assert torch.equal(features(read(source, tmp_path)[0]), features(first))
    assert "damaged and computed again" in warned()


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("column", ["image", "features", "check"])
def test_a_flipped_bit_of_a_row_is_computed_again(
    column: str, is_loaded: bool, source: ImageSource, tmp_path: Path, warned: Callable[[], str]
) -> None:
    """It would become part of scores."""
    first, cache = read(source, tmp_path)
    file = next(cache.folder.glob("*.arrow"))
    data = file.read_bytes()
    whole = pa.py_buffer(data)
    batch = pa.ipc.open_file(whole).get_batch(0)
    content = batch.column(column).buffers()[-1]
    changed = bytearray(data)
    changed[content.address - whole.address + 17] ^= 4
    file.write_bytes(changed)
    if not is_loaded:
        start_again()
    made, _ = read(source, tmp_path)
    assert torch.equal(features(made), features(first))
    start_again()
    assert computed(source, tmp_path) <= 1
    assert ("damaged and computed again" in warned()) == (column != "image"), "that is another image"
    start_again()
    assert computed(source, tmp_path) == 0
    assert torch.equal(features(read(source, tmp_path)[0]), features(first))


def test_two_writers_at_once_do_no_harm(source: ImageSource, tmp_path: Path) -> None:
    """Two detectors are fitted at the same time on the same images."""
    wait = threading.Barrier(2, timeout=30)
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        compute = Counting()
        compute.before = lambda: wait.wait() and None
        found[number] = features(read(source, tmp_path, compute)[0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])
    made, cache = read(source, tmp_path)
    assert cache.hits == 20
    assert torch.equal(features(made), found[0])
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".")], "no remains"


# -- unreadable images --------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Ten pictures, of which the fourth is text."""
    folder = write_folder(tmp_path / "damaged", pixels(10), [f"{i}.png" for i in range(10)])
    (folder / "3.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("policy", ["nan", "skip"])
@pytest.mark.parametrize("variant", ["", "@vflip"])
def test_unreadable_images_shift_nothing(policy: str, variant: str, damaged: Path, tmp_path: Path) -> None:
    for size in (4, 1):
        made, _ = read(open_source(f"{damaged}{variant}", policy=policy), tmp_path, size=size)
        plain = list(iterate_batches(open_source(f"{damaged}{variant}", policy=policy), PLAIN, size))
        assert [batch.keys for batch in made] == [batch.keys for batch in plain]
        assert [batch.indices for batch in made] == [batch.indices for batch in plain]
        wanted = torch.cat([Counting()(batch.images) for batch in plain if batch.keys])
        assert torch.equal(features(made), wanted)


def test_an_unreadable_image_raises_where_it_shall(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"3\.png"):
        read(open_source(damaged), tmp_path)
    bad = open_source(damaged, policy="skip")
    read(bad, tmp_path)
    assert list(bad.unreadable) == ["3.png"]


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_costs_time_only(
    source: ImageSource, tmp_path: Path, warned: Callable[[], str]
) -> None:
    """Scoring must not fail for want of a cache, and the user learns why it is slow."""
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        made, cache = read(source, tmp_path / "file")
        assert len(features(made)) == 20
        assert "cannot be written" in cache.failure
    assert warned().count("without being stored") == 1
    assert "FAROUT_CACHE" in warned()


def test_a_disk_that_fills_up_costs_time_only(
    source: ImageSource, tmp_path: Path, warned: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.pa.ipc, "new_file", full)
    made, cache = read(source, tmp_path)
    assert len(features(made)) == 20
    assert "No space left" in warned()
    assert [path.name for path in cache.folder.iterdir()] == ["settings.json"], "nothing half-written is left"


def test_a_full_cache_costs_time_only(
    source: ImageSource, tmp_path: Path, warned: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", "100b")
    made, cache = read(source, tmp_path)
    assert len(features(made)) == 20
    assert "reached its limit of 100 bytes" in cache.failure
    assert "FAROUT_CACHE_LIMIT" in warned()
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", "plenty")
    with pytest.raises(StoreError, match="FAROUT_CACHE_LIMIT is 'plenty'"):
        read(source, tmp_path)


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAROUT_CACHE", "~/features")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "features"
    for name in ("FAROUT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "farout"
    monkeypatch.setenv("HOME", "")
    with pytest.raises(StoreError, match="FAROUT_CACHE"):
        cache_folder()
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_features_are_computed_without_a_home_folder(source, monkeypatch, warned) -> None:
    monkeypatch.setenv("HOME", "")
    for name in ("FAROUT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    made, cache = read(source, None)
    assert len(features(made)) == 20
    assert "no home folder" in warned()
    with pytest.raises(StoreError, match="FAROUT_CACHE"):
        cache.create_folder()


def test_list_and_clear(source: ImageSource, tmp_path: Path) -> None:
    _, one = read(source, tmp_path)
    _, other = read(source.subset(range(5)), tmp_path, precision="bf16")
    mine = tmp_path / "features" / "my photographs"
    mine.mkdir()
    found = {kind.folder: kind for kind in list_cached_features(tmp_path)}
    assert {folder: kind.images for folder, kind in found.items()} == {one.folder: 20, other.folder: 5}
    assert found[other.folder].settings["precision"] == "bf16"
    assert 0 < found[one.folder].mib < 0.1
    assert [kind.folder for kind in clear_cache(other.folder.name, tmp_path)] == [other.folder]
    for name in ("nonsense", "..", mine.name):
        with pytest.raises(StoreError, match="farout features list"):
            clear_cache(name, tmp_path)
    (one.folder / "settings.json").write_text("{")
    assert [kind.images for kind in clear_cache(None, tmp_path)] == [20]
    assert list_cached_features(tmp_path) == []
    assert mine.is_dir(), "what is not the cache's own is never removed"
    assert computed(source, tmp_path) == 20
