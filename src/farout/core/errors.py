"""Errors and warnings that name what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = [
    "ConstantScoresWarning",
    "DamagedFileWarning",
    "FaroutError",
    "FaroutWarning",
    "LeftOutWarning",
    "MisleadingResultWarning",
    "MissingExtraError",
    "NaNScoresWarning",
    "ReadError",
    "SourceError",
    "SourceWarning",
    "StoreError",
    "TooFewImagesWarning",
    "UnknownArgumentError",
    "UnreachableStoreError",
    "UnreadableImageError",
    "UsageError",
    "WriteError",
    "check_options",
    "suggest_names",
]


class FaroutError(Exception):
    """An error that the caller can correct; the command line prints it without a traceback."""


class SourceError(FaroutError, ValueError):
    """An image source that cannot be opened or is empty."""


class UnreadableImageError(FaroutError, ValueError):
    """One image that cannot be decoded; its message starts with the image's key."""


class UnreachableStoreError(FaroutError):
    """An object store that did not answer several times in a row, so that its images are not unreadable ones."""


class StoreError(FaroutError, ValueError):
    """A model or score folder that is missing, incomplete, of another kind or version, or altered."""


class _FileError(FaroutError, OSError):
    """A file or folder that the system does not let farout use; also an OSError, with its `errno` and `strerror`."""

    _action = ""

    def __init__(self, path: object, reason: str, errno: int | None = None, hint: str = "") -> None:
        super().__init__(errno, reason, str(path))
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:  # by default, an OSError is copied to other processes by its arguments
        return type(self), (self.filename, self.strerror, self.errno, self.hint)

    def __str__(self) -> str:
        return f"cannot {self._action} {self.filename}: {self.strerror}{f'; {self.hint}' if self.hint else ''}"


class ReadError(_FileError):
    """A file or folder that cannot be read: "cannot read PATH: REASON"."""

    _action = "read"


class WriteError(_FileError):
    """A file or folder that cannot be written, such as on a full disk: "cannot write PATH: REASON"."""

    _action = "write"


class MissingExtraError(FaroutError, ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


class UsageError(FaroutError):
    """Wrong usage of the command line: exit status 2."""


class UnknownArgumentError(FaroutError, TypeError):
    """A constructor or function has no argument of this name."""


class FaroutWarning(UserWarning):
    """Base class of all warnings of this library."""


class DamagedFileWarning(FaroutWarning):
    """A file that farout wrote was changed or cut short; what it contained is computed again."""


class NaNScoresWarning(FaroutWarning):
    """Some scores are not numbers; they are excluded from every metric and counted."""


class ConstantScoresWarning(FaroutWarning):
    """All scores are equal: they carry no information, and the AUROC is one half by definition."""


class TooFewImagesWarning(FaroutWarning):
    """There are fewer images than a split or a statistic requires."""


class LeftOutWarning(FaroutWarning):
    """Files, frames or images of a source are left out; the message counts them by reason."""


class MisleadingResultWarning(FaroutWarning):
    """A result may mislead, for example because of native sizes, value ranges or an AUROC below one half."""


class SourceWarning(FaroutWarning):
    """Something in an image source is not used, or is used by a rule that the user may not expect: columns, labels."""


def check_options(options: object, kind: str, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise FaroutError for the first rule that is violated.

    Args:
        options: an object with the options as attributes.
        kind: what kind of options they are, for the message.
        rules: for each rule the name of the option, whether the rule holds, and what is expected.
    """
    for name, holds, expected in rules:
        if not holds:
            raise FaroutError(f"the {kind} {name} is {getattr(options, name)!r}; expected {expected}")


def suggest_names(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: "did you mean …?" if known names are similar, else the list of known names."""
    names = list(known)
    similar = [name for name in names if word and name.startswith(word)] or get_close_matches(word, names, n=3)
    return f"did you mean {' or '.join(similar)}?" if similar else f"known: {', '.join(names) or 'none'}"
