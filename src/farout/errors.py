"""Errors and warnings that name what was given, what was expected and what to do."""

from __future__ import annotations

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
