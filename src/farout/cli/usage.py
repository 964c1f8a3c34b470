"""Wrong usage of the command line."""

from __future__ import annotations

from farout.core.errors import FaroutError

__all__ = ["UsageError"]


class UsageError(FaroutError):
    """Words that make no command; exit status 2."""
