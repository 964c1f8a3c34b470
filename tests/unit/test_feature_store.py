"""Files of the feature cache: look-ups, merging, the size limit, and several processes at once."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from farout.core.errors import StoreError
from farout.features import cache_folder as folder_module
from farout.features import feature_store as store_module
from farout.features.cache_folder import (
    CacheFullError,
    cache_limit,
    clear_cache,
    format_size,
    list_cached_features,
    lock_cache,
    make_room,
    measure_cache,
)
from farout.features.feature_files import count_rows, open_feature_file, write_feature_file
from farout.features.feature_index import FeatureIndex, split_hashes
from farout.features.feature_store import FeatureStore

WIDTH = 4


def hash_of(number: int) -> bytes:
    return b"%08d" % number * 2


def row_of(number: int) -> np.ndarray:
    return np.arange(WIDTH, dtype=np.float32) + number


def rows_of(numbers: range) -> dict[bytes, np.ndarray]:
    return {hash_of(number): row_of(number) for number in numbers}


def open_new(root: Path, kind: int = 0) -> FeatureStore:
    """The store of a kind of features, as another process opens it."""
    store = FeatureStore(root / "features" / f"{kind:016x}", WIDTH, {"format": 4})
    store.refresh()
    return store


def write(root: Path, numbers: range, kind: int = 0) -> FeatureStore:
    store = open_new(root, kind)
    store.add(rows_of(numbers))
    store.flush()
    return store


def check(store: FeatureStore, numbers: range) -> None:
    """All these rows are stored, with the right features."""
    found = store.read([hash_of(number) for number in numbers])
    assert len(found) == len(numbers)
    assert all((found[hash_of(number)] == row_of(number)).all() for number in numbers)


def files_of(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("*.arrow"))


def age(paths: list[Path], seconds: float) -> None:
    """Make files look as if they were not used for this time."""
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    folder_module.warn_once.cache_clear()
    with caplog.at_level(logging.INFO, "farout"):
        yield lambda: [record.getMessage() for record in caplog.records]


# -- one file -----------------------------------------------------------------------------------------------------


def test_a_file_is_a_table_that_other_programs_read(tmp_path: Path) -> None:
    path = tmp_path / "f.arrow"
    write_feature_file(path, [hash_of(number) for number in range(5)], np.stack([row_of(n) for n in range(5)]))
    table = pa.ipc.open_file(path).read_all()
    assert table.column("image").to_pylist() == [hash_of(number) for number in range(5)]
    assert table.column("features").to_pylist() == [row_of(number).tolist() for number in range(5)]


def test_equal_halves_of_hashes_are_no_equal_hashes(tmp_path: Path) -> None:
    """The index is sorted by the first half of the hash."""
    hashes = [bytes(8) + bytes([number]) * 8 for number in (3, 1, 2)] + [b"\xff" * 16, bytes(16)]
    features = np.stack([row_of(number) for number in range(5)])
    write_feature_file(tmp_path / "f.arrow", hashes, features)
    index = FeatureIndex.from_file(*open_feature_file(tmp_path / "f.arrow", WIDTH))
    others = [bytes(8) + b"\x04" * 8, b"\xff" * 8 + bytes(8), b"\x01" * 16]
    found = {number: row for number, _, row, _ in index.find(split_hashes(b"".join([*others, *hashes])))}
    assert found == {number + len(others): number for number in range(len(hashes))}


def test_no_bit_of_a_file_changes_features(tmp_path: Path) -> None:
    """A changed bit anywhere, also in the description of the columns, costs rows and changes none."""
    path = tmp_path / "f.arrow"
    hashes = [hash_of(number) for number in range(4)]
    features = np.stack([row_of(number) for number in range(4)])
    write_feature_file(path, hashes, features)
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        store = FeatureStore(tmp_path, WIDTH, {})
        store.refresh()
        found = store.read(hashes)
        assert all((found[image_hash] == features[hashes.index(image_hash)]).all() for image_hash in found)


# -- many files ---------------------------------------------------------------------------------------------------


def test_many_small_files_are_merged(tmp_path: Path) -> None:
    """A million images must not be thousands of files, which every command would open."""
    for number in range(50):
        write(tmp_path, range(number, number + 1))
    store = open_new(tmp_path)
    assert len(files_of(store)) == 3 + 50 % 16
    check(store, range(50))
    assert [kind.images for kind in list_cached_features(tmp_path)] == [50]
    long = write(tmp_path, range(1000, 1000 + 256 * 40), kind=1)
    check(open_new(tmp_path, 1), range(1000, 1000 + 256 * 40))
    assert len(files_of(long)) == 1


def test_long_runs_merge_what_they_write(tmp_path: Path) -> None:
    store = open_new(tmp_path)
    for start in range(0, 256 * 40, 64):
        store.add(rows_of(range(start, start + 64)))
    assert len(files_of(store)) == 2 + 40 % 16
    check(store, range(256 * 40))


def test_files_stay_below_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_LARGEST_FILE", 1000 * 36)
    store = open_new(tmp_path)
    for start in range(0, 256 * 40, 64):
        store.add(rows_of(range(start, start + 64)))
    check(open_new(tmp_path), range(256 * 40))
    assert all(path.stat().st_size < 1400 * 36 for path in files_of(store))
    assert len(files_of(store)) < 20


def test_merging_keeps_the_time_of_the_last_use_and_no_row_twice(tmp_path: Path) -> None:
    for _ in range(15):
        write(tmp_path, range(20))
    store = open_new(tmp_path)
    age(files_of(store), 5000)
    age(files_of(store)[3:4], 3000)
    write(tmp_path, range(1000, 1256))
    assert len(files_of(store)) == 16
    age(files_of(store)[-1:], 4000)
    store = write(tmp_path, range(20, 25))  # is of another size
    merged = write(tmp_path, range(15, 30))
    assert [count_rows(path) for path in files_of(merged)] == [25, 256, 5]
    check(open_new(tmp_path), range(30))
    assert [kind.images for kind in list_cached_features(tmp_path)] == [256 + 30]


def test_damaged_rows_and_files_are_not_merged(tmp_path: Path, logged: Callable[[], list[str]]) -> None:
    for number in range(15):
        store = write(tmp_path, range(number, number + 1))
    files = files_of(store)
    data = files[2].read_bytes()
    position = data.index(row_of(2).tobytes())
    files[2].write_bytes(data[:position] + b"\x01" + data[position + 1 :])
    files[4].write_bytes(b"text")
    for number in (15, 16):
        write(tmp_path, range(number, number + 1))
    store = open_new(tmp_path)
    found = store.read([hash_of(number) for number in range(17)])
    assert set(range(17)) - {int(image_hash[:8]) for image_hash in found} == {2, 4}
    assert files[4].exists(), "the user may look at it"
    assert len(files_of(store)) == 2
    assert sum("ignored" in line for line in logged()) == 1


def test_a_process_finds_what_another_one_merged(tmp_path: Path) -> None:
    for number in range(15):
        write(tmp_path, range(number, number + 1))
    reader = open_new(tmp_path)
    write(tmp_path, range(15, 16))
    assert len(files_of(reader)) == 1, "the files that the reader knows are gone"
    check(reader, range(15))


def test_deleted_files_are_computed_again(tmp_path: Path, logged: Callable[[], list[str]]) -> None:
    store = write(tmp_path, range(10))
    clear_cache(None, tmp_path)
    assert store.read([hash_of(1)]) == {}
    store.add(rows_of(range(10)))
    store.flush()
    check(open_new(tmp_path), range(10))
    assert logged() == []


def test_only_one_process_merges(tmp_path: Path) -> None:
    for number in range(15):
        store = write(tmp_path, range(number, number + 1))
    with lock_cache(tmp_path) as is_locked:
        assert is_locked
        store = write(tmp_path, range(15, 16))
        assert len(files_of(store)) == 16
    check(open_new(tmp_path), range(16))
    assert len(files_of(store)) == 1


def test_a_service_does_not_write_a_file_for_each_request(tmp_path: Path) -> None:
    store = open_new(tmp_path)
    for number in range(200):
        store.add(rows_of(range(number, number + 1)))
        store.flush(may_wait=True)
        check(store, range(number + 1))
    assert len(files_of(store)) == 8
    store.flush()
    check(open_new(tmp_path), range(200))


SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from farout.features.feature_store import open_store
folder, start = Path(sys.argv[1]), int(sys.argv[2])
store = open_store(folder, 4, {"format": 4})
for number in range(start, start + 80):
    store.refresh()
    rows = {b"%08d" % n * 2: np.arange(4, dtype=np.float32) + n for n in (number, number + 1)}
    for image_hash, row in store.read(list(rows)).items():
        assert (row == rows[image_hash]).all()
    store.add(rows)
    store.flush(may_wait=number % 10 != 0)  # the last rows are written when the process ends
"""


@pytest.mark.slow
def test_processes_write_and_merge_at_once(tmp_path: Path) -> None:
    """Two detectors are fitted at the same time on overlapping images."""
    folder = tmp_path / "features" / f"{0:016x}"
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    writers = [subprocess.Popen([*command, str(start)], stderr=subprocess.PIPE, text=True) for start in (0, 40)]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    store = open_new(tmp_path)
    check(store, range(121))
    assert len(files_of(store)) < 32
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_threads_share_a_store(tmp_path: Path) -> None:
    store = open_new(tmp_path)
    failures = []

    def work(start: int) -> None:
        try:
            for number in range(start, start + 24):
                store.add(rows_of(range(number, number + 8)))
                check(store, range(start, number + 8))
                store.flush()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check(open_new(tmp_path), range(51))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="requires a folder that the user cannot write")
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    with lock_cache(tmp_path):
        for number in range(1, 16):
            store = write(tmp_path, range(number, number + 1))
    assert len(files_of(store)) == 16
    store.folder.chmod(0o500)
    try:
        check(open_new(tmp_path), range(16))
    finally:
        store.folder.chmod(0o700)


# -- the size limit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 20 * 2**30),
        ("3", 3 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("500 MB", 500_000_000),
        ("2048b", 2048),
        ("4kib", 4096),
        (" NONE ", None),
    ],
)
def test_the_limit_is_a_size(text: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["0", "-1", "much", "5 parsecs", "nan", "1e9", "٣", "9" * 400, "0.5b"])
def test_a_wrong_limit_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", text)
    with pytest.raises(StoreError, match=r"FAROUT_CACHE_LIMIT is .*expected a size"):
        cache_limit()


def test_sizes_are_written_for_people() -> None:
    assert [format_size(size) for size in (0, 1000, 1536, 20 * 2**30, 2**42)] == [
        "0 bytes",
        "1000 bytes",
        "1.5 KiB",
        "20.0 GiB",
        "4.0 TiB",
    ]


def limit_to(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("FAROUT_CACHE_LIMIT", f"{size}b")


def test_the_least_recently_used_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    stores = [write(tmp_path, range(256), kind) for kind in range(4)]
    for kind, store in enumerate(stores):
        age(files_of(store), 5000 - 1000 * kind)
    check(open_new(tmp_path, 0), range(3))  # the oldest is used again
    size = measure_cache(tmp_path)
    limit_to(monkeypatch, size + 5000)
    write(tmp_path, range(256), 5)
    assert [len(files_of(store)) for store in stores] == [1, 0, 1, 1]
    assert measure_cache(tmp_path) <= size + 5000
    (line,) = logged()
    assert "deleted 1 file(s)" in line
    assert "FAROUT_CACHE_LIMIT" in line
    check(open_new(tmp_path, 5), range(256))
    assert open_new(tmp_path, 1).read([hash_of(1)]) == {}


def test_files_in_use_are_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two runs that share a full cache would delete each other's features."""
    first, second = (write(tmp_path, range(256), kind) for kind in range(2))
    age(files_of(second), 5000)
    limit_to(monkeypatch, measure_cache(tmp_path))
    write(tmp_path, range(100), 2)
    assert (len(files_of(first)), len(files_of(second))) == (1, 0)
    with pytest.raises(CacheFullError, match="set FAROUT_CACHE_LIMIT to more"):
        write(tmp_path, range(256), 3)
    assert len(files_of(first)) == 1
    check(open_new(tmp_path, 2), range(100))


def test_a_run_of_many_images_stays_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(monkeypatch, 100_000)
    store = open_new(tmp_path)
    for start in range(0, 256 * 20, 256):
        store.add(rows_of(range(start, start + 256)))
        age(files_of(store), 5000 - start / 10)
        assert measure_cache(tmp_path) <= 100_000
    check(open_new(tmp_path), range(256 * 19, 256 * 20))


def test_files_of_wrong_clocks_and_killed_processes_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path, range(256))
    (file,) = files_of(store)
    age([file], -(10**7))
    remains = [store.folder / f".{number}.arrow.x" for number in range(2)]
    for path in remains:
        path.write_text("half a file")
    age(remains[:1], 10**6)
    make_room(tmp_path, 10**4, measure_cache(tmp_path))
    assert [path.exists() for path in [file, *remains]] == [False, False, True]


def test_features_of_older_versions_are_deleted_first_and_listed(tmp_path: Path) -> None:
    old = tmp_path / "features" / "00000000000000aa"
    old.mkdir(parents=True)
    np.save(old / "rows.npy", np.zeros(1000))
    (old / "settings.json").write_text('{"format": 3}')
    age([old / "rows.npy", old / "settings.json"], 10**5)
    store = write(tmp_path, range(256))
    kinds = {kind.folder: kind for kind in list_cached_features(tmp_path)}
    assert not kinds[old].is_readable
    assert kinds[old].mib > 0.007
    assert kinds[store.folder].is_readable
    make_room(tmp_path, 1000, measure_cache(tmp_path))
    assert not old.exists()
    check(open_new(tmp_path), range(256))


def test_clearing_what_was_not_used_for_days(tmp_path: Path) -> None:
    stores = [write(tmp_path, range(10 + kind), kind) for kind in range(2)]
    age([*files_of(stores[0]), stores[0].folder / "settings.json"], 40 * 86400)
    assert [kind.images for kind in clear_cache(None, tmp_path, unused_days=30)] == [10]
    assert [kind.images for kind in list_cached_features(tmp_path)] == [11]
    assert clear_cache(None, tmp_path, unused_days=30) == []
    with pytest.raises(StoreError, match="unused_days is -1"):
        clear_cache(None, tmp_path, unused_days=-1)
