"""A cache on disk for features of images, by image content, shared by all data sets, splits and detectors.

Each kind of features (weights, layers, preprocessing, precision, library versions) has a folder with files of up to 256
rows, each an image's content hash and its features. Files are written atomically and read memory-mapped, so that
features computed before an interruption are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, StoreError, UnreadableImageError
from farout.core.names import expand_path
from farout.data.batching import Batch, prefetch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing

__all__ = ["CachedFeatureSet", "FeatureCache", "cache_folder", "clear_cache", "list_cached_features"]

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the file layout, which is part of the folder's name."""
_ROWS_PER_FILE = 256
_SETTINGS_FILE = "settings.json"
_FOLDER_NAME = re.compile("[0-9a-f]{16}")
Compute = Callable[[Tensor], Tensor]
"""Prepared images (B, C, H, W) -> features (B, width)."""


def cache_folder() -> Path:
    """`$FAROUT_CACHE`, or `farout` in the user's cache folder.

    Raises StoreError if neither is known.
    """
    given = os.environ.get("FAROUT_CACHE")
    if given:
        return expand_path(given)
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    try:
        return expand_path(user_cache) / "farout"
    except FaroutError as error:
        raise StoreError("there is no home folder for the feature cache; set FAROUT_CACHE to a folder") from error


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclass(frozen=True)
class _LookUp:
    """Consecutive images of a source: their hashes (None: unreadable), and those that are not cached, preprocessed."""

    hashes: list[bytes | None]
    missing: list[tuple[bytes, Tensor]]


class FeatureCache:
    """The cache of one kind of features.

    If there is no folder, or it cannot be written, one warning is logged, and features are computed without being
    stored.

    Args:
        width: number of features per image.
        settings: all settings that decide the features, as JSON values.
        root: folder of the cache; None: `cache_folder()`.
        about: information for readers that does not decide the features, such as the origin of the weights.

    Attributes:
        hits: number of rows read instead of computed.
        failure: why rows could not be stored; empty if they were.
    """

    def __init__(
        self, width: int, settings: dict[str, Any], root: Path | None = None, about: dict[str, Any] | None = None
    ) -> None:
        versions = {name: store.versions()[name] for name in ("torch", "timm", "pillow")}
        all_settings = {"format": FORMAT, "width": width, "versions": versions, **settings}
        name = hashlib.sha256(json.dumps(all_settings, sort_keys=True).encode()).hexdigest()[:16]
        self.settings, self.hits, self.failure = {**all_settings, "about": about or {}}, 0, ""
        try:
            self.folder = (root or cache_folder()) / "features" / name
        except StoreError as error:  # no home folder, as in many containers
            self.folder, self.failure = Path(os.devnull, name), str(error)
            _warn_once(f"features are computed without being stored: {error}")
        self.type = np.dtype([("image", "S32"), ("features", "<f4", (width,)), ("check", "<u4")])
        self._index: dict[bytes, tuple[np.ndarray, int]] = {}
        self._read_files: set[str] = set()
        self._unwritten: dict[bytes, np.ndarray] = {}

    def _refresh(self) -> None:
        """Opens files written since the last call; skips damaged files and those of another layout."""
        try:
            paths = sorted(self.folder.glob("*.npy"))
        except OSError as error:
            _warn_once(f"the cache {self.folder} cannot be read ({error.strerror or error})")
            return
        for path in paths:
            if path.name not in self._read_files:
                self._read_files.add(path.name)
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            _warn_once(f"the cached features in {path} are ignored, the file may be deleted: {error}")
            return
        if rows.dtype != self.type or rows.ndim != 1:
            _warn_once(f"the cached features in {path} are ignored, the file may be deleted: it is of another layout")
            return
        self._index |= {image_hash: (rows, index) for index, image_hash in enumerate(rows["image"].tolist())}

    def batches(
        self, source: ImageSource, preprocessing: Preprocessing, size: int, workers: int, compute: Compute, chunk: int
    ) -> Iterator[Batch]:
        """Iterates over batches like `iterate_batches`, with `features` instead of pixels.

        Missing features are computed, `chunk` images per call, while threads read and preprocess the next images. An
        image that occurs twice is computed once. Calls follow the order of the source, so that a resumed run makes the
        same calls as an uninterrupted one.

        Args:
            source: the images.
            preprocessing: preprocessing of the images.
            size: number of images per batch.
            workers: number of threads.
            compute: preprocessed images (B, C, H, W) -> features (B, width).
            chunk: number of images per call of `compute`.
        """
        self._refresh()
        parts = [range(i, min(i + size, len(source))) for i in range(0, len(source), size)]
        spans = [part[i : i + chunk] for part in parts for i in range(0, len(part), chunk)]
        look_ups = prefetch([partial(self._look_up, source, preprocessing, span) for span in spans], workers)
        try:
            for part in parts:
                hashes, computed = self._compute_missing(islice(look_ups, -(-len(part) // chunk)), compute, chunk)
                yield self._assemble_batch(source, part, hashes, computed, preprocessing)
        finally:
            self.flush()

    def _look_up(self, source: ImageSource, preprocessing: Preprocessing, span: range) -> _LookUp:
        hashes: list[bytes | None] = []
        missing: list[tuple[bytes, Tensor]] = []
        for index in span:
            try:
                pixels = None if source.variant is None else source[index]
                image_hash = source.identity(index, pixels).encode()
                if not self._is_stored(image_hash):
                    missing.append((image_hash, preprocessing(source[index] if pixels is None else pixels)))
                hashes.append(image_hash)
            except UnreadableImageError:
                if source.policy == "raise":
                    raise
                hashes.append(None)  # the source lists it with the reason
        return _LookUp(hashes, missing)

    def _is_stored(self, image_hash: bytes) -> bool:
        """Whether an intact row of an image is stored; a damaged one is forgotten, so that it is computed again."""
        if image_hash not in self._index:
            return False
        rows, index = self._index[image_hash]
        row = rows[index]
        if _checksum(image_hash, row["features"]) == row["check"]:
            return True
        _warn_once(f"a row of the cached features in {self.folder} is damaged and computed again")
        self._index.pop(image_hash, None)
        return False

    def _compute_missing(
        self, look_ups: Iterator[_LookUp], compute: Compute, chunk: int
    ) -> tuple[list[bytes | None], dict[bytes, np.ndarray]]:
        """Hashes of all images, and the features computed here by hash, which are stored in the cache."""
        hashes: list[bytes | None] = []
        computed: dict[bytes, np.ndarray] = {}
        waiting: dict[bytes, Tensor] = {}

        for look_up in chain(look_ups, [None]):
            for image_hash, image in look_up.missing if look_up else []:
                # checked again, because a thread may have looked it up before an equal image was computed
                if not any(image_hash in known for known in (self._index, self._unwritten, computed)):
                    waiting.setdefault(image_hash, image)
            hashes += look_up.hashes if look_up else []
            while len(waiting) >= chunk or (waiting and look_up is None):
                next_hashes = list(waiting)[:chunk]
                features = compute(torch.stack([waiting.pop(image_hash) for image_hash in next_hashes])).cpu().numpy()
                rows = dict(zip(next_hashes, features, strict=True))
                computed |= rows
                self._store(rows)
        return hashes, computed

    def _assemble_batch(
        self,
        source: ImageSource,
        part: range,
        hashes: list[bytes | None],
        computed: dict[bytes, np.ndarray],
        preprocessing: Preprocessing,
    ) -> Batch:
        found = [(index, image_hash) for index, image_hash in zip(part, hashes, strict=True) if image_hash is not None]
        rows = [computed[image_hash] if image_hash in computed else self._read(image_hash) for _, image_hash in found]
        features = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *self.type["features"].shape)
        readable = tuple(index for index, _ in found)
        labels = None if source.labels is None else torch.tensor([source.labels[i] for i in readable]).long()
        empty = torch.empty(0, preprocessing.channels, *preprocessing.size)
        identities = tuple(image_hash.decode() for _, image_hash in found)
        return Batch(tuple(source.keys[i] for i in readable), empty, labels, readable, features, identities)

    def _read(self, image_hash: bytes) -> np.ndarray:
        self.hits += 1
        if image_hash in self._unwritten:
            return self._unwritten[image_hash]
        rows, index = self._index[image_hash]
        return np.array(rows[index]["features"])

    def _store(self, rows: dict[bytes, np.ndarray]) -> None:
        # rows with NaN are not stored
        self._unwritten |= {image_hash: row for image_hash, row in rows.items() if np.isfinite(row).all()}
        if len(self._unwritten) >= _ROWS_PER_FILE:
            self.flush()

    def create_folder(self) -> None:
        """Creates the folder; raises StoreError if it cannot be written, before any features are computed."""
        if self.failure:
            raise StoreError(self.failure)
        try:
            self._write_settings()
        except OSError as error:
            reason = f"the cache {self.folder} cannot be written ({error.strerror or error})"
            raise StoreError(f"{reason}; set FAROUT_CACHE to another folder") from error

    def flush(self) -> None:
        """Writes the rows that are not on disk yet; an error is stored in `failure`."""
        rows, self._unwritten = list(self._unwritten.items()), {}
        if not rows or self.failure:
            return
        try:
            checked = [(image, features, _checksum(image, features)) for image, features in rows]
            path = self._write(np.array(checked, dtype=self.type))
        except OSError as error:
            self.failure = f"{self.folder} cannot be written ({error.strerror or error})"
            _warn_once(
                f"features are computed without being stored: {self.failure}; set FAROUT_CACHE to another folder"
            )
            return
        self._read_files.add(path.name)
        self._open(path)

    def _write_settings(self) -> None:
        if not (self.folder / _SETTINGS_FILE).is_file():
            store.write_json(self.folder / _SETTINGS_FILE, self.settings)

    def _write(self, rows: np.ndarray) -> Path:
        self._write_settings()
        path = self.folder / f"{uuid.uuid4().hex}.npy"
        with store.atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        return path


def _checksum(image_hash: bytes, features: np.ndarray) -> int:
    """CRC-32 of a row; a flipped bit on the disk would otherwise become part of scores."""
    return zlib.crc32(np.asarray(features, dtype="<f4").tobytes(), zlib.crc32(image_hash))


@dataclass(frozen=True)
class CachedFeatureSet:
    """One folder of the cache: its settings, number of images and size in MiB."""

    folder: Path
    settings: dict[str, Any]
    images: int
    mib: float


def list_cached_features(root: Path | None = None) -> list[CachedFeatureSet]:
    """The contents of the cache, one entry per kind of features."""
    found = []
    for folder in sorted(((root or cache_folder()) / "features").glob("*/")):
        if not _FOLDER_NAME.fullmatch(folder.name):
            continue  # not a folder of the cache
        files = list(folder.glob("*.npy"))
        try:
            settings = store.read_json(folder / _SETTINGS_FILE)
        except (StoreError, OSError):
            settings = {}
        images, size = sum(_count_rows(file) for file in files), sum(file.stat().st_size for file in files)
        found.append(CachedFeatureSet(folder, settings, images, size / 2**20))
    return found


def _count_rows(file: Path) -> int:
    """Number of rows of a file; 0 if it is damaged."""
    try:
        return len(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError, TypeError):
        return 0


def clear_cache(name: str | None = None, root: Path | None = None) -> list[CachedFeatureSet]:
    """Removes one kind of features by the name of its folder, or all; returns the removed ones.

    Raises StoreError for an unknown name.
    """
    kinds = [kind for kind in list_cached_features(root) if name in (None, kind.folder.name)]
    if name is not None and not kinds:
        raise StoreError(f"the cache in {root or cache_folder()} has no features {name!r}; see `farout features list`")
    for kind in kinds:
        shutil.rmtree(kind.folder)
    return kinds
