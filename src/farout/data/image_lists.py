"""Readers of lists of image files: csv, tsv, jsonl and txt. An image file is read when the image is accessed.

The tables have a column of paths, relative to the table or absolute, or of URLs, and optionally columns of labels,
groups and keys (`farout.data.columns`). A .txt file has one path per line, or, as OpenOOD's image lists, a path and a
label.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from farout.core.errors import FaroutError, SourceError, UnreadableImageError
from farout.core.names import encode_key
from farout.core.remote_files import FilePath, RemotePath, is_url, local_path_of
from farout.data.columns import (
    GROUP_COLUMNS,
    KEY_COLUMNS,
    PATH_COLUMNS,
    find_column,
    find_columns,
    join_names,
    read_groups,
    read_keys,
    read_labels,
)
from farout.data.file_listing import Listing
from farout.data.file_names import encode_inner_path, is_image_name
from farout.data.image_files import find_listed_file, list_image_files
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection
from farout.data.untrusted_files import read_bytes

__all__ = ["LIST_SUFFIXES", "find_metadata", "list_image_table", "locate_file"]

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
"""File endings of lists of image files."""

_UNDECODED = re.compile("[\ud800-\udfff]")


def list_image_table(
    path: FilePath, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION
) -> Listing:
    """List the image files of a table; raises SourceError if it cannot be read or has no column of paths."""
    selection.check_used("column", "label", where=str(path), kind="a list of image files")
    try:
        text = _decode_text(read_bytes(path, reading.max_bytes), path)
    except UnreadableImageError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _list_lines(path, text, reading, selection)
    columns, rows = _parse_json_lines(text, path) if suffix in (".jsonl", ".ndjson") else _parse_csv(text, path)
    if not rows:
        raise SourceError(f"{path} lists no images; expected a header line and one line per image")
    if selection.column:
        column = find_column(selection.column, columns, str(path), "column")
    else:
        found = find_columns(columns, PATH_COLUMNS)
        if not found:
            hint = f"@column={columns[0][:60]} names another"
            if any(is_image_name(name) for name in columns):
                hint = "the first line must contain the names of the columns"
            raise SourceError(
                f"{path} has columns {join_names(columns)}; expected one named path, file_name, image, …; {hint}"
            )
        column = found[0]

    def read(name: str) -> Sequence[Any]:
        index = columns.index(name)
        return [row[index] for row in rows]

    others = [name for name in columns if name != column]
    if any(isinstance(cell, str) and _UNDECODED.search(cell) for name in others for cell in (name, *read(name))):
        raise SourceError(
            f"{path} is not UTF-8 text: some bytes outside the column {column} cannot be decoded; save it as UTF-8"
        )
    label_columns = [name for name in others if find_columns([name], (*GROUP_COLUMNS, *KEY_COLUMNS)) == []]
    _, labels, names = read_labels(others, read, str(path), chosen=selection.label, others=label_columns)
    _, groups = read_groups(others, read, str(path))
    located = [locate_file(cell, path.parent) for cell in _check_paths(read(column), f"{path}, column {column}")]
    keys = read_keys(others, read, str(path)) or [key for key, _ in located]
    return list_image_files(
        keys,
        [file for _, file in located],
        reading,
        str(path),
        labels=labels,
        class_names=names,
        groups=groups,
    )


def find_metadata(folder: FilePath, names: Collection[str]) -> str | None:
    """Return the file among `names` that labels the images of a folder, as the `datasets` library's imagefolder does.

    It is `metadata.csv` or `metadata.jsonl` with a column `file_name`. Raises SourceError if there are both, or it is
    damaged.
    """
    tables = []
    for name in names:
        if name.lower() not in ("metadata.csv", "metadata.jsonl"):
            continue
        try:
            text = _decode_text(read_bytes(folder / name, DEFAULT_READING.max_bytes), folder / name)
        except (SourceError, UnreadableImageError):
            continue
        if "file_name" not in text:  # a table of another program, which need not be readable
            continue
        parse = _parse_json_lines if name.lower().endswith(".jsonl") else _parse_csv
        if "file_name" in parse(text, folder / name)[0]:
            tables.append(name)
    if len(tables) > 1:
        raise SourceError(f"{folder} contains {' and '.join(tables)}; keep one of them, or give it as the source")
    return tables[0] if tables else None


def _decode_text(data: bytes, path: FilePath) -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 by their byte-order marks or the zero bytes of their first character.

    Bytes that are not UTF-8 are kept, because file names may contain them: they become surrogates.
    """
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF32_LE: "utf-32",
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data[:2]:
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        return data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} cannot be read as {encoding} text ({error.reason}); save it as UTF-8") from error


_Table = tuple[list[str], list[list[Any]]]


def _parse_csv(text: str, path: FilePath) -> _Table:
    """Return the columns and rows of a text with a header line, separated by commas, semicolons, tabs or bars."""
    text = text if "\n" in text else text.replace("\r", "\n")
    first, _, rest = text.partition("\n")
    given = re.fullmatch(r"sep=(.)\s*", first)  # written by spreadsheets
    separators = ["\t", ",", ";", "|"] if path.suffix.lower() == ".tsv" else [",", ";", "\t", "|"]
    separators = [given[1]] if given else separators
    text = rest if given else text
    try:
        headers = {separator: next(csv.reader(io.StringIO(text), delimiter=separator), []) for separator in separators}
        separator = max(separators, key=lambda sign: len(headers[sign]))
        header = headers[separator]
        spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])  # path, label
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
        rows, lines = [], []
        for row in reader:
            if any(row):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise SourceError(f"{path} cannot be read as csv ({error})") from error
    columns = [name.strip() for name in rows[0]] if rows else []
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        raise SourceError(f"{path} has several columns called {', '.join(repeated)}; give every column its own name")
    for row, line in zip(rows[1:], lines[1:]):
        if any(row[len(columns) :]):
            raise SourceError(
                f"{path} has {len(row)} values up to line {line} and {len(columns)} columns; put values that contain "
                f"{separator!r} in double quotes"
            )
    width = len(columns)
    return columns, [row[:width] + [""] * (width - len(row)) for row in rows[1:]]


def _parse_json_lines(text: str, path: FilePath) -> _Table:
    """Return the columns and rows of a text with a JSON object per line; what an object lacks is None."""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            expected = "expected an object per line"
            raise SourceError(f"{path}, line {number} cannot be read as JSON ({error}); {expected}") from error
        if not isinstance(record, dict):
            raise SourceError(f"{path}, line {number} contains a {type(record).__name__}; expected an object per line")
        records.append(record)
    columns = list(dict.fromkeys(name for record in records for name in record))
    return columns, [[record.get(name) for name in columns] for record in records]


def _list_lines(path: FilePath, text: str, reading: ReadSettings, selection: Selection) -> Listing:
    """List a text with one path per line, or with a path and an integer label per line as in OpenOOD's lists.

    The paths are relative to the folder of the list, or to the next folder above in which the first of them exists, or
    in a folder `images_*` there, as in the data folder of OpenOOD. On an object store, they are relative to the folder
    of the list.
    """
    selection.check_used(where=str(path), kind="a list of paths without columns")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"{path} lists no images; expected one path per line, or a path and a label")
    matches = [re.fullmatch(r"(.*\S)\s+(-?[0-9]+)", line) for line in lines]
    labels, names = None, None
    if all(matches):
        cells = [match[1] for match in matches if match]
        _, labels, names = read_labels(["label"], lambda _: [match[2] for match in matches if match], str(path))
    elif not any(matches):
        cells = lines
    else:
        number = next(i for i, match in enumerate(matches) if bool(match) != bool(matches[0]))
        raise SourceError(
            f"{path} has lines with and without a label (line {number + 1}: {lines[number]!r}); give every image a "
            "label, or none; paths that end in a number after a space require a .csv file"
        )
    root = path.parent if isinstance(path, RemotePath) else _find_root(path, cells)
    located = [locate_file(cell, root) for cell in cells]
    return list_image_files(
        [key for key, _ in located],
        [file for _, file in located],
        reading,
        str(path),
        labels=labels,
        class_names=names,
    )


def _find_root(path: Path, cells: Sequence[str]) -> Path:
    """Return the folder that the paths are relative to: the nearest in which one of the first files exists."""
    first = cells[:20]  # a single file may be missing
    for folder in path.absolute().parents:
        try:
            subfolders = sorted(entry.path for entry in os.scandir(folder) if entry.name.startswith("images_"))
        except OSError:  # a folder above the list that may not be read
            subfolders = []
        for root in (folder, *map(Path, subfolders)):
            located = [locate_file(cell, root)[1] for cell in first]
            if any(isinstance(file, RemotePath) or os.path.isfile(file) for file in located):
                return root
    raise SourceError(
        f"{path}: the first listed files, {join_names(first[:2])}, …, exist neither in the folder of the list nor in a "
        "folder above it"
    )


def _check_paths(cells: Sequence[Any], where: str) -> list[str]:
    for row, cell in enumerate(cells):
        if not isinstance(cell, str) or not cell:
            found = "empty" if cell in (None, "") else f"a {type(cell).__name__}"
            raise SourceError(f"{where} is {found} in row {row}; expected the path of an image")
    return list(cells)


def locate_file(cell: str, folder: FilePath) -> tuple[str, FilePath]:
    """Return the key and the path of a cell: a URL, or a path relative to the folder.

    If no file has the name as it is, backslashes are separators of Windows, and spaces around the name belong to the
    table.

    Raises:
        SourceError: a URL contains a password or a signature, or a list on a store names a file of this machine.
    """
    if is_url(cell.strip()):
        return _locate_url(cell.strip(), folder)
    if isinstance(folder, RemotePath):
        return _locate_on_store(cell.strip().replace("\\", "/"), folder)
    located = find_listed_file(folder, PurePosixPath(cell).as_posix())
    for name in (cell.replace("\\", "/"), cell.strip(), cell.replace("\\", "/").strip()):
        if os.path.lexists(located[1]):
            return located
        if name != cell:
            other = find_listed_file(folder, PurePosixPath(name).as_posix())
            if os.path.lexists(other[1]) or "\\" in cell:
                located = other
    return located


def _locate_url(url: str, folder: FilePath) -> tuple[str, FilePath]:
    local = local_path_of(url)
    if local is not None and isinstance(folder, Path):
        return locate_file(local, folder)
    if local is not None:
        raise SourceError(f"a list in {folder} names {url}, a file of this machine; give URLs of the store, or paths")
    try:
        return encode_key(url), RemotePath.parse(url)
    except FaroutError as error:
        raise SourceError(f"a list in {folder} contains {error}") from None


def _locate_on_store(name: str, folder: RemotePath) -> tuple[str, RemotePath]:
    """Return the key and the path of a name relative to a folder on a store; it may lead to other folders there."""
    scheme, _, start = folder.url.partition("://")
    bucket, _, prefix = start.partition("/")
    path = posixpath.normpath(posixpath.join(prefix, name))
    if name.startswith("/") or path.startswith("..") or path == ".":
        raise SourceError(
            f"a list in {folder} contains the path {name!r}; expected paths relative to the list, within {scheme}://"
            f"{bucket}, or URLs"
        )
    return encode_inner_path(PurePosixPath(name).as_posix()), RemotePath(f"{scheme}://{bucket}/{path}")
