"""The grammar of image sources: a string becomes a location, a split, a variant and a class filter; no image is read.

    name[:split][@modifiers]      a named set (split `train` where none is given): `fashion_mnist`, `cifar10:test`
    hf://owner/name[/config][:split][@modifiers]                            a set on the Hugging Face hub
    path[@modifiers]              a folder, a glob, a .parquet, .csv or .npz file, or one image file

Modifiers, separated by commas: one variant (`vflip`, `blur=2`) and one class filter (`classes=0-7`, `classes=0,3,5`,
`classes=sandal,bag`). What exists as a path, or holds a separator or a drive letter, is a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from farout.core.errors import SourceError

__all__ = ["DEFAULT_STRENGTHS", "SourceSpec", "parse_spec"]

Kind = Literal["named", "path", "hub"]

DEFAULT_STRENGTHS: dict[str, float | None] = {
    "vflip": None,
    "hflip": None,
    "rot90": None,
    "rot180": None,
    "rot270": None,
    "blur": 1.0,
    "contrast": 0.5,
    "noise": 0.1,
    "patch": 0.5,
}
"""Every variant and its strength where none is given; None: it takes no strength."""

_HUB = "hf://"
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceSpec:
    """A parsed source: `kind` and `location` (set name, path, or hub id), `split` ("" for paths), and modifiers."""

    text: str
    kind: Kind
    location: str
    split: str = ""
    variant: str | None = None
    strength: float | None = None
    classes: tuple[str, ...] = ()


def parse_spec(text: str, known: frozenset[str] = frozenset()) -> SourceSpec:
    """Parses a source string; `known` are the names of the named sets.

    Raises SourceError for an empty string, an unknown modifier or strength, more than one variant, and for a name
    that is a named set and an existing path at once.
    """
    if not text.strip():
        raise SourceError("the image source is empty; give a named set, a folder, a glob, a file, or hf://owner/name")
    head, modifiers = _cut_modifiers(text)
    variant, strength, classes = _parse_modifiers(modifiers, text)
    kind, location, split = _place(head, known)
    return SourceSpec(text, kind, location, split, variant, strength, classes)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _cut_modifiers(text: str) -> tuple[str, str]:
    """Splits at the last `@`, unless that `@` belongs to a path."""
    head, mark, tail = text.rpartition("@")
    if not mark or not head or _exists(text) or "/" in tail or "\\" in tail:
        return text, ""
    if not tail:
        raise SourceError(f"{text!r} ends in '@' without a modifier; expected e.g. {head}@vflip, or drop the '@'")
    return head, tail


def _place(head: str, known: frozenset[str]) -> tuple[Kind, str, str]:
    if head.startswith(_HUB):
        location, _, split = head.removeprefix(_HUB).partition(":")
        if location.count("/") not in (1, 2) or not all(location.split("/")):
            raise SourceError(f"{head!r} is not a hub id; expected hf://owner/name[/config]:split")
        return "hub", location, split or "train"
    name, _, split = head.partition(":")
    if _is_path(head):
        if head in known or (split and name in known):
            raise SourceError(_both(head))
        return "path", head, ""
    return "named", name, split or "train"


def _is_path(head: str) -> bool:
    drive = re.match(r"^[A-Za-z]:", head) is not None
    return "/" in head or "\\" in head or drive or head in (".", "..") or bool(_WILD.search(head)) or _exists(head)


def _both(head: str) -> str:
    named = head if ":" in head else f"{head}:train"
    elsewhere = f"{named} for the set" if named != head else "rename the path to use the set"
    return f"{head!r} is a named set and also a path that exists here; write ./{head} for the path, {elsewhere}"


def _parse_modifiers(text: str, whole: str) -> tuple[str | None, float | None, tuple[str, ...]]:
    variants: list[tuple[str, float | None]] = []
    classes: list[str] = []
    in_classes = False
    for part in (p.strip() for p in text.split(",")) if text else ():
        name, _, value = part.partition("=")
        if name in DEFAULT_STRENGTHS:
            variants.append((name, _strength(name, value, part, whole)))
            in_classes = False
        elif name == "classes" and not classes:
            classes.append(value.strip())
            in_classes = True
        elif in_classes:
            classes.append(part)
        else:
            raise SourceError(_unknown_modifier(part, whole))
    if len(variants) > 1:
        raise SourceError(f"{whole!r} asks for {len(variants)} variants; expected one of {_names()}")
    if "" in classes:
        raise SourceError(f"{whole!r} has an empty class; expected e.g. classes=0-7, classes=0,3,5 or class names")
    variant, strength = variants[0] if variants else (None, None)
    return variant, strength, tuple(classes)


def _names() -> str:
    return ", ".join(DEFAULT_STRENGTHS)


def _unknown_modifier(part: str, whole: str) -> str:
    expected = f"expected one of {_names()}, classes=..."
    return f"unknown modifier {part!r} in {whole!r}, and no path of that name exists; {expected}"


_RANGES = {"blur": (0.0, 100.0), "contrast": (0.0, 100.0), "noise": (0.0, 1.0), "patch": (0.0, 1.0)}


def _strength(name: str, value: str, part: str, whole: str) -> float | None:
    default = DEFAULT_STRENGTHS[name]
    if "=" not in part:
        return default
    if default is None:
        raise SourceError(f"{name} takes no strength, but {whole!r} gives {value!r}; write {name} alone")
    low, high = _RANGES[name]
    try:
        strength = float(value)
    except ValueError:
        strength = float("nan")
    if not low < strength <= high:
        raise SourceError(f"{part!r} in {whole!r}: expected a number above {low:g} and at most {high:g}")
    return strength
