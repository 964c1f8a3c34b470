"""An ordered set of images with keys and labels: what every function that takes images works on."""

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
"""What happens to an image that cannot be read: an error; left out and listed; kept with a status and no score."""

_Place = tuple[np.ndarray, int, tuple[int, ...]]
"""A block, and where in it an image of some shape lies."""


class _Shelf:
    """Copies of small images side by side in large blocks.

    One block of memory each, kept between the large ones that preparing images takes and gives back, would leave holes
    that nothing fits: half a MiB was lost per image of 32 pixels enlarged to 224.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)
        self._used = 0

    def put(self, image: Tensor) -> _Place:
        """Copies the image, and says where it lies."""
        count = image.numel()
        if self._used + count > len(self._block):
            self._block, self._used = np.empty(max(count, _BLOCK), dtype=np.uint8), 0
        start, self._used = self._used, self._used + count
        self._block[start : self._used] = image.reshape(-1).numpy()
        return self._block, start, tuple(image.shape)


def _taken(place: _Place) -> Tensor:
    block, start, shape = place
    return torch.from_numpy(block[start : start + math.prod(shape)].reshape(shape))


class _Store:
    """Decoded pixels, content hashes and failures of a set, shared by all its views; bounded by a memory budget."""

    def __init__(self, listing: Listing, memory_mib: int) -> None:
        self.listing, self._budget = listing, memory_mib * 2**20
        self._pixels: dict[int, _Place] = {}
        self._hashes: dict[int, str] = {}
        self.failures: dict[int, str] = {}
        self.held, self._shelf = 0, _Shelf()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None, "_pixels": {}, "held": 0, "_shelf": _Shelf()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def pixels(self, index: int) -> Tensor:
        """Native uint8 pixels; not to be written to. Raises UnreadableImageError."""
        held = self._pixels.get(index)
        if held is not None:
            return _taken(held)
        if index in self.failures:
            raise UnreadableImageError(self.failures[index])
        try:
            image = self.listing.read(index)
        except UnreadableImageError as error:
            self.failures[index] = str(error)
            raise
        self._keep(index, image)
        return image

    def _keep(self, index: int, image: Tensor) -> None:
        if self.listing.in_memory:
            return
        size = image.numel() + 256  # the object that says where it lies
        with self._lock:
            if index not in self._pixels and self.held + size <= self._budget:
                self._pixels[index] = self._shelf.put(image)
                self.held += size

    def hash(self, index: int, pixels: Tensor | None = None) -> str:
        """Content hash of the native pixels, computed once; `pixels`: these where they are at hand."""
        if index not in self._hashes:
            self._hashes[index] = content_hash(self.pixels(index) if pixels is None else pixels)
        return self._hashes[index]

    def donor(self, index: int, draw: int) -> Tensor:
        """Another readable image, chosen by a drawn integer over the whole set."""
        count = len(self.listing.keys)
        for step in range(count):
            place = (draw + step) % count
            if place != index or count == 1:
                try:
                    return self.pixels(place)
                except UnreadableImageError:
                    continue  # it is recorded as a failure; its own turn reports it
        raise SourceError("the variant patch needs a second readable image in the set")


class ImageSource(Dataset[Tensor]):
    """An ordered set of images, each with a unique key; made by `open_source`.

    `source[i]` is uint8 `(C, H, W)`, C in {1, 3}, native size, variant applied; it raises UnreadableImageError.
    `labels` and `class_names` are None where there are none; a class filter keeps the original label numbers and names.
    `groups` is the parent folder of each file, or the `group` column of a table. `policy` is what batches and splits
    do with unreadable images.
    """

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
        self._store = _Store(listing, memory_mib)
        self._select(range(len(listing.keys)))

    def _select(self, places: Sequence[int]) -> None:
        listing = self._store.listing
        self._places = tuple(places)
        self.keys = tuple(listing.keys[i] for i in self._places)
        self.labels = None if listing.labels is None else tuple(listing.labels[i] for i in self._places)
        self.groups = None if listing.groups is None else tuple(listing.groups[i] for i in self._places)
        self.class_names = listing.class_names

    @property
    def variant(self) -> str | None:
        """The variant as written in a spec, such as `vflip` or `blur=2`; None without one."""
        return self._variant if self._strength is None else f"{self._variant}={self._strength:g}"

    @property
    def unreadable(self) -> dict[str, str]:
        """Key -> reason of the images found unreadable so far; grows as images are read."""
        failures = dict(self._store.failures)
        if not failures:
            return {}
        return {k: failures[i].removeprefix(f"{k}: ") for k, i in zip(self.keys, self._places) if i in failures}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        pixels = self._store.pixels(place)
        if self._variant is None:
            return pixels.clone()
        identity, store = self._store.hash(place), self._store
        return apply_variant(pixels, self._variant, self._strength, identity, lambda draw: store.donor(place, draw))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {len(self)} images)"

    def label(self, index: int) -> int:
        """The label of image `index`; raises SourceError where the source has no labels."""
        if self.labels is None:
            raise SourceError(f"{self.name} has no labels; give a class-per-folder tree or a table with labels")
        return self.labels[index]

    def subset(self, indices: Sequence[int]) -> ImageSource:
        """The images at `indices`, in that order: keys stay, decoded pixels are shared."""
        view: ImageSource = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._select([self._places[i] for i in indices])
        return view

    def full_source(self) -> ImageSource:
        """All images of the set that these are of, whatever a class filter, a sample or `subset` has left out."""
        view = self.subset(())
        view._select(range(len(self._store.listing.keys)))
        return view

    def with_policy(self, policy: Policy) -> ImageSource:
        """The same images under another policy; decoded pixels are shared."""
        view = self.subset(range(len(self)))
        view.policy = check_policy(policy)
        return view

    def content_hash(self, index: int) -> str:
        """Hex blake2b (16 bytes) of shape and native pixels before the variant; raises UnreadableImageError."""
        return self._store.hash(self._places[index])

    def identity(self, index: int, pixels: Tensor | None = None) -> str:
        """The content hash of the pixels with the variant applied, which names the random numbers of the image.

        `pixels`: `source[index]` where it is at hand, so that the image is not decoded again. Raises
        UnreadableImageError.
        """
        if self._variant is None:
            return self._store.hash(self._places[index], pixels)
        return content_hash(self[index] if pixels is None else pixels)

    def content_hashes(self) -> tuple[str | None, ...]:
        """All content hashes in order; None for an unreadable image, which raises where the policy is `raise`."""
        hashes: list[str | None] = []
        with progress.task(f"reading {self.name}", len(self)) as bar:
            for index in range(len(self)):
                hashes.append(self._hash_by_policy(index))
                bar.advance()
        return tuple(hashes)

    def _hash_by_policy(self, index: int) -> str | None:
        try:
            return self.content_hash(index)
        except UnreadableImageError as error:
            if self.policy == "raise":
                hint = "repair or remove it, or leave such images out with the policy skip (--policy skip)"
                raise UnreadableImageError(f"{error}; {hint}") from error
            return None

    def fingerprint(self) -> str:
        """Hex blake2b (16 bytes) over ordered keys, content hashes and the variant: the identity of the data."""
        digest = hashlib.blake2b(f"{self.variant}\n".encode(), digest_size=16)
        for key, content in zip(self.keys, self.content_hashes()):
            digest.update(f"{len(key)}:{key} {content or 'unreadable'}\n".encode())
        return digest.hexdigest()

    def shapes(self, sample: int = 64) -> Counter[tuple[int, int, int]]:
        """Counts of native `(C, H, W)` over up to `sample` images, evenly spaced; unreadable ones are left out."""
        count = min(sample, len(self))
        found: Counter[tuple[int, int, int]] = Counter()
        for index in (number * len(self) // count for number in range(count)):
            try:
                channels, height, width = self._store.pixels(self._places[index]).shape
            except UnreadableImageError:
                continue  # recorded in `unreadable`
            found[(channels, height, width)] += 1
        return found

    def native_sizes(self, sample: int = 64) -> Counter[tuple[int, int]]:
        """Counts of native `(H, W)` over up to `sample` images, evenly spaced, before the variant."""
        found: Counter[tuple[int, int]] = Counter()
        for (_, height, width), count in self.shapes(sample).items():
            found[(height, width)] += count
        return found


def check_policy(policy: Policy) -> Policy:
    """The policy as given; raises SourceError for an unknown one."""
    if policy not in get_args(Policy):
        raise SourceError(f"unknown policy {policy!r}; expected one of {', '.join(get_args(Policy))}")
    return policy
