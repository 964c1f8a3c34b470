"""Names of files in folders and archives: which are images, which are hidden, and how the others are counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from farout.core.names import encode_key
from farout.data.decoding import EXTRA_OF_SUFFIX, image_suffixes

__all__ = [
    "count_by_suffix",
    "encode_inner_path",
    "find_system_folder",
    "is_hidden",
    "is_image_name",
    "is_system_folder",
    "join_counts",
    "limit_descriptions",
    "suffix_of",
]

_SYSTEM_FOLDERS = frozenset(
    name.lower()
    for name in (
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "@eaDir",
        "@Recently-Snapshot",
        "@Recycle",
        "@__thumb",
        "@sharebin",
        "@tmp",
        "__MACOSX",
        "__pycache__",
        ".ipynb_checkpoints",
        "Config.Msi",
        "FOUND.000",
        "lost+found",
        "MSOCache",
        "Network Trash Folder",
        "RECYCLED",
        "RECYCLER",
        "System Volume Information",
        "Temporary Items",
        "TheVolumeSettingsFolder",
        "~snapshot",
    )
)
"""Folders that operating systems, storage devices and programs make for themselves."""

_USUAL_SUFFIX = re.compile(r"\.[a-z0-9][a-z0-9+_~-]{0,14}")
_MAX_SUFFIXES = 20
"""Number of different suffixes that are counted one by one: numbered files, such as `scan.0001`, have one each."""


def suffix_of(name: str) -> str:
    """Return the suffix in lower case, such as `.png`; empty if there is none."""
    suffix = os.path.splitext(name)[1].lower()
    return "" if suffix == "." else suffix


def encode_inner_path(path: str) -> str:
    """Return a path in an archive or on a store as a key; an absolute one, or one with `..`, leads out of no folder."""
    key = encode_key(path)
    if ".." in key:
        key = "/".join("%2E%2E" if part == ".." else part for part in key.split("/"))
    return f"%2F{key[1:]}" if key.startswith("/") else key


def is_image_name(name: str) -> bool:
    """Whether a file of this name is listed as an image."""
    return suffix_of(name) in image_suffixes()


def is_system_folder(name: str) -> bool:
    """Whether a folder belongs to the operating system, a storage device or a program, such as `@eaDir`."""
    return name.lower() in _SYSTEM_FOLDERS


def find_system_folder(path: str) -> str | None:
    """Return the first folder of a `/`-separated path that is a system folder; None if there is none."""
    return next((folder for folder in path.split("/")[:-1] if is_system_folder(folder)), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden and therefore not counted; system folders are counted."""
    return name.startswith(".") and not is_system_folder(name)


def _describe_suffix(name: str) -> str:
    """Describe why a file that is not an image is left out, by its suffix: `.txt`, `.heic (install farout[heic])`."""
    suffix = suffix_of(name)
    if suffix in EXTRA_OF_SUFFIX and suffix not in image_suffixes():
        return f"{suffix} (install farout[{EXTRA_OF_SUFFIX[suffix]}])"
    if not suffix:
        return "without suffix"
    return suffix if _USUAL_SUFFIX.fullmatch(suffix) else "with another suffix"


def count_by_suffix(names: Iterable[str]) -> Counter[str]:
    """Count the files of these names by the description of their suffix."""
    return Counter(_describe_suffix(name) for name in names)


def limit_descriptions(left_out: Mapping[str, int]) -> dict[str, int]:
    """Return the most frequent descriptions first; beyond a number of suffixes, the rare ones are counted together."""
    ranked = sorted(((what, count) for what, count in left_out.items() if count), key=lambda item: (-item[1], item[0]))
    suffixes = [what for what, _ in ranked if _USUAL_SUFFIX.fullmatch(what)]
    rare = set(suffixes[_MAX_SUFFIXES:])
    kept = {what: count for what, count in ranked if what not in rare}
    if rare:
        kept["with another suffix"] = kept.get("with another suffix", 0) + sum(left_out[what] for what in rare)
    return kept


def join_counts(left_out: Mapping[str, int]) -> str:
    """Return the counts as a text: `25 .heic (install farout[heic]), 2 .txt, 3 without suffix`."""
    return ", ".join(f"{count} {what}" for what, count in left_out.items())
