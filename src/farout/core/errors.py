"""Errors and warnings that name what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ConstantScoresWarning",
    "FaroutError",
    "FaroutWarning",
    "MissingExtraError",
    "NaNScoresWarning",
    "ShortfallWarning",
    "SourceError",
    "StoreError",
    "TrapWarning",
    "UnreadableImageError",
    "UsageError",
    "check_options",
    "suggest_names",
]


class FaroutError(Exception):
    """A mistake that the caller can mend; the command line prints it without a traceback."""


class SourceError(FaroutError, ValueError):
    """An image source that cannot be opened or is empty."""


class UnreadableImageError(FaroutError, ValueError):
    """One image that cannot be decoded; its message starts with the image's key."""


class StoreError(FaroutError, ValueError):
    """A model or score folder that is missing, incomplete, of another kind or version, or altered."""


class MissingExtraError(FaroutError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class UsageError(FaroutError):
    """Wrong usage of the command line: exit status 2."""


class FaroutWarning(UserWarning):
    """Base of all warnings of this library."""


class NaNScoresWarning(FaroutWarning):
    """Some scores are not numbers; they are left out of every metric and counted."""


class ConstantScoresWarning(FaroutWarning):
    """All scores are equal: they say nothing, and the AUROC is one half by definition."""


class ShortfallWarning(FaroutWarning):
    """Fewer images than a split or a statistic wants."""


class TrapWarning(FaroutWarning):
    """A known trap of evaluation: native size, value range, precision, AUROC below one half."""


def check_options(options: object, word: str, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises FaroutError for the first of the rules that does not hold; `word` says what kind of options these are.

    A rule: the option's name, whether it holds, what is expected.
    """
    for name, holds, expected in rules:
        if not holds:
            raise FaroutError(f"the {word} {name} is {getattr(options, name)!r}; expected {expected}")


def suggest_names(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` where something known is near, else the list of what is known."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)] or get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
