"""An ordered set of images with keys and labels: the type that every function on images works with."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core import progress
from farout.core.errors import SourceError, UnreadableImageError
from farout.data.decoding import content_hash
from farout.data.file_listing import Listing
from farout.data.variants import apply_variant

__all__ = ["ImageSource", "Policy", "check_policy"]

_BLOCK = 4 * 2**20

Policy = Literal["raise", "skip", "nan"]
"""Treatment of unreadable images: raise an error, leave them out and list them, or keep them without a score."""

_Slot = tuple[np.ndarray[Any, np.dtype[np.uint8]], int, tuple[int, ...]]
"""A memory block, the offset of an image in it, and the shape of the image."""


class _PixelArena:
    """Copies of small images, packed into large memory blocks.

    With one allocation per image, the small allocations that are kept fragment the memory between the large temporary
    ones of the preprocessing: half a MiB was lost per image of 32 pixels that was enlarged to 224.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)
        self._used = 0

    def store(self, image: Tensor) -> _Slot:
        """Copy the image and return its slot."""
        count = image.numel()
        if self._used + count > len(self._block):
            self._block, self._used = np.empty(max(count, _BLOCK), dtype=np.uint8), 0
        start, self._used = self._used, self._used + count
        self._block[start : self._used] = image.reshape(-1).numpy()
        return self._block, start, tuple(image.shape)


def _read_slot(slot: _Slot) -> Tensor:
    block, start, shape = slot
    return torch.from_numpy(block[start : start + math.prod(shape)].reshape(shape))


class _ImageStore:
    """Decoded pixels, content hashes and read errors of a set, shared by its subsets; bounded by a memory budget."""

    def __init__(self, listing: Listing, memory_mib: int) -> None:
        self.listing, self._budget = listing, memory_mib * 2**20
        self._pixels: dict[int, _Slot] = {}
        self._hashes: dict[int, str] = {}
        self.failures: dict[int, str] = {}
        self.cached_bytes, self._arena = 0, _PixelArena()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None, "_pixels": {}, "cached_bytes": 0, "_arena": _PixelArena()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def pixels(self, index: int) -> Tensor:
        """Return the native uint8 pixels, which callers must not modify; raises UnreadableImageError."""
        slot = self._pixels.get(index)
        if slot is not None:
            return _read_slot(slot)
        if index in self.failures:
            raise UnreadableImageError(self.failures[index])
        try:
            image = self.listing.read(index)
        except UnreadableImageError as error:
            self.failures[index] = str(error)
            raise
        if not self.listing.in_memory:
            size = image.numel() + 256  # the slot itself
            with self._lock:
                if index not in self._pixels and self.cached_bytes + size <= self._budget:
                    self._pixels[index] = self._arena.store(image)
                    self.cached_bytes += size
        return image

    def hash(self, index: int, pixels: Tensor | None = None) -> str:
        """Return the content hash of the native pixels, computed once; `pixels`: the pixels, if already decoded."""
        if index not in self._hashes:
            self._hashes[index] = content_hash(self.pixels(index) if pixels is None else pixels)
        return self._hashes[index]

    def donor(self, index: int, draw: int) -> Tensor:
        """Return another readable image of the set, chosen by the random integer `draw`."""
        count = len(self.listing.keys)
        for step in range(count):
            candidate = (draw + step) % count
            if candidate != index or count == 1:
                try:
                    return self.pixels(candidate)
                except UnreadableImageError:
                    continue  # recorded in `failures`, and reported when the image itself is read
        raise SourceError("the variant patch requires a second readable image in the set")


class ImageSource(Dataset[Tensor]):
    """An ordered set of images, each with a unique key. `open_source` creates it.

    `source[i]` is uint8 (C, H, W), C in {1, 3}, of native size, with the variant applied; it raises
    UnreadableImageError.

    Attributes:
        name: the source as it was given, encoded by `farout.core.names.encode_name`; `open_source` opens it again.
        keys: key of each image.
        labels: label of each image, or None; a class filter keeps the original labels.
        class_names: name of each label, or None.
        groups: parent folder of each file, or the `group` column of a table, or None.
        policy: treatment of unreadable images in batches and splits.
    """

    keys: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    groups: tuple[str, ...] | None

    def __init__(
        self,
        name: str,
        listing: Listing,
        *,
        policy: Policy = "raise",
        variant: str | None = None,
        strength: float | None = None,
        memory_mib: int = 1024,
    ) -> None:
        self.name, self.policy = name, policy
        self._variant, self._strength = variant, strength
        self._store = _ImageStore(listing, memory_mib)
        self._select(range(len(listing.keys)))

    def _select(self, indices: Sequence[int]) -> None:
        listing = self._store.listing
        self._indices = tuple(indices)  # in the listing
        self.keys = tuple(listing.keys[i] for i in self._indices)
        self.labels = None if listing.labels is None else tuple(listing.labels[i] for i in self._indices)
        self.groups = None if listing.groups is None else tuple(listing.groups[i] for i in self._indices)
        self.class_names = listing.class_names

    @property
    def variant(self) -> str | None:
        """The variant as in a source string, such as `vflip` or `blur=2`; None if there is none."""
        return self._variant if self._strength is None else f"{self._variant}={self._strength:g}"

    @property
    def unreadable(self) -> dict[str, str]:
        """The reason by key of each image that was unreadable so far; grows as images are read."""
        failures = dict(self._store.failures)
        if not failures:
            return {}
        return {k: failures[i].removeprefix(f"{k}: ") for k, i in zip(self.keys, self._indices) if i in failures}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        index = self._indices[index]
        pixels = self._store.pixels(index)
        if self._variant is None:
            return pixels.clone()
        identity, store = self._store.hash(index), self._store
        return apply_variant(pixels, self._variant, self._strength, identity, lambda draw: store.donor(index, draw))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {len(self)} images)"

    def label(self, index: int) -> int:
        """Return the label of an image; raises SourceError if the source has no labels."""
        if self.labels is None:
            raise SourceError(f"{self.name} has no labels; give a class-per-folder tree or a table with labels")
        return self.labels[index]

    def subset(self, indices: Sequence[int]) -> ImageSource:
        """Return the images at `indices`, in that order, with the same keys; decoded pixels are shared."""
        view: ImageSource = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._select([self._indices[i] for i in indices])
        return view

    def full_source(self) -> ImageSource:
        """Return the set before any class filter, `limit` or `subset`."""
        view = self.subset(())
        view._select(range(len(self._store.listing.keys)))
        return view

    def with_policy(self, policy: Policy) -> ImageSource:
        """Return the same images with another policy; decoded pixels are shared."""
        view = self.subset(range(len(self)))
        view.policy = check_policy(policy)
        return view

    def content_hash(self, index: int) -> str:
        """Return the blake2b hash of shape and native pixels, before the variant; raises UnreadableImageError."""
        return self._store.hash(self._indices[index])

    def identity(self, index: int, pixels: Tensor | None = None) -> str:
        """Return the content hash with the variant applied: the seed text of the image's random numbers.

        Args:
            index: index of the image.
            pixels: `source[index]`, if already decoded.

        Raises:
            UnreadableImageError: the image cannot be read.
        """
        if self._variant is None:
            return self._store.hash(self._indices[index], pixels)
        return content_hash(self[index] if pixels is None else pixels)

    def content_hashes(self) -> tuple[str | None, ...]:
        """Return all content hashes; None for an unreadable image, which raises an error if the policy is `raise`."""
        hashes: list[str | None] = []
        with progress.task(f"reading {self.name}", len(self)) as bar:
            for index in range(len(self)):
                try:
                    hashes.append(self.content_hash(index))
                except UnreadableImageError as error:
                    if self.policy == "raise":
                        hint = "repair or remove it, or leave such images out with the policy skip (--policy skip)"
                        raise UnreadableImageError(f"{error}; {hint}") from error
                    hashes.append(None)
                bar.advance()
        return tuple(hashes)

    def fingerprint(self) -> str:
        """Return a hash of ordered keys, content hashes and variant (blake2b, 16 bytes), which identifies the data."""
        digest = hashlib.blake2b(f"{self.variant}\n".encode(), digest_size=16)
        for key, content in zip(self.keys, self.content_hashes()):
            digest.update(f"{len(key)}:{key} {content or 'unreadable'}\n".encode())
        return digest.hexdigest()

    def shapes(self, sample: int = 64) -> Counter[tuple[int, int, int]]:
        """Counts of native `(C, H, W)` over up to `sample` images, evenly spaced; unreadable ones are left out."""
        count = min(sample, len(self))
        counts: Counter[tuple[int, int, int]] = Counter()
        for index in (number * len(self) // count for number in range(count)):
            try:
                channels, height, width = self._store.pixels(self._indices[index]).shape
            except UnreadableImageError:
                continue  # recorded in `unreadable`
            counts[(channels, height, width)] += 1
        return counts

    def native_sizes(self, sample: int = 64) -> Counter[tuple[int, int]]:
        """Counts of native `(H, W)` over up to `sample` images, evenly spaced, before the variant."""
        counts: Counter[tuple[int, int]] = Counter()
        for (_, height, width), count in self.shapes(sample).items():
            counts[(height, width)] += count
        return counts


def check_policy(policy: Policy) -> Policy:
    """Return the policy; raises SourceError for an unknown one."""
    if policy not in get_args(Policy):
        raise SourceError(f"unknown policy {policy!r}; expected one of {', '.join(get_args(Policy))}")
    return policy
