"""Features of images, computed once and kept on disk by content: whichever set, split or detector asks again.

One folder per kind of features (weights, taps, preprocessing, precision, versions) holds files of up to 256 rows, each
an image's content hash and its features. A file appears whole or not at all, and is read memory-mapped; what was
computed before an interruption is there afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
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
from farout.core.errors import StoreError, UnreadableImageError
from farout.data.batching import Batch, prefetch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing

__all__ = ["CachedFeatureSet", "FeatureCache", "cache_folder", "clear_cache", "list_cached_features"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the files' layout; another one is another folder."""
_BLOCK = 256
_SETTINGS = "settings.json"
_NAME = re.compile("[0-9a-f]{16}")
Compute = Callable[[Tensor], Tensor]
"""Prepared images (B, C, H, W) -> features (B, width)."""


def cache_folder() -> Path:
    """`$FAROUT_CACHE`, else `farout` in the user's cache folder.

    Raises StoreError where neither is known.
    """
    given = os.environ.get("FAROUT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(given).expanduser() if given else Path(home or Path.home() / ".cache") / "farout"
    except RuntimeError as error:
        raise StoreError("there is no home folder to keep features in; set FAROUT_CACHE to a folder") from error


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclass(frozen=True)
class _Piece:
    """Some neighbours of a source: who they are (None: unreadable), and the prepared images of those not cached."""

    names: list[bytes | None]
    lacking: list[tuple[bytes, Tensor]]


class FeatureCache:
    """The rows of one kind of features.

    A folder that cannot be written is said once in the log; features are then computed and not kept.

    Args:
        width: features of an image.
        settings: all that decides them but the image; JSON values.
        root: None: `cache_folder()`.
        about: what a reader wants to know and what decides nothing, such as where weights came from.

    Attributes:
        hits: rows read so far instead of computed.
        failure: why rows could not be kept; empty where they were.
    """

    def __init__(
        self, width: int, settings: dict[str, Any], root: Path | None = None, about: dict[str, Any] | None = None
    ) -> None:
        versions = {name: store.versions()[name] for name in ("torch", "timm", "pillow")}
        whole = {"format": FORMAT, "width": width, "versions": versions, **settings}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = (root or cache_folder()) / "features" / name
        self.type = np.dtype([("image", "S32"), ("features", "<f4", (width,))])
        self.settings, self.hits, self.failure = {**whole, "about": about or {}}, 0, ""
        self._index: dict[bytes, tuple[np.ndarray, int]] = {}
        self._seen: set[str] = set()
        self._new: dict[bytes, np.ndarray] = {}

    def _refresh(self) -> None:
        """Learns of files written since; one that is damaged or of another layout is passed over."""
        try:
            paths = sorted(self.folder.glob("*.npy"))
        except OSError as error:
            _warn_once(f"the cache {self.folder} cannot be read ({error.strerror or error})")
            return
        for path in paths:
            if path.name not in self._seen:
                self._seen.add(path.name)
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
        self._index |= {name: (rows, place) for place, name in enumerate(rows["image"].tolist())}

    def batches(
        self, source: ImageSource, preprocessing: Preprocessing, size: int, workers: int, compute: Compute, chunk: int
    ) -> Iterator[Batch]:
        """As `iterate_batches`, with `features` in place of the images, which stay empty; what the cache lacks is
        computed, `chunk` images a call, while `workers` threads read and prepare the next ones.

        An image that occurs twice is computed once. Calls follow the order of the source, so that a run that was
        killed, and finds the features of its first calls on disk, makes the same calls for the rest.
        """
        self._refresh()
        parts = [range(i, min(i + size, len(source))) for i in range(0, len(source), size)]
        spans = [part[i : i + chunk] for part in parts for i in range(0, len(part), chunk)]
        pieces = prefetch([partial(self._look_up, source, preprocessing, span) for span in spans], workers)
        try:
            for part in parts:
                names, fresh = self._computed(islice(pieces, -(-len(part) // chunk)), compute, chunk)
                yield self._assembled(source, part, names, fresh, preprocessing)
        finally:
            self.flush()

    def _look_up(self, source: ImageSource, preprocessing: Preprocessing, span: range) -> _Piece:
        names: list[bytes | None] = []
        lacking: list[tuple[bytes, Tensor]] = []
        for index in span:
            try:
                pixels = None if source.variant is None else source[index]
                name = source.identity(index, pixels).encode()
                if name not in self._index:
                    lacking.append((name, preprocessing(source[index] if pixels is None else pixels)))
                names.append(name)
            except UnreadableImageError:
                if source.policy == "raise":
                    raise
                names.append(None)  # the source lists it by key and reason
        return _Piece(names, lacking)

    def _computed(
        self, pieces: Iterator[_Piece], compute: Compute, chunk: int
    ) -> tuple[list[bytes | None], dict[bytes, np.ndarray]]:
        """Names of all images, and the features computed here by name, which are kept at once."""
        names: list[bytes | None] = []
        fresh: dict[bytes, np.ndarray] = {}
        waiting: dict[bytes, Tensor] = {}

        for piece in chain(pieces, [None]):
            for name, image in piece.lacking if piece else []:
                # looked up again here: the threads may have looked before an equal image was computed
                if name not in self._index and name not in self._new and name not in fresh:
                    waiting.setdefault(name, image)
            names += piece.names if piece else []
            while len(waiting) >= chunk or (waiting and piece is None):
                some = list(waiting)[:chunk]
                found = compute(torch.stack([waiting.pop(name) for name in some])).cpu().numpy()
                fresh |= dict(zip(some, found, strict=True))
                self._keep(dict(zip(some, found, strict=True)))
        return names, fresh

    def _assembled(
        self,
        source: ImageSource,
        part: range,
        names: list[bytes | None],
        fresh: dict[bytes, np.ndarray],
        preprocessing: Preprocessing,
    ) -> Batch:
        named = [(index, name) for index, name in zip(part, names, strict=True) if name is not None]
        rows = [fresh[name] if name in fresh else self._read(name) for _, name in named]
        features = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *self.type["features"].shape)
        readable = tuple(index for index, _ in named)
        labels = None if source.labels is None else torch.tensor([source.labels[i] for i in readable]).long()
        empty = torch.empty(0, preprocessing.channels, *preprocessing.size)
        identities = tuple(name.decode() for _, name in named)
        return Batch(tuple(source.keys[i] for i in readable), empty, labels, readable, features, identities)

    def _read(self, name: bytes) -> np.ndarray:
        self.hits += 1
        if name in self._new:
            return self._new[name]
        rows, place = self._index[name]
        return np.array(rows[place]["features"])

    def _keep(self, rows: dict[bytes, np.ndarray]) -> None:
        # what is not a number is not worth keeping
        self._new |= {name: row for name, row in rows.items() if np.isfinite(row).all()}
        if len(self._new) >= _BLOCK:
            self.flush()

    def claim(self) -> None:
        """Makes the folder, so that one that cannot be written is known before the work; raises StoreError."""
        try:
            self._describe()
        except OSError as error:
            reason = f"the cache {self.folder} cannot be written ({error.strerror or error})"
            raise StoreError(f"{reason}; set FAROUT_CACHE to another folder") from error

    def flush(self) -> None:
        """Writes the rows that are not on disk yet; see `failure`."""
        rows, self._new = list(self._new.items()), {}
        if not rows or self.failure:
            return
        try:
            path = self._write(np.array(rows, dtype=self.type))
        except OSError as error:
            self.failure = f"{self.folder} cannot be written ({error.strerror or error})"
            _warn_once(f"features are computed and not kept: {self.failure}; set FAROUT_CACHE to another folder")
            return
        self._seen.add(path.name)
        self._open(path)

    def _describe(self) -> None:
        if not (self.folder / _SETTINGS).is_file():
            store.write_json(self.folder / _SETTINGS, self.settings)

    def _write(self, rows: np.ndarray) -> Path:
        self._describe()
        path = self.folder / f"{uuid.uuid4().hex}.npy"
        with store.atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        return path


@dataclass(frozen=True)
class CachedFeatureSet:
    """One folder of the cache: what its features are, how many images, and how many MiB."""

    folder: Path
    settings: dict[str, Any]
    images: int
    mib: float


def list_cached_features(root: Path | None = None) -> list[CachedFeatureSet]:
    """What the cache holds, one entry per kind of features."""
    found = []
    for folder in sorted(((root or cache_folder()) / "features").glob("*/")):
        if not _NAME.fullmatch(folder.name):
            continue  # somebody else's
        files = list(folder.glob("*.npy"))
        try:
            settings = store.read_json(folder / _SETTINGS)
        except (StoreError, OSError):
            settings = {}
        images, size = sum(_count(file) for file in files), sum(file.stat().st_size for file in files)
        found.append(CachedFeatureSet(folder, settings, images, size / 2**20))
    return found


def _count(file: Path) -> int:
    """Rows of a file; 0 of a damaged one."""
    try:
        return len(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError, TypeError):
        return 0


def clear_cache(name: str | None = None, root: Path | None = None) -> list[CachedFeatureSet]:
    """Removes one kind of features by its folder's name, or all; returns what was removed.

    Raises StoreError for a name that is not there.
    """
    kinds = [kind for kind in list_cached_features(root) if name in (None, kind.folder.name)]
    if name is not None and not kinds:
        raise StoreError(
            f"the cache in {root or cache_folder()} holds no features {name!r}; see `farout features list`"
        )
    for kind in kinds:
        shutil.rmtree(kind.folder)
    return kinds
