"""Parser of image source strings: location, split, variant, class filter and selected columns. No image is read.

    name[:split][@modifiers]      a named set (default split: `train`): `fashion_mnist`, `cifar10:test`
    hf://owner/name[/config][:split][@modifiers]                            a set on the Hugging Face hub
    path[:split][@modifiers]      a folder, a glob, a table, a file of arrays, or one image file; only files and folders
                                  with several splits have a split: `pathmnist.npz:test`, `./data:train`
    scheme://…[:split][@modifiers]                   the same on an object store or web server: `s3://bucket/prefix`

Modifiers, separated by commas: one variant (`vflip`, `blur=2`), one class filter (`classes=0-7`, `classes=0,3,5`,
`classes=sandal,bag`), and the names of what is read: `array=test_images` of an .npz file, `column=photo` of a table,
`label=category` for the labels of both. What exists as a path, or holds a separator or a drive letter, is a path. What
exists on a store is not known here: `@` and `:` belong to a URL unless a modifier, or a word as a split, follows them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from farout.core.errors import FaroutError, SourceError
from farout.core.names import encode_cell, encode_file_name, encode_source, find_path
from farout.core.remote_files import check_url, is_url, local_path_of, normalize_url

__all__ = [
    "BRACES",
    "DEFAULT_STRENGTHS",
    "NO_SELECTION",
    "WILDCARDS",
    "Selection",
    "SourceSpec",
    "has_wildcards",
    "parse_spec",
]

Kind = Literal["named", "path", "hub", "url"]

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
"""The default strength of every variant; None: the variant has no strength."""

WILDCARDS = re.compile(r"[*?\[]")
"""Wildcards of a glob."""
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
"""Braces of a glob with alternatives or a range."""

_HUB = "hf://"
_SPLIT = re.compile(r"[\w.-]+")
_CHAIN = re.compile(r"[a-z][a-z0-9+.-]*::.*://")
_NAMES = re.compile(r"@(?=(?:array|column|label|classes)=)")
"""The start of modifiers whose values may contain `/` and `@`: columns such as `image/encoded`, classes."""


@dataclass(frozen=True)
class Selection:
    """What is read of a file with several arrays, columns or splits; an empty text: not given.

    Attributes:
        split: split of a file or folder with several.
        array: array of the images in an .npz file.
        column: column of the images, or of their paths, in a table.
        label: array or column of the labels.
    """

    split: str = ""
    array: str = ""
    column: str = ""
    label: str = ""

    def check_used(self, *used: str, where: str, kind: str) -> None:
        """Raise SourceError if something is given that is not in `used`, because `where` is of another kind."""
        for name in ("split", "array", "column", "label"):
            value = getattr(self, name)
            if value and name not in used:
                given = f":{value}" if name == "split" else f"@{name}={value}"
                raise SourceError(f"{where} is {kind}, for which {given} has no meaning; leave it out")


NO_SELECTION = Selection()
"""Nothing is given: the usual names of arrays and columns are used."""


@dataclass(frozen=True)
class SourceSpec:
    """A parsed source string.

    Attributes:
        text: the string.
        kind: named set, path, set of the Hugging Face hub, or URL.
        location: name of the set, path, hub id, or URL.
        split: split of the set, or of a file or folder with several; empty: none is given for a path.
        variant: modification of the images, or None.
        strength: strength of the variant, or None.
        classes: class names, labels and ranges of labels of the class filter; empty: all classes.
        array: array of the images in an .npz file; empty: not given.
        column: column of the images, or of their paths, in a table; empty: not given.
        label: array or column of the labels; empty: not given.
        modifiers: all modifiers as written.
    """

    text: str
    kind: Kind
    location: str
    split: str = ""
    variant: str | None = None
    strength: float | None = None
    classes: tuple[str, ...] = ()
    array: str = ""
    column: str = ""
    label: str = ""
    modifiers: str = ""

    @property
    def canonical(self) -> str:
        """A source string that is equal for all ways to write the same source, and opens it from any working directory.

        Paths are absolute, without links; the split of a set is given. The text is encoded like `ImageSource.name`.
        """
        location = self.location
        if self.kind == "path":
            location = encode_file_name(str(find_path(self.location).resolve()))
        elif self.kind == "url":
            location = encode_cell(normalize_url(self.location))
        split = f":{self.split}" if self.split else ""
        modifiers = f"@{encode_source(self.modifiers)}" if self.modifiers else ""
        return f"{_HUB if self.kind == 'hub' else ''}{location}{split}{modifiers}"

    @property
    def selection(self) -> Selection:
        """The selected split, array and columns."""
        return Selection(self.split, self.array, self.column, self.label)


def parse_spec(text: str, known: frozenset[str] = frozenset()) -> SourceSpec:
    """Parse a source string.

    Args:
        text: the string.
        known: names of the named sets.

    Raises:
        SourceError: the string is empty, a modifier is unknown or has a wrong strength, there is more than one variant,
            the name is both a named set and an existing path, or a URL contains a password or a signature.
    """
    if not text.strip():
        raise SourceError(
            "the image source is empty; give a named set, a folder, a glob, a file, a URL, or hf://owner/name"
        )
    if is_url(text) and not text.startswith(_HUB):
        local = local_path_of(text)
        if local is not None:
            return replace(parse_spec(local if "/" in local else f"./{local}", known), text=text)
        try:
            check_url(text)
        except FaroutError as error:
            raise SourceError(str(error)) from None
        head, modifiers = _split_url_modifiers(text)
        location, split = _split_url(head)
        kind: Kind = "url"
    else:
        if _CHAIN.match(text) and not _exists(text):
            raise SourceError(f"{text!r} is a chain of file systems of fsspec; give the URL of the store alone")
        head, modifiers = _split_modifiers(text)
        kind, location, split = _parse_location(head, known)
    variant, strength, classes, names = _parse_modifiers(modifiers, text)
    return SourceSpec(text, kind, location, split, variant, strength, classes, **names, modifiers=modifiers)


def _split_url_modifiers(text: str) -> tuple[str, str]:
    """Split a URL at the last `@`, if what follows can be modifiers rather than a part of a name."""
    named = _NAMES.search(text)
    if named:
        return text[: named.start()], text[named.end() :]
    head, mark, tail = text.rpartition("@")
    is_modifier = re.split("[,=]", tail)[0] in DEFAULT_STRENGTHS or re.fullmatch(r"[a-z0-9]*", tail) is not None
    return (head, tail) if mark and is_modifier else (text, "")


def _split_url(head: str) -> tuple[str, str]:
    """Split a URL into location and split: what follows the last `:`, if it is a word, not a number or a path."""
    location, mark, split = head.rpartition(":")
    is_split = mark and re.fullmatch(r"[A-Za-z][\w.-]*", split) is not None and "?" not in head
    return (location, split) if is_split else (head, "")


def _exists(text: str) -> bool:
    try:
        return os.path.exists(find_path(text))
    except FaroutError:  # ~ without a home folder: reported when the path is opened
        return False


def _split_modifiers(text: str) -> tuple[str, str]:
    """Split at the last `@`, unless that `@` is part of a path."""
    if _exists(text):
        return text, ""
    named = _NAMES.search(text)
    if named and named.start() and not _exists(text[: named.end()] + re.split(r"[/\\]", text[named.end() :])[0]):
        return text[: named.start()], text[named.end() :]
    head, mark, tail = text.rpartition("@")
    if not mark or not head or "/" in tail or "\\" in tail:
        return text, ""
    if not tail:
        raise SourceError(f"{text!r} ends in '@' without a modifier; expected e.g. {head}@vflip, or drop the '@'")
    return head, tail


def _parse_location(head: str, known: frozenset[str]) -> tuple[Kind, str, str]:
    if head.startswith(_HUB):
        location, _, split = head.removeprefix(_HUB).partition(":")
        if location.count("/") not in (1, 2) or not all(location.split("/")):
            raise SourceError(f"{head!r} is not a hub id; expected hf://owner/name[/config]:split")
        return "hub", location, split or "train"
    name, _, split = head.partition(":")
    if _is_path(head):
        if head in known or (split and name in known):
            named = head if ":" in head else f"{head}:train"
            alternative = f"{named} for the set" if named != head else "rename the path to use the set"
            raise SourceError(
                f"{head!r} is a named set and also an existing path; write ./{head} for the path, {alternative}"
            )
        before, _, after = head.rpartition(":")
        if before and _SPLIT.fullmatch(after) and not _exists(head) and _exists(before):
            return "path", before, after
        return "path", head, ""
    if "." in name and _SPLIT.fullmatch(split) and name not in known and _exists(name):
        return "path", name, split
    return "named", name, split or "train"


def has_wildcards(text: str) -> bool:
    """Whether a text contains a wildcard of a glob, or braces with alternatives or a range."""
    return bool(WILDCARDS.search(text) or BRACES.search(text))


def _is_path(head: str) -> bool:
    drive = re.match(r"^[A-Za-z]:", head) is not None
    return "/" in head or "\\" in head or drive or head in (".", "..") or has_wildcards(head) or _exists(head)


_Modifiers = tuple[str | None, float | None, tuple[str, ...], dict[str, str]]


def _parse_modifiers(text: str, source: str) -> _Modifiers:
    variants: list[tuple[str, float | None]] = []
    classes: list[str] = []
    names: dict[str, str] = {}
    in_classes = False
    for part in (p.strip() for p in text.split(",")) if text else ():
        name, _, value = part.partition("=")
        if name in DEFAULT_STRENGTHS:
            variants.append((name, _parse_strength(name, value, part, source)))
            in_classes = False
        elif name == "classes" and not classes:
            classes.append(value.strip())
            in_classes = True
        elif name in ("array", "column", "label") and "=" in part:
            if not value.strip() or name in names:
                raise SourceError(f"{source!r} requires one name after {name}=, such as {name}={_EXAMPLES[name]}")
            names[name] = value.strip()
            in_classes = False
        elif in_classes:
            classes.append(part)
        else:
            raise SourceError(
                f"unknown modifier {part!r} in {source!r}, and no path of that name exists; expected one of "
                f"{', '.join(DEFAULT_STRENGTHS)}, classes=..., array=..., column=..., label=..."
            )
    if len(variants) > 1:
        raise SourceError(f"{source!r} has {len(variants)} variants; expected one of {', '.join(DEFAULT_STRENGTHS)}")
    if "" in classes:
        raise SourceError(f"{source!r} has an empty class; expected e.g. classes=0-7, classes=0,3,5 or class names")
    variant, strength = variants[0] if variants else (None, None)
    return variant, strength, tuple(classes), names


_EXAMPLES = {"array": "test_images", "column": "photo", "label": "category"}
_RANGES = {"blur": (0.0, 100.0), "contrast": (0.0, 100.0), "noise": (0.0, 1.0), "patch": (0.0, 1.0)}


def _parse_strength(name: str, value: str, part: str, source: str) -> float | None:
    default = DEFAULT_STRENGTHS[name]
    if "=" not in part:
        return default
    if default is None:
        raise SourceError(f"{name} has no strength, but {source!r} has {value!r}; write {name} alone")
    low, high = _RANGES[name]
    try:
        strength = float(value)
    except ValueError:
        strength = float("nan")
    if not low < strength <= high:
        raise SourceError(f"{part!r} in {source!r}: expected a number above {low:g} and at most {high:g}")
    return strength
