"""Checks of settings that several detectors have."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from farout.core.config import Configured
from farout.core.errors import FaroutError

__all__ = ["check_words", "checked_levels"]


def check_words(method: Configured) -> None:
    """Raises FaroutError for a setting that is none of the words (`Literal`) of its constructor's signature."""
    for kind in type(method).__mro__:
        hints = get_type_hints(vars(kind)["__init__"]) if "__init__" in vars(kind) else {}
        for name in hints.keys() & method.config.keys():
            words, given = _words(hints[name]), method.config[name]
            if words and given not in words:
                raise FaroutError(f"{name} is {given!r}; expected one of {', '.join(map(str, words))}")


def _words(hint: Any) -> tuple[Any, ...]:
    """What a Literal, or one or None, allows; nothing for other types."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    allowed = [get_args(part) if get_origin(part) is Literal else (None,) * (part is NoneType) for part in parts]
    return tuple(word for words in allowed for word in words) if all(allowed) else ()


def checked_levels(levels: Sequence[int], steps: int, lowest: int = 0) -> tuple[int, ...]:
    """The levels, rising; raises FaroutError unless they are different ones of a schedule of `steps`, from `lowest`."""
    if not levels or len(set(levels)) < len(levels) or min(levels) < lowest or max(levels) >= steps:
        raise FaroutError(f"levels must be different values from {lowest} to {steps - 1}, got {list(levels)}")
    return tuple(sorted(levels))
