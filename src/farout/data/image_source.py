"""An ordered set of images with keys and labels: the type that every function on images works with."""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core import progress
from farout.core.errors import (
    LeftOutWarning,
    MisleadingResultWarning,
    SourceError,
    UnreachableStoreError,
    UnreadableImageError,
)
from farout.data.decoding import (
    LARGE_PIXELS,
    DecodedImage,
    LeastSize,
    content_hash,
    describe_unknown_range,
    full_range,
    reduce_pixels,
    scale_to_uint8,
    unreadable_errors,
)
from farout.data.file_listing import EncodedReader, Listing
from farout.data.read_settings import DEFAULT_READING, ReadSettings, ValueRange, format_value_range
from farout.data.thumbnails import REDUCED_SIZE, make_thumbnail
from farout.data.variants import apply_variant

__all__ = ["EncodedImage", "ImageSource", "Policy", "ReadImage", "ReadingRecord", "check_policy"]

_BLOCK = 4 * 2**20
_HASH_BYTES = 256
"""Memory that the hash of an image needs, roughly; hashes are kept up to the budget for pixels."""

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


_RequestedRange = ValueRange | Literal["full"] | None
"""The requested value range; `full`: that of the file's tags, else of its type; None: of its tags, else estimated."""


@dataclass
class _RangeUse:
    """How images of more than 8 bits use their value range.

    Attributes:
        images: the number of such images.
        low, high: the smallest and the largest value.
        value_range: the widest range that one of them was converted with.
        clipped: the number of images with values outside their range.
    """

    images: int = 0
    low: float = math.inf
    high: float = -math.inf
    value_range: ValueRange = (0.0, 0.0)
    clipped: int = 0

    def add(self, low: float, high: float, value_range: ValueRange) -> None:
        """Count an image with these extreme values."""
        self.images += 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.clipped += low < value_range[0] or high > value_range[1]
        self._widen(value_range)

    def merge(self, other: _RangeUse) -> None:
        """Add the images that another process has converted."""
        self.images += other.images
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.clipped += other.clipped
        self._widen(other.value_range)

    def _widen(self, value_range: ValueRange) -> None:
        if value_range[1] - value_range[0] > self.value_range[1] - self.value_range[0]:
            self.value_range = value_range


@dataclass(frozen=True)
class ReadingRecord:
    """What was found while images of a source were read, see `ImageSource.warn_about_reading`.

    Attributes:
        further_frames: by key, the number of frames of its file that are not in the set.
        range_use: how images of more than 8 bits use their value range; None if there are none.
    """

    further_frames: dict[str, int]
    range_use: _RangeUse | None


@dataclass(frozen=True)
class ReadImage:
    """One image of a source.

    Attributes:
        pixels: uint8 (C, H, W), which callers must not modify.
        identity: see `ImageSource.identity`.
        is_plain: whether it was decoded now, and its file has one frame of 8 bits: its bytes decide the identity.
    """

    pixels: Tensor
    identity: str
    is_plain: bool = False


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image of a source.

    Attributes:
        data: the encoded bytes.
        suffix: suffix of the file.
        hash: hash of the bytes, and of what decides how they are decoded and identified.
    """

    data: bytes
    suffix: str
    hash: bytes


@dataclass(frozen=True)
class _DecodedPixels:
    """A decoded image of 8 bits.

    Attributes:
        pixels: uint8 (C, H, W), of a large image possibly in a reduced size.
        shape: (C, H, W) in native size.
        large_identity: what identifies a large image with reduced decoding; None for others, or without it.
        is_plain: see `ReadImage`.
    """

    pixels: Tensor
    shape: tuple[int, int, int]
    large_identity: str | None
    is_plain: bool = False


_StoredImage = tuple[_Slot, tuple[int, int, int], str | None]
"""A decoded image in memory: its pixels, and the other attributes of `_DecodedPixels`."""


def _is_large(shape: tuple[int, int, int]) -> bool:
    return shape[1] * shape[2] > LARGE_PIXELS


class _ImageStore:
    """Decoded pixels, content hashes and read errors of a set, shared by its subsets; bounded by a memory budget."""

    def __init__(self, listing: Listing, memory_mib: int) -> None:
        self.listing, self._budget = listing, memory_mib * 2**20
        # by index and requested value range; None for images of 8 bits, which have no other range
        self._images: dict[tuple[int, _RequestedRange, LeastSize | None], _StoredImage] = {}
        self._identities: dict[tuple[int, _RequestedRange], str] = {}  # with reduced decoding
        self._hashes: dict[tuple[int, _RequestedRange], str] = {}
        self._thumbnails: dict[tuple[int, _RequestedRange, bool], bytes] = {}
        self.failures: dict[tuple[int, _RequestedRange], str] = {}
        self.further_frames: dict[int, int] = {}
        self.range_use: dict[_RequestedRange, _RangeUse] = {}
        self._extremes: dict[str, ValueRange] | None = None
        self._sampled = listing  # the set that the value range is estimated on
        self.cached_bytes, self._arena = 0, _PixelArena()
        self._lock, self._estimate_lock = threading.Lock(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # copied at once: other threads may read images while this one is sent to another process
        findings = ("_hashes", "_identities", "failures", "further_frames", "range_use")
        return {
            **vars(self),
            **{name: dict(vars(self)[name]) for name in findings},
            "_lock": None,
            "_estimate_lock": None,
            "_images": {},
            "_thumbnails": {},
            "cached_bytes": 0,
            "_arena": _PixelArena(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _estimate_lock=threading.Lock())

    def select(self, indices: Sequence[int], requested: _RequestedRange) -> _ImageStore:
        """Return a store of the images at these indices that holds nothing of the others but what a value range is
        estimated on, if none is requested.
        """
        selected = _ImageStore(self.listing.select(indices), self._budget // 2**20)
        for new_index, index in enumerate(indices):
            for key in ((index, None), (index, requested)):
                if key in self._hashes:
                    selected._hashes[(new_index, key[1])] = self._hashes[key]
                if key in self._identities:
                    selected._identities[(new_index, key[1])] = self._identities[key]
                if key in self.failures:
                    selected.failures[(new_index, key[1])] = self.failures[key]
        selected._extremes = self._extremes
        if requested is None and self._extremes is None:
            selected._sampled = self._sampled.select(_sampled_indices(len(self._sampled.keys)))
        return selected

    def pixels(self, index: int, requested: _RequestedRange) -> Tensor:
        """Return the native uint8 pixels, which callers must not modify; raises UnreadableImageError."""
        return self.read(index, requested).pixels

    def read(
        self,
        index: int,
        requested: _RequestedRange,
        least_size: LeastSize | None = None,
        encoded: EncodedImage | None = None,
    ) -> _DecodedPixels:
        """Return the uint8 pixels, of a large image in a reduced size if `least_size` allows it.

        Raises UnreadableImageError.
        """
        for key in ((index, None), (index, requested)):
            for size in (least_size, None):
                stored = self._images.get((*key, size))
                # what a decoder gives in a reduced size is not computed from the native pixels
                if stored is not None and (size == least_size or not _is_large(stored[1])):
                    return _DecodedPixels(_read_slot(stored[0]), *stored[1:])
            if key in self.failures:
                raise UnreadableImageError(self.failures[key])
        key = (index, None)
        try:
            if encoded is not None and isinstance(self.listing.read, EncodedReader):
                decoded = self.listing.read.decode_encoded(index, encoded.data, encoded.suffix, least_size)
            else:
                decoded = self.listing.read(index, least_size)
            if decoded.frames > 1:
                self.further_frames[index] = decoded.frames - 1
            if decoded.values.dtype != torch.uint8:
                key = (index, requested)
                image = self._convert(decoded, requested, self.listing.keys[index])
            else:
                image = decoded.values
        except UnreadableImageError as error:
            self.failures[key] = str(error)
            raise
        height, width = decoded.full_size or image.shape[1:]
        is_plain = decoded.frames == 1 and decoded.values.dtype == torch.uint8
        read = _DecodedPixels(image, (image.shape[0], height, width), decoded.encoded_hash, is_plain)
        if least_size is not None and _is_large(read.shape) and decoded.encoded_hash is None:
            identity = self._identities.get((index, requested)) or content_hash(image)
            read = replace(read, pixels=reduce_pixels(image, least_size), large_identity=identity)
        if read.large_identity is not None:
            self._keep(self._identities, index, requested, read.large_identity)
        if not self.listing.in_memory:
            size_in_memory = read.pixels.numel() + 256  # the slot itself
            stored_key = (*key, least_size if _is_large(read.shape) else None)
            with self._lock:
                if stored_key not in self._images and self.cached_bytes + size_in_memory <= self._budget:
                    slot = self._arena.store(read.pixels)
                    self._images[stored_key] = slot, read.shape, read.large_identity
                    self.cached_bytes += size_in_memory
        return read

    def _convert(self, decoded: DecodedImage, requested: _RequestedRange, key: str) -> Tensor:
        """Convert values of more than 8 bits to 8 bits."""
        value_range = requested if isinstance(requested, tuple) else decoded.value_range
        with unreadable_errors(key):
            if value_range is None and requested is None:
                value_range = self.estimate_range(decoded.values.numpy().dtype)
            pixels = scale_to_uint8(decoded.values, value_range)
            values = decoded.values.numpy()
            with self._lock:
                use = self.range_use.setdefault(requested, _RangeUse())
                use.add(float(values.min()), float(values.max()), value_range or full_range(values.dtype))
        return pixels

    def estimate_range(self, kind: np.dtype[Any]) -> ValueRange | None:
        """Return the value range of images of this type whose files state none, from up to 256 images.

        For integers of 0 and more it is 0 to 2^k - 1, with the least k >= 8 that contains all values of the sample: 12
        for values of 12 bits in 16-bit files. For floating point it is 0 to 1 if all values of the sample are. None if
        the sample has no such images. Raises UnreadableImageError, without a key, for other values.
        """
        with self._estimate_lock:
            if self._extremes is None:
                self._extremes = self._sample_extremes()
        if str(kind) not in self._extremes:
            return None
        low, high = self._extremes[str(kind)]
        if kind.kind != "f" and low >= 0:
            return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
        if kind.kind == "f" and low >= 0 and high <= 1:
            return 0.0, 1.0
        raise UnreadableImageError(describe_unknown_range(str(kind), low, high))

    def _sample_extremes(self) -> dict[str, ValueRange]:
        """Return the least and the largest value in the sample by type."""
        extremes: dict[str, ValueRange] = {}
        for index in _sampled_indices(len(self._sampled.keys)):
            try:
                decoded = self._sampled.read(index)
            except UnreadableImageError:
                continue  # reported when the image itself is read
            values = decoded.values.numpy()
            if values.dtype == np.uint8 or decoded.value_range is not None or not np.isfinite(values).all():
                continue
            low, high = extremes.get(str(values.dtype), (math.inf, -math.inf))
            extremes[str(values.dtype)] = min(low, float(values.min())), max(high, float(values.max()))
        return extremes

    def known_hash(self, index: int, requested: _RequestedRange, reduced: bool) -> str | None:
        """Return the content hash, see `hash`, if it was computed and kept."""
        return (self._identities if reduced else self._hashes).get((index, requested))

    def hash(
        self, index: int, requested: _RequestedRange, reduced: bool = False, read: _DecodedPixels | None = None
    ) -> str:
        """Return the content hash of an image before the variant.

        It is computed once, except for the images of a set that is large for its memory.

        Args:
            index: index of the image.
            requested: the requested value range.
            reduced: identify a large encoded image by its bytes instead of its pixels.
            read: the image, if it is already decoded: in native size unless `reduced`.
        """
        hashes = self._identities if reduced else self._hashes
        if (index, requested) in hashes:
            return hashes[(index, requested)]
        if read is None:
            read = self.read(index, requested, REDUCED_SIZE if reduced else None)
        content = read.large_identity if reduced else None
        content = content or content_hash(read.pixels)
        self._keep(hashes, index, requested, content)
        return content

    def remember_hash(self, index: int, requested: _RequestedRange, reduced: bool, content: str) -> None:
        """Keep a content hash, see `hash`."""
        self._keep(self._identities if reduced else self._hashes, index, requested, content)

    def _keep(
        self, hashes: dict[tuple[int, _RequestedRange], str], index: int, requested: _RequestedRange, content: str
    ) -> None:
        if len(hashes) * _HASH_BYTES < self._budget or self.listing.in_memory:
            hashes[(index, requested)] = content

    def thumbnail(self, index: int, requested: _RequestedRange, reduced: bool) -> bytes:
        """Return the thumbnail, computed once; the hash comes from the same decoded image."""
        key = (index, requested, reduced)
        if key not in self._thumbnails:
            read = self.read(index, requested, REDUCED_SIZE if reduced else None)
            self.hash(index, requested, reduced, read)
            self._thumbnails[key] = make_thumbnail(read.pixels)
        return self._thumbnails[key]

    def donor(self, index: int, draw: int, requested: _RequestedRange) -> Tensor:
        """Return another readable image of the set, chosen by the random integer `draw`."""
        count = len(self.listing.keys)
        for step in range(count):
            candidate = (draw + step) % count
            if candidate != index or count == 1:
                try:
                    return self.pixels(candidate, requested)
                except UnreadableImageError:
                    continue  # recorded in `failures`, and reported when the image itself is read
        raise SourceError("the variant patch requires a second readable image in the set")


def _sampled_indices(count: int) -> list[int]:
    """Return up to 256 indices, evenly spaced: the images that a value range is estimated on."""
    return sorted({number * count // 256 for number in range(256)})


class ImageSource(Dataset[Tensor]):
    """An ordered set of images, each with a unique key. `open_source` creates it.

    `source[i]` is uint8 (C, H, W), C in {1, 3}, of native size, with the variant applied; it raises
    UnreadableImageError.

    Attributes:
        name: the source as it was given, encoded by `farout.core.names.encode_source`; `open_source` opens it again.
        keys: key of each image.
        labels: label of each image, or None; a class filter keeps the original labels.
        class_names: name of each label, or None.
        groups: parent folder of each file, or the `group` column of a table, or None.
        policy: treatment of unreadable images in batches and splits.
        reading: how image files become 8-bit pixels.
        left_out: what the source contains and the set does not: description and number of files.
        location: the source in the same text for every way to write it, see `SourceSpec.canonical`; empty for objects.
        splits: why these are several sets rather than one, and what to give instead; None for one set.
        reduced_decoding: whether content hashes of large images, and what is computed from small copies, are those
            for models with reduced decoding, see docs/reproducibility.md.
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
        reading: ReadSettings = DEFAULT_READING,
        location: str = "",
    ) -> None:
        self.name, self.policy, self.reading, self.left_out = name, policy, reading, dict(listing.left_out)
        self.location = location
        self.splits = listing.splits
        self.reduced_decoding = False
        self._variant, self._strength = variant, strength
        self._store = _ImageStore(listing, memory_mib)
        self._select(range(len(listing.keys)))

    def _select(self, indices: Sequence[int]) -> None:
        listing = self._store.listing
        self.class_names = listing.class_names
        if indices == range(len(listing.keys)):
            self._indices: Sequence[int] = indices
            self.keys, self.labels, self.groups = listing.keys, listing.labels, listing.groups
            return
        self._indices = tuple(indices)  # in the listing
        self.keys = tuple(listing.keys[i] for i in self._indices)
        self.labels = None if listing.labels is None else tuple(listing.labels[i] for i in self._indices)
        self.groups = None if listing.groups is None else tuple(listing.groups[i] for i in self._indices)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only what belongs to these images, so that a part of a large set can be sent to another process.

        To the copy, they are the full set. The variant `patch` needs the others.
        """
        if self._variant == "patch" or self._indices == range(len(self._store.listing.keys)):
            return vars(self)
        state = {**vars(self), "_store": self._store.select(self._indices, self._requested_range)}
        return {**state, "keys": state["_store"].listing.keys, "_indices": range(len(self))}

    @property
    def variant(self) -> str | None:
        """The variant as in a source string, such as `vflip` or `blur=2`; None if there is none."""
        return self._variant if self._strength is None else f"{self._variant}={self._strength:g}"

    @property
    def unreadable(self) -> dict[str, str]:
        """The reason by key of each image that was unreadable so far; grows as images are read."""
        requested = self._requested_range
        failures = {i: reason for (i, used), reason in self._store.failures.items() if used in (None, requested)}
        if not failures:
            return {}
        return {k: failures[i].removeprefix(f"{k}: ") for k, i in zip(self.keys, self._indices) if i in failures}

    @property
    def _requested_range(self) -> _RequestedRange:
        return cast(_RequestedRange, self.reading.value_range)

    @property
    def value_range(self) -> ValueRange | None:
        """The declared value range, else that estimated for integers if images that were read needed one, else None."""
        if isinstance(self.reading.value_range, tuple):
            return self.reading.value_range
        if self._store.range_use.get(None) is None:
            return None
        for kind in (np.uint16, np.int32):
            with suppress(UnreadableImageError):  # the images of this type are unreadable, for this reason
                estimated = self._store.estimate_range(np.dtype(kind))
                if estimated is not None:
                    return estimated
        return None

    @property
    def further_frames(self) -> dict[str, int]:
        """By key of each image that was read: the number of frames of its file that are not in the set."""
        if not self._store.further_frames:
            return {}
        counts = dict(self._store.further_frames)
        return {key: counts[index] for key, index in zip(self.keys, self._indices) if index in counts}

    @property
    def reading_record(self) -> ReadingRecord:
        """What was found so far while the images were read."""
        return ReadingRecord(self.further_frames, self._store.range_use.get(self._requested_range))

    def add_reading_record(self, record: ReadingRecord, indices: Sequence[int]) -> None:
        """Add what another process has found while it read the images at these indices."""
        for index in indices if record.further_frames else ():
            if self.keys[index] in record.further_frames:
                self._store.further_frames[self._indices[index]] = record.further_frames[self.keys[index]]
        if record.range_use is not None:
            self._store.range_use.setdefault(self._requested_range, _RangeUse()).merge(record.range_use)

    def warn_about_reading(self) -> None:
        """Warn of what was found while images were read: unreadable ones that are skipped, further frames of files,
        a value range that is hardly used, and values outside it.
        """
        if self.policy == "skip" and (unreadable := self.unreadable):
            reasons = _join_first([f"{key}: {reason}" for key, reason in unreadable.items()])
            message = f"{len(unreadable)} of {len(self)} images could not be read: {reasons}"
            warnings.warn(f"{self.name}: {message}", LeftOutWarning, stacklevel=3)
        if frames := self.further_frames:
            count = sum(frames.values())
            message = f"{count} frames after the first of {len(frames)} file(s) are left out (--frames all)"
            warnings.warn(f"{self.name}: {message}", LeftOutWarning, stacklevel=3)
        use = self._store.range_use.get(self._requested_range)
        if use is None:
            return
        low, high = use.value_range
        values = f"values from {use.low:g} to {use.high:g}"
        if use.clipped and not isinstance(self.reading.value_range, tuple):
            message = f"{use.clipped} images have values outside the value range {format_value_range(use.value_range)}"
            warnings.warn(f"{self.name}: {message}, which are clipped", MisleadingResultWarning, stacklevel=3)
        elif (min(use.high, high) - max(use.low, low)) * 4 < high - low:
            message = (
                f"{use.images} images with more than 8 bits have {values}, a small part of the value range "
                f"{format_value_range(use.value_range)}: few gray levels are left; declare it (--value-range LOW:HIGH)"
            )
            warnings.warn(f"{self.name}: {message}", MisleadingResultWarning, stacklevel=3)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self._native_pixels(index)
        return pixels.clone() if self._variant is None else pixels

    def _native_pixels(self, index: int) -> Tensor:
        """Return `self[index]`, which must not be modified."""
        index = self._indices[index]
        requested, store = self._requested_range, self._store
        pixels = store.pixels(index, requested)
        if self._variant is None:
            return pixels
        identity = store.hash(index, requested)
        return apply_variant(
            pixels, self._variant, self._strength, identity, lambda draw: store.donor(index, draw, requested)
        )

    def read_encoded(self, index: int, *, reduced_decoding: bool) -> EncodedImage | None:
        """Return an encoded image; None for one that is given as pixels, is unreadable, or has a variant.

        Args:
            index: index of the image.
            reduced_decoding: how it will be decoded and identified.
        """
        reader = self._store.listing.read
        if self._variant is not None or self.reading.frames != "first" or not isinstance(reader, EncodedReader):
            return None
        try:
            data, suffix = reader.read_encoded(self._indices[index])
        except UnreachableStoreError:
            raise
        except Exception:  # noqa: BLE001 - reported by `read`, which reads it again
            return None
        text = f"{suffix.lower()} {self.reading.max_pixels} {reduced_decoding}"
        salt = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return EncodedImage(data, suffix, hashlib.blake2b(data, digest_size=16, salt=salt).digest())

    def read(self, index: int, least_size: LeastSize | None = None, encoded: EncodedImage | None = None) -> ReadImage:
        """Return an image with its identity, decoded once.

        Args:
            index: index of the image.
            least_size: a large image may be decoded in a reduced size. Its identity is then the hash of its encoded
                bytes, also where the size is not reduced. An image with a variant is reduced after it.
            encoded: the result of `read_encoded`, if it is known.

        Raises:
            UnreadableImageError: the image cannot be read.
        """
        if self._variant is not None:
            pixels = self._native_pixels(index)
            reduced = pixels if least_size is None else reduce_pixels(pixels, least_size)
            return ReadImage(reduced, content_hash(pixels))
        read = self._store.read(self._indices[index], self._requested_range, least_size, encoded)
        is_reduced = least_size is not None
        identity = self._store.hash(self._indices[index], self._requested_range, is_reduced, read)
        return ReadImage(read.pixels, identity, read.is_plain)

    def read_pixels(self, index: int, least_size: LeastSize | None = None) -> Tensor:
        """Return the pixels of `read`."""
        if least_size is None or self._variant is not None:
            pixels = self._native_pixels(index)
            return pixels if least_size is None else reduce_pixels(pixels, least_size)
        return self._store.read(self._indices[index], self._requested_range, least_size).pixels

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
        view = self._copy()
        view._select([self._indices[i] for i in indices])
        return view

    def _copy(self) -> ImageSource:
        """Return a copy that shares the decoded pixels; `copy.copy` would not, it uses what is pickled."""
        view: ImageSource = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view

    def full_source(self) -> ImageSource:
        """Return the set before any class filter, `limit` or `subset`."""
        view = self._copy()
        view._select(range(len(self._store.listing.keys)))
        return view

    def with_policy(self, policy: Policy) -> ImageSource:
        """Return the same images with another policy; decoded pixels are shared."""
        view = self._copy()
        view.policy = check_policy(policy)
        return view

    def with_variant(self, variant: str) -> ImageSource:
        """Return these images with a variant of default strength; what `patch` pastes comes from them alone.

        Raises SourceError if they have a variant already.
        """
        if self._variant is not None:
            raise SourceError(f"{self.name} has the variant {self.variant}; a second one cannot be applied")
        view = self._copy()
        view._store = self._store.select(self._indices, self._requested_range)
        view._variant = variant
        view._select(range(len(self)))
        return view

    def with_value_range(self, value_range: ValueRange | Literal["full"] | None) -> ImageSource:
        """Return the same images with this value range, unless one was declared when the source was opened."""
        if self.reading.value_range is not None or value_range is None:
            return self
        view = self._copy()
        view.reading = replace(self.reading, value_range=value_range)
        return view

    def with_reduced_decoding(self, reduced_decoding: bool) -> ImageSource:
        """Return the same images with or without `reduced_decoding`; decoded pixels are shared."""
        if self.reduced_decoding == reduced_decoding:
            return self
        view = self._copy()
        view.reduced_decoding = reduced_decoding
        return view

    def content_hash(self, index: int) -> str:
        """Return the blake2b hash of shape and native pixels, before the variant; raises UnreadableImageError.

        With `reduced_decoding`, that of a large encoded image is the hash of its bytes.
        """
        return self._store.hash(self._indices[index], self._requested_range, self.reduced_decoding)

    def thumbnail(self, index: int) -> bytes:
        """Return the small copy that near-copies are found on, before the variant; raises UnreadableImageError."""
        return self._store.thumbnail(self._indices[index], self._requested_range, self.reduced_decoding)

    def known_identity(self, index: int, *, reduced_decoding: bool = False) -> str | None:
        """Return the identity of an image if it is known without decoding the image, else None."""
        if self._variant is not None:
            return None
        return self._store.known_hash(self._indices[index], self._requested_range, reduced_decoding)

    def remember_identity(self, index: int, identity: str, *, reduced_decoding: bool) -> None:
        """Keep the identity of an image without a variant, which was found by its `read_encoded`."""
        self._store.remember_hash(self._indices[index], self._requested_range, reduced_decoding, identity)

    def identity(self, index: int, pixels: Tensor | None = None) -> str:
        """Return the content hash with the variant applied: the seed text of the image's random numbers.

        Without `pixels`, it is that of `content_hash` if there is no variant; with them, that of the pixels.

        Args:
            index: index of the image.
            pixels: `source[index]`, if already decoded.

        Raises:
            UnreadableImageError: the image cannot be read.
        """
        if self._variant is not None:
            return content_hash(self[index] if pixels is None else pixels)
        if pixels is None:
            return self.content_hash(index)
        read = _DecodedPixels(pixels, (pixels.shape[0], *pixels.shape[1:]), None)
        return self._store.hash(self._indices[index], self._requested_range, read=read)

    def content_hashes(self, *, thumbnails: bool = False) -> tuple[str | None, ...]:
        """Return all content hashes; None for an unreadable image.

        If the policy is `raise`, all images are read first, and then one error names the unreadable ones.

        Args:
            thumbnails: also compute the thumbnails, from the same decoded pixels.
        """
        hashes: list[str | None] = []
        failures: list[str] = []
        with progress.task(f"reading {self.name}", len(self)) as bar:
            for index in range(len(self)):
                try:
                    if thumbnails:
                        self.thumbnail(index)
                    hashes.append(self.content_hash(index))
                except UnreadableImageError as error:
                    failures.append(str(error))
                    hashes.append(None)
                bar.advance()
        if failures and self.policy == "raise":
            hint = "repair or remove them, or leave such images out with the policy skip (--policy skip)"
            if len(failures) == 1:
                raise UnreadableImageError(f"{failures[0]}; {hint.replace('them', 'it')}")
            raise UnreadableImageError(
                f"{len(failures)} of {len(self)} images of {self.name} cannot be read ({_join_first(failures)}); {hint}"
            )
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
                least_size = REDUCED_SIZE if self.reduced_decoding else None
                counts[self._store.read(self._indices[index], self._requested_range, least_size).shape] += 1
            except UnreadableImageError:
                continue  # recorded in `unreadable`
        return counts

    def native_sizes(self, sample: int = 64) -> Counter[tuple[int, int]]:
        """Counts of native `(H, W)` over up to `sample` images, evenly spaced, before the variant."""
        counts: Counter[tuple[int, int]] = Counter()
        for (_, height, width), count in self.shapes(sample).items():
            counts[(height, width)] += count
        return counts


def _join_first(texts: Sequence[str]) -> str:
    """Join the first five texts and the number of the others for a message."""
    return "; ".join([*texts[:5], *([f"and {len(texts) - 5} more"] if len(texts) > 5 else [])])


def check_policy(policy: Policy) -> Policy:
    """Return the policy; raises SourceError for an unknown one."""
    if policy not in get_args(Policy):
        raise SourceError(f"unknown policy {policy!r}; expected one of {', '.join(get_args(Policy))}")
    return policy
