"""Readers of folders and globs. An image file is read when the image is accessed."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from farout.core.errors import SourceError
from farout.core.names import decode_key, encode_key, encode_name, find_path, normalize_name
from farout.core.store import kind_of, read_json
from farout.data.array_files import list_npz
from farout.data.decoding import image_suffixes
from farout.data.file_listing import Listing
from farout.data.image_files import FileReader
from farout.data.image_lists import LIST_SUFFIXES, list_image_table
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection
from farout.data.tables import list_parquet

__all__ = ["CLASSES_FILE", "list_path"]

CLASSES_FILE = "farout-classes.json"
"""JSON file next to the class folders that maps folders to classes, for class names that no folder can have."""


def list_path(location: str, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION) -> Listing:
    """List a folder, a glob, a .parquet/.csv/.npz file or one image; raises SourceError if there are no images."""
    path = find_path(location)
    if path.is_dir():
        return _list_folder(path, reading)
    if path.is_file():
        return _list_file(path, reading, selection)
    if re.search(r"[*?\[]", location):
        return _list_glob(str(path), reading)
    raise SourceError(f"{location!r} is neither an existing path nor a named set (`farout list sets`)")


def _list_file(path: Path, reading: ReadSettings, selection: Selection) -> Listing:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return list_parquet(path, reading)
    if suffix in LIST_SUFFIXES:
        return list_image_table(path, reading, selection)
    if suffix == ".npz":
        return list_npz(path, reading)
    if suffix in image_suffixes():
        key = encode_key(path.name)
        return Listing((key,), FileReader((key,), (path,), reading), groups=(".",))
    raise SourceError(f"{path} is not an image source; expected a folder, .parquet, .csv, .npz, or an image file")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def _list_folder(root: Path, reading: ReadSettings) -> Listing:
    """List the images below `root`, without hidden files and folders; links to folders are not followed.

    Of a folder that farout has written, only its `images/` are listed: it also contains figures.
    """
    files_found: list[str] = []
    root = root / "images" if (root / "images").is_dir() and kind_of(root) is not None else root
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files_found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if _is_image(name)]
    if not files_found:
        raise SourceError(
            f"the folder {root} contains no images (looked for {', '.join(sorted(image_suffixes()))}, recursively)"
        )
    pairs = sorted((encode_key(name), name) for name in files_found)
    keys = tuple(key for key, _ in pairs)
    labels, names = _class_folders(keys, root)
    reader = FileReader(keys, [root / name for _, name in pairs], reading)
    return Listing(keys, reader, labels, names, _parents(keys))


def _parents(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(key.rpartition("/")[0] or "." for key in keys)


def _class_folders(keys: Sequence[str], root: Path) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return labels and class names if every image is directly in a first-level subfolder, else None.

    The class of a folder is its name, or that in `CLASSES_FILE`. The labels are in the order of the folders' names.
    """
    if any(key.count("/") != 1 for key in keys):
        return None, None
    parents = _parents(keys)
    folders = {parent: encode_name(decode_key(parent)) for parent in sorted(set(parents))}
    names = tuple(sorted(set(folders.values())))
    index_of = {name: index for index, name in enumerate(names)}
    labels = tuple(index_of[folders[parent]] for parent in parents)
    path = root / CLASSES_FILE
    if not path.is_file():
        return labels, names
    classes = read_json(path)
    if not all(isinstance(name, str) for name in classes.values()):
        raise SourceError(f"{path} must contain a class name for each folder; correct or remove it")
    return labels, tuple(normalize_name(classes.get(name, name)) for name in names)


def _list_glob(pattern: str, reading: ReadSettings) -> Listing:
    # a pattern with several ** finds a path several times
    matches = sorted({Path(match) for match in glob.glob(pattern, recursive=True)})
    paths = [path for path in matches if path.is_file() and _is_image(path.name)]
    if not paths:
        kinds = ", ".join(sorted(image_suffixes()))
        raise SourceError(f"the glob {pattern} matches {len(matches)} paths and no images (looked for {kinds})")
    root = _fixed_part(pattern)
    pairs = sorted((encode_key(path.relative_to(root).as_posix()), path) for path in paths)
    keys = tuple(key for key, _ in pairs)
    return Listing(keys, FileReader(keys, [path for _, path in pairs], reading), groups=_parents(keys))


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    return Path(*parts[:fixed])
