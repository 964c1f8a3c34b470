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
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farout import store
from farout.errors import StoreError, UnreadableImageError
from farout.images.batching import ahead
from farout.images.decoding import content_hash
from farout.images.preprocessing import Preprocessing
from farout.images.sources import Batch, ImageSource, batches

__all__ = ["CachedKind", "FeatureCache", "cache_folder", "cached_kinds", "clear"]

logger = logging.getLogger(__name__)

FORMAT = 1
_BLOCK = 256
_SETTINGS = "settings.json"
Compute = Callable[[Tensor], Tensor]
"""Prepared images (B, C, H, W) -> features (B, width)."""


def cache_folder() -> Path:
    """`$FAROUT_CACHE`, else `farout` in the user's cache folder."""
    given = os.environ.get("FAROUT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "farout"


class FeatureCache:
    """The rows of one kind of features.

    Args:
        width: features of an image.
        settings: all that decides them but the image; JSON values.
        root: None: `cache_folder()`.

    Attributes:
        hits: rows read so far instead of computed.
    """

    def __init__(self, width: int, settings: dict[str, Any], root: Path | None = None) -> None:
        versions = {name: store.versions()[name] for name in ("torch", "timm", "pillow")}
        whole = {"format": FORMAT, "width": width, "versions": versions, **settings}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = (root or cache_folder()) / "features" / name
        self.type = np.dtype([("image", "S32"), ("features", "<f4", (width,))])
        self.settings, self.hits = whole, 0
        self._index: dict[bytes, tuple[np.ndarray, int]] = {}
        self._seen: set[str] = set()
        self._new: list[tuple[bytes, np.ndarray]] = []

    def _refresh(self) -> None:
        """Learns of files written since; one that is damaged or of another layout is passed over."""
        for path in sorted(self.folder.glob("*.npy")):
            if path.name not in self._seen:
                self._seen.add(path.name)
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            logger.warning("the cached features in %s are ignored: %s", path, error)
            return
        if rows.dtype != self.type or rows.ndim != 1:
            logger.warning("the cached features in %s are ignored: they are of another layout", path)
            return
        self._index |= {name: (rows, place) for place, name in enumerate(rows["image"].tolist())}

    def batches(
        self, source: ImageSource, preprocessing: Preprocessing, size: int, workers: int, compute: Compute, rows: int
    ) -> Iterator[Batch]:
        """As `farout.images.batches`, with `features` in place of the images, which stay empty; what the cache lacks is
        computed, `rows` images a call.
        """
        self._refresh()
        parts = [source.subset(range(i, min(i + size, len(source)))) for i in range(0, len(source), size)]
        loads: list[Callable[[], list[bytes | None]]] = [partial(_identities, part) for part in parts]
        try:
            for number, names in enumerate(ahead(loads, workers)):
                part = parts[number]
                lacking = [index for index, name in enumerate(names) if name is not None and name not in self._index]
                fresh: dict[int, np.ndarray] = {}
                for batch in batches(part.subset(lacking), preprocessing, rows, workers=workers) if lacking else ():
                    found = compute(batch.images).cpu().numpy()
                    fresh |= {lacking[index]: row for index, row in zip(batch.indices, found, strict=True)}
                yield self._assembled(part, number * size, names, fresh, preprocessing)
                self._keep([(names[index], row) for index, row in fresh.items()])
        finally:
            self.flush()

    def _assembled(
        self,
        part: ImageSource,
        start: int,
        names: list[bytes | None],
        fresh: dict[int, np.ndarray],
        preprocessing: Preprocessing,
    ) -> Batch:
        readable = [index for index, name in enumerate(names) if name is not None]
        rows = [fresh[index] if index in fresh else self._read(names[index]) for index in readable]
        features = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *self.type["features"].shape)
        labels = None if part.labels is None else torch.tensor([part.labels[i] for i in readable], dtype=torch.int64)
        empty = torch.empty(0, preprocessing.channels, *preprocessing.size)
        keys = tuple(part.keys[i] for i in readable)
        return Batch(keys, empty, labels, tuple(start + i for i in readable), features)

    def _read(self, name: bytes | None) -> np.ndarray:
        assert name is not None
        rows, place = self._index[name]
        self.hits += 1
        return np.array(rows[place]["features"])

    def _keep(self, rows: Sequence[tuple[bytes | None, np.ndarray]]) -> None:
        # what is not a number is not worth keeping
        self._new += [(name, row) for name, row in rows if name is not None and np.isfinite(row).all()]
        if len(self._new) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are not on disk yet."""
        if not self._new:
            return
        rows, self._new = np.array(self._new, dtype=self.type), []
        if not (self.folder / _SETTINGS).is_file():
            store.write_json(self.folder / _SETTINGS, self.settings)
        path = self.folder / f"{uuid.uuid4().hex}.npy"
        with store.atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        self._seen.add(path.name)
        self._open(path)


def _identities(source: ImageSource) -> list[bytes | None]:
    return [_identity(source, index) for index in range(len(source))]


def _identity(source: ImageSource, index: int) -> bytes | None:
    """Content hash of the pixels that are preprocessed, the variant applied; None for an unreadable image."""
    try:
        name = source.content_hash(index) if source.variant is None else content_hash(source[index])
    except UnreadableImageError:
        if source.policy == "raise":
            raise
        return None  # the source lists it by key and reason
    return name.encode()


@dataclass(frozen=True)
class CachedKind:
    """One folder of the cache: what its features are, how many images, and how many MiB."""

    folder: Path
    settings: dict[str, Any]
    images: int
    mib: float


def cached_kinds(root: Path | None = None) -> list[CachedKind]:
    """What the cache holds, one entry per kind of features."""
    found = []
    for folder in sorted(((root or cache_folder()) / "features").glob("*/")):
        files = list(folder.glob("*.npy"))
        try:
            settings = store.read_json(folder / _SETTINGS)
            count = sum(len(np.load(file, mmap_mode="r", allow_pickle=False)) for file in files)
        except (StoreError, ValueError, OSError, EOFError):
            settings, count = {}, 0
        found.append(CachedKind(folder, settings, count, sum(file.stat().st_size for file in files) / 2**20))
    return found


def clear(name: str | None = None, root: Path | None = None) -> list[CachedKind]:
    """Removes one kind of features by its folder's name, or all; returns what was removed.

    Raises StoreError for a name that is not there.
    """
    kinds = [kind for kind in cached_kinds(root) if name in (None, kind.folder.name)]
    if name is not None and not kinds:
        raise StoreError(
            f"the cache in {root or cache_folder()} holds no features {name!r}; see `farout features list`"
        )
    for kind in kinds:
        shutil.rmtree(kind.folder)
    return kinds
