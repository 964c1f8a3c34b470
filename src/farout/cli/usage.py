"""Wrong usage of the command line, and what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from farout.errors import FaroutError

__all__ = ["UsageError", "meant"]


class UsageError(FaroutError):
    """Words that make no command; exit status 2."""


def meant(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` where something known is near, else the list of what is known."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)] or get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
