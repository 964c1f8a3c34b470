"""The result of every reader: keys, labels and groups of a set, and a function that reads one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from farout.core.errors import SourceError

__all__ = ["Listing", "check_keys", "encode_groups", "encode_labels", "index_keys"]


@dataclass(frozen=True)
class Listing:
    """A set of images that are not decoded yet.

    Attributes:
        keys: unique key of each image.
        read: returns image i as uint8 (C, H, W), or raises UnreadableImageError.
        labels: label of each image, or None.
        class_names: name of each label, or None.
        groups: group of each image, or None.
        in_memory: whether the pixels are in memory already, so that caching them would only copy them.
    """

    keys: tuple[str, ...]
    read: Callable[[int], Tensor]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    in_memory: bool = False


def index_keys(count: int) -> tuple[str, ...]:
    """Return the indices of a set as strings, its keys if there are no names."""
    return tuple(str(i) for i in range(count))


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
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise SourceError(f"{missing} of {len(values)} groups in {where} are empty; name the group of every image")
    return tuple(str(value) for value in values)


def encode_labels(values: Sequence[object], where: str) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Convert label values to integers and class names.

    Integers are labels as they are, without names. Other values are class names; their labels are the indices of the
    sorted distinct names. Raises SourceError for empty values.
    """
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise SourceError(f"{missing} of {len(values)} labels in {where} are empty; fill them in, or drop the column")
    texts = [str(value) for value in values]
    try:
        return tuple(int(text) for text in texts), None
    except ValueError:
        names = sorted(set(texts))
        index_of = {name: index for index, name in enumerate(names)}
        return tuple(index_of[text] for text in texts), tuple(names)
