"""Cached features of one kind: look-up by content hash in all files of a folder, and writing.

A process has one `FeatureStore` per kind of features, so that the index of a large cache is loaded once. Rows are
written in files of 256; whenever there are 16 files of a similar size, they are merged into one, up to 64 MiB. A
million images with 1,000 features each are then in about 100 files.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from farout.core import store
from farout.core.errors import StoreError
from farout.features.cache_folder import (
    SETTINGS_FILE,
    CacheFullError,
    cache_limit,
    lock_cache,
    make_room,
    warn_once,
)
from farout.features.feature_files import (
    HASH_BYTES,
    SUFFIX,
    Array,
    FeatureFile,
    open_feature_file,
    row_bytes,
    write_feature_file,
)
from farout.features.feature_index import FeatureIndex, split_hashes

__all__ = ["FeatureStore", "open_store"]

logger = logging.getLogger(__name__)

_ROWS_PER_WRITE = 256
_MAX_SMALL_WRITES = 8
"""A process writes fewer rows than 256 at once this number of times; after that, they wait for others."""
_FILES_PER_MERGE = 16
_LARGEST_FILE = 64 * 2**20
_TOUCH_SECONDS = 60
_MAX_OPEN_STORES = 8


class FeatureStore:
    """The stored rows of one kind of features; threads may share it.

    Args:
        folder: the folder of this kind of features in the cache.
        width: number of features per image.
        settings: content of `settings.json`.
    """

    def __init__(self, folder: Path, width: int, settings: Mapping[str, Any]) -> None:
        self.folder, self._width, self._settings = folder, width, settings
        # both are replaced and never changed, so that readers need no lock
        self._files: dict[str, FeatureFile] = {}
        self._indexes: tuple[FeatureIndex, ...] = ()  # of all files, the larger ones first
        self._damaged: set[str] = set()
        self._used_at: dict[str, float] = {}
        self._unwritten: dict[bytes, Array] = {}
        self._small_writes = 0
        self._room = 0  # bytes that may be written before the size of the cache is measured again
        self._lock = threading.RLock()

    # -- reading ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Loads the index of files that other processes wrote, and forgets deleted ones."""
        self._load_new_files()
        self._merge_files()

    def _load_new_files(self) -> None:
        with self._lock:  # also while listing: another thread may write a file at this moment
            try:
                names = {name for name in os.listdir(self.folder) if name.endswith(SUFFIX) and not name.startswith(".")}
            except (FileNotFoundError, NotADirectoryError):
                names = set()
            except OSError as error:
                warn_once(f"the cache {self.folder} cannot be read ({error.strerror or error})")
                return
            opened, gone = [], self._files.keys() - names
            for name in sorted(names - self._files.keys() - self._damaged):
                path = self.folder / name
                try:
                    opened.append(open_feature_file(path, self._width))
                except FileNotFoundError:
                    continue  # merged or deleted by another process
                except (OSError, StoreError) as error:
                    self._damaged.add(name)
                    warn_once(f"the cached features in {path} are ignored, the file may be deleted: {error}")
            self._remember(opened)
            self._forget(gone)

    def _remember(self, opened: Sequence[tuple[FeatureFile, Array, Array]]) -> None:
        """Adds files to the index, of which there is one part per factor of four in size, so that adding is fast."""
        if not opened:
            return
        added = FeatureIndex.join([FeatureIndex.from_file(*each) for each in opened])
        indexes = [*self._indexes, added]
        while len(indexes) > 1 and len(indexes[-2]) < 4 * len(indexes[-1]):
            indexes[-2:] = [FeatureIndex.join(indexes[-2:])]
        self._indexes = tuple(indexes)
        self._files = self._files | {file.path.name: file for file in added.files}

    def _forget(self, names: Set[str]) -> None:
        """Removes files from the index."""
        if names:
            paths = {self.folder / name for name in names}
            self._files = {name: file for name, file in self._files.items() if name not in names}
            self._indexes = tuple(part for part in (index.without(paths) for index in self._indexes) if len(part))

    def read(self, image_hashes: Sequence[bytes]) -> dict[bytes, Array]:
        """The features (width,) of those images that are stored, by content hash (16 bytes); damaged rows are not."""
        found: dict[bytes, Array] = {}
        for image_hash in image_hashes:
            row = self._unwritten.get(image_hash)
            if row is not None:
                found[image_hash] = row
        missing = [image_hash for image_hash in image_hashes if image_hash not in found]
        for _ in range(3):
            if not missing or self._read_files(missing, found):
                break
            self._load_new_files()  # a file was deleted, and its rows may be in a merged one
            missing = [image_hash for image_hash in missing if image_hash not in found]
        return found

    def _read_files(self, image_hashes: Sequence[bytes], found: dict[bytes, Array]) -> bool:
        """Adds the features of these images to `found`; returns False if a file was deleted meanwhile."""
        places: dict[bytes, list[tuple[str, int, int, FeatureFile]]] = {}
        hashes = split_hashes(b"".join(image_hashes))
        for index in self._indexes:
            for number, file, row, check in index.find(hashes):
                places.setdefault(image_hashes[number], []).append((file.path.name, row, check, file))
        damaged, is_complete = set[bytes](), True
        while places:
            rows: dict[FeatureFile, list[tuple[int, bytes, int]]] = {}
            for image_hash, choices in places.items():
                # names start with the time, so that of several rows, which differ by rounding, the first one is used
                first = min(choices, key=lambda choice: choice[:2])
                choices.remove(first)
                rows.setdefault(first[3], []).append((first[1], image_hash, first[2]))
            for file, requested in rows.items():
                try:
                    for image_hash, features in file.read(requested):
                        if features is None:
                            damaged.add(image_hash)
                        else:
                            found[image_hash] = features
                    self._record_use(file)
                except FileNotFoundError:
                    is_complete = False
                except OSError as error:
                    warn_once(f"the cached features in {file.path} are not used: {error.strerror or error}")
            places = {each: choices for each, choices in places.items() if choices and each not in found}
        if damaged - found.keys():
            warn_once(f"a row of the cached features in {self.folder} is damaged and computed again")
        return is_complete

    def _record_use(self, file: FeatureFile) -> None:
        now = time.time()
        if now - self._used_at.get(file.path.name, 0.0) > _TOUCH_SECONDS:
            self._used_at[file.path.name] = now
            with suppress(OSError):  # another user's file, or deleted
                os.utime(file.path)

    # -- writing ------------------------------------------------------------------------------------------------------

    def create_folder(self) -> None:
        """Creates the folder with its settings; raises OSError if it cannot be written."""
        if not (self.folder / SETTINGS_FILE).is_file():
            store.write_json(self.folder / SETTINGS_FILE, self._settings)

    def add(self, rows: Mapping[bytes, Array]) -> None:
        """Adds rows, which can be read at once, and are written when there are 256 of them.

        Raises OSError or CacheFullError as `flush` does.
        """
        with self._lock:
            self._unwritten |= rows
            if len(self._unwritten) >= _ROWS_PER_WRITE:
                self.flush()

    def flush(self, *, may_wait: bool = False) -> None:
        """Writes the rows that are not on disk yet; they are lost if that is impossible.

        Args:
            may_wait: a service that is asked for few images at a time would write a file for each request; its rows
                wait for others, or for the end of the process.

        Raises:
            OSError: the folder cannot be written.
            CacheFullError: the cache has reached its size limit, and all its files are in use.
        """
        with self._lock:
            if not self._unwritten:
                return
            if len(self._unwritten) < _ROWS_PER_WRITE:
                if may_wait and self._small_writes >= _MAX_SMALL_WRITES:
                    return
                self._small_writes += 1
            try:
                self._write(list(self._unwritten), np.stack(list(self._unwritten.values())))
            finally:
                self._unwritten = {}
            self._merge_files()

    def _write(self, image_hashes: Sequence[bytes], features: Array) -> None:
        size = row_bytes(self._width) * len(image_hashes) + 2048  # the schema
        path = self.folder / f"{time.time_ns():016x}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        for attempt in range(2):
            try:
                self.create_folder()
                if self._room < size:
                    self._room = make_room(self.folder.parents[1], size, cache_limit())
                write_feature_file(path, image_hashes, features)
                break
            except OSError as error:
                if error.errno != errno.ENOENT or attempt:  # another process removed the folder
                    raise
        self._room -= size
        try:
            self._remember([open_feature_file(path, self._width)])
        except (FileNotFoundError, StoreError):  # merged by another process
            self._load_new_files()

    def _merge_files(self) -> None:
        """Merges files of similar sizes, unless another process does so now, or the folder cannot be written."""
        if not self._choose_files() or not os.access(self.folder, os.W_OK):
            return
        with self._lock, lock_cache(self.folder.parents[1]) as is_locked:
            if not is_locked:
                return
            self._load_new_files()
            while files := self._choose_files():
                try:
                    self._merge(files)
                except (OSError, StoreError):  # deleted by another process, or damaged, or the disk is full
                    self._load_new_files()
                    return
                if any(file.path.name in self._files for file in files):  # Windows does not delete open files
                    return

    def _choose_files(self) -> list[FeatureFile]:
        """Files to merge: 16 or more with up to 7 rows, 8 to 127, 128 to 2047 and so on, or enough for a large file."""
        limit = cache_limit()
        largest_size = _LARGEST_FILE if limit is None else min(_LARGEST_FILE, limit // 16)  # whole files are deleted
        largest = max(_ROWS_PER_WRITE, largest_size // row_bytes(self._width))
        groups: dict[int, list[FeatureFile]] = {}
        for _, file in sorted(self._files.items()):
            if file.rows < largest // 2:
                groups.setdefault(file.rows.bit_length() // 4, []).append(file)
        for _, group in sorted(groups.items()):
            if len(group) >= _FILES_PER_MERGE or (len(group) > 1 and sum(file.rows for file in group) >= largest):
                chosen: list[FeatureFile] = []
                for file in group:
                    if sum(each.rows for each in chosen) < largest:
                        chosen.append(file)
                return chosen
        return []

    def _merge(self, files: Sequence[FeatureFile]) -> None:
        """Writes the intact rows of these files that no other file has to one file, and deletes these files."""
        paths = {file.path for file in files}
        rows: dict[bytes, Array] = {}
        for file in files:
            opened, hashes, checks = open_feature_file(file.path, self._width)
            content = hashes.tobytes()
            image_hashes = [content[start : start + HASH_BYTES] for start in range(0, len(content), HASH_BYTES)]
            stored = {
                number
                for index in self._indexes
                for number, other, _, _ in index.find(split_hashes(hashes))
                if other.path not in paths
            }
            new_rows = [
                (row, image_hash, check)
                for row, (image_hash, check) in enumerate(zip(image_hashes, checks.tolist(), strict=True))
                if row not in stored and image_hash not in rows
            ]
            for image_hash, features in opened.read(new_rows):
                if features is not None:
                    rows.setdefault(image_hash, features)
        merged = []
        if rows:
            first = files[0].path.name.partition("-")[0]  # the time, by which files are ordered
            path = self.folder / f"{first}-{uuid.uuid4().hex[:12]}{SUFFIX}"
            last_used = max(path.stat().st_mtime for path in paths)
            write_feature_file(path, list(rows), np.stack(list(rows.values())), last_used)
            merged = [open_feature_file(path, self._width)]
        for file in files:
            with suppress(OSError):
                file.path.unlink()
        self._remember(merged)
        self._forget({file.path.name for file in files if not file.path.exists()})


_stores: dict[Path, FeatureStore] = {}
_stores_lock = threading.Lock()


def open_store(folder: Path, width: int, settings: Mapping[str, Any]) -> FeatureStore:
    """The store of this process for a kind of features; the last eight that were opened stay in memory."""
    with _stores_lock:
        opened = _stores.pop(folder, None) or FeatureStore(folder, width, settings)
        _stores[folder] = opened
        oldest = _stores.pop(next(iter(_stores))) if len(_stores) > _MAX_OPEN_STORES else None
    if oldest is not None:
        _flush_last(oldest)
    return opened


def _flush_last(opened: FeatureStore) -> None:
    try:
        opened.flush()
    except (OSError, CacheFullError) as error:
        warn_once(f"features are computed without being stored: {error}")


if hasattr(os, "register_at_fork"):  # a forked process must not write the rows of its parent once more
    os.register_at_fork(after_in_child=_stores.clear)


@atexit.register
def _flush_stores() -> None:
    for opened in list(_stores.values()):
        _flush_last(opened)
