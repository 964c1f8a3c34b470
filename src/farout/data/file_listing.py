"""What every reader gives: keys, labels and groups of a set, and a function that reads one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from farout.core.errors import SourceError

__all__ = ["Listing", "check_keys", "encode_groups", "encode_labels", "index_keys"]


@dataclass(frozen=True)
class Listing:
    """A set before it is read; `read(i)` gives image i as uint8 `(C, H, W)` or raises UnreadableImageError."""

    keys: tuple[str, ...]
    read: Callable[[int], Tensor]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    in_memory: bool = False  # pixels are held already, so caching them would only copy them


def index_keys(count: int) -> tuple[str, ...]:
    """The indices of a set as strings."""
    return tuple(str(i) for i in range(count))


def check_keys(keys: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the keys; raises SourceError when two are equal, for scores are joined by key."""
    doubled = [key for key, count in Counter(keys).items() if count > 1]
    if doubled:
        raise SourceError(f"{where} names {doubled[0]!r} more than once ({len(doubled)} such); list each image once")
    return tuple(keys)


def encode_groups(values: Sequence[object], where: str) -> tuple[str, ...]:
    """Turns group values into names; raises SourceError for empty ones, which would join unrelated images."""
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise SourceError(f"{missing} of {len(values)} groups in {where} are empty; name the group of every image")
    return tuple(str(value) for value in values)


def encode_labels(values: Sequence[object], where: str) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """Turns integers into labels as they are, and texts into indices of their sorted distinct values.

    Raises SourceError for empty values: a class is never made up.
    """
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise SourceError(f"{missing} of {len(values)} labels in {where} are empty; fill them in, or drop the column")
    texts = [str(value) for value in values]
    try:
        return tuple(int(text) for text in texts), None
    except ValueError:
        names = sorted(set(texts))
        place = {name: i for i, name in enumerate(names)}
        return tuple(place[text] for text in texts), tuple(names)
