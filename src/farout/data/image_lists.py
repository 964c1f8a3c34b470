"""Readers of lists of image files: csv tables. An image file is read when the image is accessed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from farout.core.errors import SourceError
from farout.data.file_listing import Listing, check_keys, encode_groups, encode_labels
from farout.data.image_files import FileReader, find_listed_file
from farout.data.read_settings import DEFAULT_READING, ReadSettings

__all__ = ["list_csv"]


def list_csv(path: Path, reading: ReadSettings = DEFAULT_READING) -> Listing:
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
    cells = [cell.replace("\\", "/") for cell in _read_column(rows, column, path)]
    located = [find_listed_file(path.parent, cell) for cell in cells]
    keys = check_keys([key for key, _ in located], str(path))
    labels, names = encode_labels([row["label"] for row in rows], str(path)) if "label" in rows[0] else (None, None)
    groups = encode_groups([row["group"] for row in rows], str(path)) if "group" in rows[0] else None
    return Listing(keys, FileReader(keys, [file for _, file in located], reading), labels, names, groups)


def _read_column(rows: Sequence[Mapping[str, str | None]], name: str, path: Path) -> tuple[str, ...]:
    cells = tuple(row[name] or "" for row in rows)
    if "" in cells:
        raise SourceError(f"{path}: the column {name} is empty in row {cells.index('') + 1}; fill it in")
    return cells
