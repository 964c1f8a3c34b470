"""Readers of folders, globs, csv lists and npz arrays. An image file is read when the image is accessed."""

from __future__ import annotations

import csv
import glob
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.store import kind_of, read_json
from farout.data.decoding import decode, to_uint8
from farout.data.file_listing import Listing, check_keys, encode_groups, encode_labels, index_keys
from farout.data.tables import list_parquet

__all__ = ["CLASSES_FILE", "SUFFIXES", "list_array", "list_path"]

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""File endings, in any case, that count as images in folders and globs."""

CLASSES_FILE = "farout-classes.json"
"""JSON file next to the class folders that maps folders to classes, for class names that no folder can have."""


def list_path(location: str) -> Listing:
    """List a folder, a glob, a .parquet/.csv/.npz file or one image; raises SourceError if there are no images."""
    path = Path(location).expanduser()
    if path.is_dir():
        return _list_folder(path)
    if path.is_file():
        return _list_file(path)
    if re.search(r"[*?\[]", location):
        return _list_glob(str(path))
    raise SourceError(f"{location!r} is neither an existing path nor a named set (`farout list sets`)")


def _list_file(path: Path) -> Listing:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return list_parquet(path)
    if suffix == ".csv":
        return _list_csv(path)
    if suffix == ".npz":
        return _list_npz(path)
    if suffix in SUFFIXES:
        return Listing((path.name,), _FileReader((path.name,), (path,)), groups=(".",))
    raise SourceError(f"{path} is not an image source; expected a folder, .parquet, .csv, .npz, or an image file")


class _FileReader:
    """Reads image files by index."""

    def __init__(self, keys: Sequence[str], paths: Sequence[Path]) -> None:
        self._keys, self._paths = tuple(keys), tuple(paths)

    def __call__(self, index: int) -> Tensor:
        key = self._keys[index]
        try:
            data = self._paths[index].read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{key}: {error.strerror or error} ({type(error).__name__})") from error
        return decode(data, key)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _list_folder(root: Path) -> Listing:
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
            f"the folder {root} contains no images (looked for {', '.join(sorted(SUFFIXES))}, recursively)"
        )
    keys = tuple(sorted(files_found))
    labels, names = _class_folders(keys)
    return Listing(
        keys, _FileReader(keys, [root / key for key in keys]), labels, _read_class_names(root, names), _parents(keys)
    )


def _parents(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(key.rpartition("/")[0] or "." for key in keys)


def _class_folders(keys: Sequence[str]) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return labels and class names if every image is directly in a first-level subfolder, else None."""
    if any(key.count("/") != 1 for key in keys):
        return None, None
    parents = _parents(keys)
    names = tuple(sorted(set(parents)))
    index_of = {name: index for index, name in enumerate(names)}
    return tuple(index_of[parent] for parent in parents), names


def _read_class_names(root: Path, folders: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the class of each folder: from `CLASSES_FILE`, otherwise the name of the folder."""
    path = root / CLASSES_FILE
    if folders is None or not path.is_file():
        return folders
    classes = read_json(path)
    if not all(isinstance(name, str) for name in classes.values()):
        raise SourceError(f"{path} must contain a class name for each folder; correct or remove it")
    return tuple(classes.get(folder, folder) for folder in folders)


def _list_glob(pattern: str) -> Listing:
    # a pattern with several ** finds a path several times
    matches = sorted({Path(match) for match in glob.glob(pattern, recursive=True)})
    paths = [path for path in matches if path.is_file() and _is_image(path.name)]
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise SourceError(f"the glob {pattern} matches {len(matches)} paths and no images (looked for {kinds})")
    root = _fixed_part(pattern)
    pairs = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    keys = tuple(key for key, _ in pairs)
    return Listing(keys, _FileReader(keys, [path for _, path in pairs]), groups=_parents(keys))


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    return Path(*parts[:fixed])


def _list_csv(path: Path) -> Listing:
    """List a table with the columns `path` (or `image`, `file`, `filename`, `key`), and optionally `label`, `group`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as csv ({error}); expected UTF-8 text with a header line") from error
    if not rows:
        raise SourceError(f"{path} lists no images; expected a header line and one line per image")
    column = next((name for name in ("path", "image", "file", "filename", "key") if name in rows[0]), None)
    if column is None:
        raise SourceError(f"{path} has columns {', '.join(map(str, rows[0]))}; expected one named path")
    keys = check_keys([cell.replace("\\", "/") for cell in _read_column(rows, column, path)], str(path))
    labels, names = encode_labels([row["label"] for row in rows], str(path)) if "label" in rows[0] else (None, None)
    groups = encode_groups([row["group"] for row in rows], str(path)) if "group" in rows[0] else None
    return Listing(keys, _FileReader(keys, [path.parent / key for key in keys]), labels, names, groups)


def _read_column(rows: Sequence[Mapping[str, str | None]], name: str, path: Path) -> tuple[str, ...]:
    cells = tuple(row[name] or "" for row in rows)
    if "" in cells:
        raise SourceError(f"{path}: the column {name} is empty in row {cells.index('') + 1}; fill it in")
    return cells


def _list_npz(path: Path) -> Listing:
    """List the array `images` (or the first with three or four axes) with `labels`, or `x_images` with `x_labels`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = _image_array(arrays, path)
            images = arrays[name]
            label_name = next(
                (n for n in ("labels", name.replace("images", "labels")) if n != name and n in arrays), None
            )
            labels = arrays[label_name].reshape(-1).tolist() if label_name else None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path} cannot be read as npz without pickle ({error})") from error
    return list_array(_channels_first(images, path), labels, str(path))


def _image_array(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    if "images" in arrays:
        return "images"
    name = next((name for name in arrays if arrays[name].ndim in (3, 4)), None)
    if name is None:
        raise SourceError(f"{path} has arrays {', '.join(arrays) or 'none'}; expected images of shape (N, H, W[, C])")
    return name


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    """Convert (N, H, W), (N, C, H, W) or (N, H, W, C) to (N, C, H, W); if both of the last fit, channels are first."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise SourceError(
        f"{path} contains images of shape {images.shape}; expected (N, H, W), (N, C, H, W) or (N, H, W, C)"
    )


def list_array(images: np.ndarray | Tensor, labels: Sequence[object] | None = None, where: str = "images") -> Listing:
    """List pixels (B, C, H, W) in memory: uint8, or floats in [0, 1], which are rounded to 8 bits."""
    tensor = images.detach().cpu() if isinstance(images, Tensor) else _from_numpy(images, where)
    if tensor.ndim != 4:
        hint = "; add the channel: images[:, None]" if tensor.ndim == 3 else ""
        raise SourceError(f"{where} have shape {tuple(tensor.shape)}, expected (B, C, H, W){hint}")
    if not len(tensor):
        raise SourceError(f"{where} are empty: shape {tuple(tensor.shape)}; give at least one image")
    pixels = to_uint8(tensor, where)
    if labels is not None and len(labels) != len(pixels):
        raise SourceError(
            f"{where} contain {len(pixels)} images and {len(labels)} labels; expected one label per image"
        )
    codes, names = (None, None) if labels is None else encode_labels(labels, where)
    return Listing(index_keys(len(pixels)), pixels.__getitem__, codes, names, in_memory=True)


def _from_numpy(images: np.ndarray, where: str) -> Tensor:
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise SourceError(f"{where} have type {images.dtype}, expected uint8 or floats in [0, 1]; convert them first")
    return torch.from_numpy(np.ascontiguousarray(images))
