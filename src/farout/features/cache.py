"""A cache on disk for features of images, by image content, shared by all data sets, splits and detectors.

`farout.features.feature_store` has the rows of one kind of features (weights, layers, preprocessing, precision, library
versions), `farout.features.cache_folder` the folder of all kinds and its size limit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import StoreError, UnreadableImageError
from farout.core.profiling import timed
from farout.data.batching import Batch, prefetch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.features.cache_folder import CacheFullError, cache_folder, cache_limit, format_size, warn_once
from farout.features.feature_files import FORMAT, Array, row_bytes
from farout.features.feature_store import open_store
from farout.features.known_images import KnownImages

__all__ = ["FeatureCache"]

_ADVICE = "set FAROUT_CACHE to another folder"
Compute = Callable[[Tensor], Tensor]
"""Prepared images (B, C, H, W) -> features (B, width)."""


@dataclass(frozen=True)
class _LookUp:
    """Consecutive images of a source.

    Attributes:
        hashes: their content hashes; None: unreadable.
        stored: features of those that are cached.
        missing: content hash and preprocessed image of those that are not.
    """

    hashes: list[bytes | None]
    stored: dict[bytes, Array]
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

    Raises:
        StoreError: `FAROUT_CACHE_LIMIT` is not a size.
    """

    def __init__(
        self, width: int, settings: dict[str, Any], root: Path | None = None, about: dict[str, Any] | None = None
    ) -> None:
        versions = {name: store.versions()[name] for name in ("torch", "timm", "pillow")}
        all_settings = {"format": FORMAT, "width": width, "versions": versions, **settings}
        name = hashlib.sha256(json.dumps(all_settings, sort_keys=True).encode()).hexdigest()[:16]
        self.settings, self.hits, self.failure = {**all_settings, "about": about or {}}, 0, ""
        self.width, self.limit = width, cache_limit()
        try:
            self.folder = (root or cache_folder()) / "features" / name
        except StoreError as error:  # no home folder, as in many containers
            self.folder, self.failure = Path(os.devnull, name), str(error)
            warn_once(f"features are computed without being stored: {error}")
        self._store = open_store(self.folder, width, self.settings)
        self._known_images = KnownImages(root)

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
        parts = [range(i, min(i + size, len(source))) for i in range(0, len(source), size)]
        spans = [part[i : i + chunk] for part in parts for i in range(0, len(part), chunk)]
        look_ups = prefetch([partial(self._look_up, source, preprocessing, span) for span in spans], workers)
        with self.in_use():
            for part in parts:
                hashes, computed = self._compute_missing(islice(look_ups, -(-len(part) // chunk)), compute, chunk)
                yield self._assemble_batch(source, part, hashes, computed, preprocessing)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Find the rows that others have stored meanwhile, and at the end write those that were added."""
        self._store.refresh()
        try:
            with self._known_images.in_use():
                yield
        finally:
            self._write(partial(self._store.flush, may_wait=True))

    def read(self, identity: str) -> Array | None:
        """Stored features (width,) of the image with this identity, or None; for any thread."""
        image_hash = bytes.fromhex(identity)
        return self._store.read([image_hash]).get(image_hash)

    def complete(
        self, identities: Sequence[str], found: Sequence[Array | Tensor], compute: Compute, chunk: int
    ) -> Tensor:
        """Features (B, width) of images that the caller has decoded.

        Args:
            identities: identity of each image.
            found: for each image its stored features, from `read`, or the preprocessed image (C, H, W).
            compute, chunk: as in `batches`.
        """
        hashes: list[bytes | None] = [bytes.fromhex(identity) for identity in identities]
        look_up = _LookUp(hashes, {}, [])
        for image_hash, value in zip(hashes, found, strict=True):
            assert image_hash is not None
            if isinstance(value, Tensor):
                look_up.missing.append((image_hash, value))
            else:
                look_up.stored[image_hash] = value
        _, rows = self._compute_missing(iter([look_up]), compute, chunk)
        table = [rows[image_hash] for image_hash in hashes if image_hash is not None]
        return torch.from_numpy(np.stack(table)) if table else torch.empty(0, self.width)

    def _look_up(self, source: ImageSource, preprocessing: Preprocessing, span: range) -> _LookUp:
        look_up = _LookUp([], {}, [])
        for index in span:
            try:
                # an image is decoded only if it must be, and once
                reduced, image, encoded = preprocessing.reduced_decoding, None, None
                identity = source.known_identity(index, reduced_decoding=reduced)
                if identity is None:
                    encoded = source.read_encoded(index, reduced_decoding=reduced)
                    identity = None if encoded is None else self._known_images.find(encoded.hash)
                    if identity is not None:
                        source.remember_identity(index, identity, reduced_decoding=reduced)
                if identity is None:
                    image = source.read(index, preprocessing.least_size, encoded)
                    identity = image.identity
                    if encoded is not None and image.is_plain:
                        self._known_images.add(encoded.hash, identity)
                image_hash = bytes.fromhex(identity)
                row = self._store.read([image_hash])
                if not row:
                    image = image or source.read(index, preprocessing.least_size, encoded)
                    look_up.missing.append((image_hash, preprocessing(image.pixels)))
                look_up.stored.update(row)
                look_up.hashes.append(image_hash)
            except UnreadableImageError:
                if source.policy == "raise":
                    raise
                look_up.hashes.append(None)  # the source lists it with the reason
        return look_up

    def _compute_missing(
        self, look_ups: Iterator[_LookUp], compute: Compute, chunk: int
    ) -> tuple[list[bytes | None], dict[bytes, Array]]:
        """Hashes of all images, and their features by hash; those that are computed here are stored in the cache."""
        hashes: list[bytes | None] = []
        stored: dict[bytes, Array] = {}
        computed: dict[bytes, Array] = {}
        waiting: dict[bytes, Tensor] = {}

        for look_up in chain(look_ups, [None]):
            if look_up is not None:
                hashes += look_up.hashes
                stored |= look_up.stored
                # read again, because a thread may have looked it up before an equal image was computed
                stored |= self._store.read([each for each, _ in look_up.missing if each not in computed])
                for image_hash, image in look_up.missing:
                    if image_hash not in stored and image_hash not in computed:
                        waiting.setdefault(image_hash, image)
            while len(waiting) >= chunk or (waiting and look_up is None):
                next_hashes = list(waiting)[:chunk]
                features = compute(torch.stack([waiting.pop(image_hash) for image_hash in next_hashes])).cpu().numpy()
                rows = dict(zip(next_hashes, features, strict=True))
                computed |= rows
                self._add(rows)
        self.hits += sum(image_hash is not None and image_hash not in computed for image_hash in hashes)
        return hashes, {**stored, **computed}

    def _assemble_batch(
        self,
        source: ImageSource,
        part: range,
        hashes: list[bytes | None],
        rows: dict[bytes, Array],
        preprocessing: Preprocessing,
    ) -> Batch:
        found = [(index, image_hash) for index, image_hash in zip(part, hashes, strict=True) if image_hash is not None]
        features = torch.from_numpy(np.stack([rows[image_hash] for _, image_hash in found])) if found else None
        readable = tuple(index for index, _ in found)
        labels = None if source.labels is None else torch.tensor([source.labels[i] for i in readable]).long()
        return Batch(
            tuple(source.keys[i] for i in readable),
            torch.empty(0, preprocessing.channels, *preprocessing.size),
            labels,
            readable,
            torch.empty(0, self.width) if features is None else features,
            tuple(image_hash.hex() for _, image_hash in found),
        )

    def _add(self, rows: dict[bytes, Array]) -> None:
        # rows with NaN are not stored
        finite = {image_hash: row for image_hash, row in rows.items() if np.isfinite(row).all()}
        self._write(partial(self._store.add, finite))

    def flush(self) -> None:
        """Writes the rows that are not on disk yet; an error is stored in `failure`."""
        self._write(self._store.flush)

    @timed("writing")
    def _write(self, write: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            write()
        except CacheFullError as error:
            self.failure = str(error)
            warn_once(f"features are computed without being stored: {self.failure}")
        except OSError as error:
            self.failure = f"{self.folder} cannot be written ({error.strerror or error}); {_ADVICE}"
            warn_once(f"features are computed without being stored: {self.failure}")

    def create_folder(self) -> None:
        """Creates the folder; raises StoreError if it cannot be written, before any features are computed."""
        if self.failure:
            raise StoreError(self.failure)
        try:
            self._store.create_folder()
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written ({error.strerror or error}); {_ADVICE}") from error

    def check_limit(self, images: int) -> None:
        """Raises StoreError if the features of this number of images are larger than the size limit of the cache."""
        size = images * row_bytes(self.width)
        if self.limit is not None and size > self.limit:
            raise StoreError(
                f"the features of {images} images take {format_size(size)}, and the limit of the cache is"
                f" {format_size(self.limit)}; set FAROUT_CACHE_LIMIT to more"
            )
