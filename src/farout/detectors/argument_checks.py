"""Checks of constructor arguments that several detectors have."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from farout.core.config import Configured
from farout.core.errors import FaroutError

__all__ = ["check_literals", "sort_levels"]


def check_literals(method: Configured) -> None:
    """Raise FaroutError for an argument that is none of the values of its `Literal` annotation."""
    for cls in type(method).__mro__:
        hints = get_type_hints(vars(cls)["__init__"]) if "__init__" in vars(cls) else {}
        for name in hints.keys() & method.config.keys():
            hint = hints[name]
            options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if not all(get_origin(option) is Literal or option is NoneType for option in options):
                continue
            allowed = [value for option in options for value in (get_args(option) or (None,))]
            if method.config[name] not in allowed:
                expected = ", ".join(map(str, allowed))
                raise FaroutError(f"{name} is {method.config[name]!r}; expected one of {expected}")


def sort_levels(levels: Sequence[int], steps: int, lowest: int = 0) -> tuple[int, ...]:
    """The levels in ascending order.

    Raises FaroutError unless they are different levels of a schedule of `steps` levels, from `lowest` on.
    """
    if not levels or len(set(levels)) < len(levels) or min(levels) < lowest or max(levels) >= steps:
        raise FaroutError(f"levels must be different values from {lowest} to {steps - 1}, got {list(levels)}")
    return tuple(sorted(levels))
