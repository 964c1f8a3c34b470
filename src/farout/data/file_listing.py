"""The result of every reader: keys, labels and groups of a set, and a function that reads one image."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from farout.core.errors import SourceError
from farout.core.names import encode_name
from farout.data.decoding import DecodedImage, LeastSize

__all__ = [
    "EncodedReader",
    "Listing",
    "Reader",
    "check_count",
    "check_keys",
    "encode_groups",
    "encode_labels",
    "index_keys",
]


class Reader(Protocol):
    """Reads images by index."""

    def __call__(self, index: int, least_size: LeastSize | None = None, /) -> DecodedImage:
        """Return image `index`, or raise UnreadableImageError; encoded ones are decoded as by `decode`."""


@runtime_checkable
class EncodedReader(Protocol):
    """A `Reader` of encoded images."""

    def read_encoded(self, index: int) -> tuple[bytes, str]:
        """Return the encoded data of an image and the suffix of its file; whatever it raises makes it unreadable."""

    def decode_encoded(self, index: int, data: bytes, suffix: str, least_size: LeastSize | None) -> DecodedImage:
        """Decode what `read_encoded` has returned, as `Reader` does."""


@dataclass(frozen=True)
class Listing:
    """A set of images that are not decoded yet.

    Attributes:
        keys: unique key of each image, encoded by `farout.core.names.encode_key`.
        read: see `Reader`.
        labels: label of each image, or None.
        class_names: name of each label, encoded by `farout.core.names.encode_name`, or None.
        groups: group of each image, or None.
        in_memory: whether the pixels are in memory already, so that caching them would only copy them.
        left_out: what the source contains and the set does not: description, such as ".heic (install farout[heic])",
            and number of files.
        splits: why these are several sets, such as the splits of a benchmark, rather than one set of normal images, and
            what to give instead; None for one set.
    """

    keys: tuple[str, ...]
    read: Reader
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    in_memory: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    splits: str | None = None

    def select(self, indices: Sequence[int]) -> Listing:
        """Return the images at these indices in a listing of its own, which does not hold the others if it can."""
        select = getattr(self.read, "select", None)  # of readers that hold something per image
        return replace(
            self,
            keys=tuple(self.keys[i] for i in indices),
            read=_SelectedReader(self.read, indices) if select is None else select(indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
            groups=None if self.groups is None else tuple(self.groups[i] for i in indices),
        )


class _SelectedReader:
    """Some of the images of a reader."""

    def __init__(self, read: Reader, indices: Sequence[int]) -> None:
        self._read, self._indices = read, tuple(indices)

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        return self._read(self._indices[index], least_size)


def index_keys(count: int) -> tuple[str, ...]:
    """Return the indices of a set as strings, its keys if there are no names."""
    return tuple(str(i) for i in range(count))


_KEY_BYTES = 128
"""Memory that the key of an image needs, roughly."""


def check_count(count: int, where: str, max_bytes: int) -> None:
    """Raise SourceError for a set without images, or with so many, by its header, that their keys exceed the limit."""
    if not count:
        raise SourceError(f"{where} contains no images: it has 0 rows")
    if count * _KEY_BYTES > max_bytes:
        raise SourceError(
            f"{where} has {count} images, whose keys need about {count * _KEY_BYTES} bytes of memory, and the limit is "
            f"{max_bytes} (--max-bytes); read it in parts"
        )


def check_keys(keys: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the keys; raises SourceError for equal ones, because scores are joined by key."""
    duplicates = [key for key, count in Counter(keys).items() if count > 1]
    if duplicates:
        raise SourceError(
            f"{where} has {len(duplicates)} keys more than once (first: {duplicates[0]!r}); list each image once"
        )
    return tuple(keys)


def encode_groups(values: Sequence[object], where: str) -> tuple[str, ...]:
    """Convert group values to names; raises SourceError for empty ones, which would join unrelated images."""
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(values)} groups in {where} are empty (first: row {missing[0]}); name the group of "
            "every image"
        )
    return tuple(encode_name(str(value)) for value in values)


_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def encode_labels(values: Sequence[object] | np.ndarray, where: str) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Convert label values to integers and class names.

    | values | labels |
    |---|---|
    | integers, and texts that are all written as `0`, `12` or `-1` | as they are, without names |
    | other texts, such as `01` and `1`, and booleans | indices of the sorted distinct texts, which are the names |
    | floats without a fraction | integers |
    | one number or text in a list each, as in an array of shape (N, 1) | that number or text |
    | lists of zeros and a single one (one-hot) | index of the one |

    Args:
        values: one value per image.
        where: file and column of the values, for messages.

    Raises:
        SourceError: values are empty, not numbers, not integers, lists that are not one-hot, or of several types.
    """
    cells = [_to_scalar(value) for value in values]
    missing = [row for row, cell in enumerate(cells) if _is_missing(cell)]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(cells)} labels in {where} are empty (first: row {missing[0]}); fill them in, or "
            "drop the column"
        )
    kinds = {type(cell) for cell in cells}
    if kinds == {list}:
        cells = _decode_one_hot(cells, where)
        kinds = {type(cell) for cell in cells}
    if kinds <= {int, float}:
        fractions = [cell for cell in cells if isinstance(cell, float) and not cell.is_integer()]
        if fractions:
            raise SourceError(f"{where} has labels such as {fractions[0]:g}; expected integers or class names")
        return _check_labels([int(cell) for cell in cells], where), None
    if kinds not in ({str}, {bool}):
        names = " and ".join(sorted(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds))
        raise SourceError(f"the labels in {where} are {names}; expected only integers, or only texts")
    texts = [str(cell) for cell in cells]
    if all(_CANONICAL_INTEGER.fullmatch(text) for text in texts):
        return tuple(int(text) for text in texts), None
    texts = [encode_name(text) for text in texts]
    class_names = sorted(set(texts))
    index_of = {name: index for index, name in enumerate(class_names)}
    return tuple(index_of[text] for text in texts), tuple(class_names)


_TYPE_NAMES = {int: "integers", float: "numbers", bool: "booleans", str: "texts", list: "lists", dict: "tables"}


def _to_scalar(value: Any) -> Any:
    """Convert scalars of numpy and torch to Python, arrays to lists, and bytes to text."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return _to_scalar(value[0]) if len(value) == 1 else list(value)
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _decode_one_hot(cells: Sequence[list[Any]], where: str) -> list[int]:
    lengths = {len(cell) for cell in cells}
    if len(lengths) != 1:
        raise SourceError(
            f"the labels in {where} are lists of {min(lengths)} to {max(lengths)} values; expected one label"
        )
    for row, cell in enumerate(cells):
        if not all(isinstance(value, int | float) and value in (0, 1) for value in cell) or sum(cell) != 1:
            shown = ", ".join(map(str, cell[:8])) + (", …" if len(cell) > 8 else "")
            raise SourceError(
                f"{where} has the label [{shown}] in row {row}; expected one label per image, or one-hot labels: zeros "
                "and a single one"
            )
    return [cell.index(1) for cell in cells]


def _check_labels(labels: Sequence[int], where: str) -> tuple[int, ...]:
    """Return the labels; raises SourceError for numbers that 64 bits cannot hold."""
    wrong = next((label for label in labels if not -(2**63) <= label < 2**63), None)
    if wrong is not None:
        raise SourceError(f"{where} has the label {wrong:.3g}; expected integers of 64 bits, or class names")
    return tuple(labels)
