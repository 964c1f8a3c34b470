"""Readers of parquet files: encoded images, arrays of pixels or paths in a column, in one file or in several shards.

Metadata that the `datasets` library writes is optional: it may name the classes. Columns are chosen by their usual
names (`farout.data.columns`), or by name where several may contain images.
"""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.files import map_files
from farout.core.names import encode_name
from farout.core.profiling import timed
from farout.core.remote_files import FilePath, RemotePath
from farout.data.columns import (
    GROUP_COLUMNS,
    KEY_COLUMNS,
    PATH_COLUMNS,
    attach_class_names,
    find_column,
    find_columns,
    join_names,
    read_groups,
    read_keys,
    read_labels,
    warn_about_source,
)
from farout.data.decoding import DecodedImage, LeastSize, decode, unreadable_errors
from farout.data.file_listing import Listing, check_count, check_keys, index_keys
from farout.data.image_files import list_image_files
from farout.data.image_lists import locate_file
from farout.data.image_objects import decode_object
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection
from farout.data.untrusted_files import read_bytes

__all__ = ["IMAGE_COLUMNS", "ParquetImages", "choose_shards", "list_parquet"]

IMAGE_COLUMNS = ("image", "img", "images")
"""Columns of images; the first that exists is used."""

_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_SHARD = re.compile(r"(?P<name>.*?)[-_.]?(?P<number>\d+)-of-(?P<count>\d+)")


def list_parquet(
    paths: FilePath | Sequence[FilePath],
    reading: ReadSettings = DEFAULT_READING,
    selection: Selection = NO_SELECTION,
    left_out: Mapping[str, int] | None = None,
    where: str = "",
) -> Listing:
    """List the images of a parquet file, or of the shards of one set, in their order.

    Args:
        paths: the file, or several with the same columns.
        reading: how images are read.
        selection: the column of the images and that of the labels, if they are named.
        left_out: files next to the shards that are not listed: description and number.
        where: name of the set for messages; default: the path of the file.

    Raises:
        SourceError: a file cannot be read, columns differ, no column of images is recognized, or several are.
    """
    paths = [paths] if isinstance(paths, Path | RemotePath) else list(paths)
    where = where or str(paths[0])
    selection.check_used("split", "column", "label", where=where, kind="a parquet file")
    shards = map_files(_Shard.read, paths)
    schema = shards[0].schema
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise SourceError(f"{paths[0]} has several columns called {join_names(repeated)}; give each its own name")
    for shard in shards[1:]:
        _check_same_columns(shards[0], shard)
    count = sum(shard.num_rows for shard in shards)
    check_count(count, where, reading.max_bytes)
    column = _choose_column(schema, where, selection)
    columns = [name for name in schema.names if name != column.name]

    def read(name: str) -> list[Any]:
        return [value for shard in shards for value in shard.read_column(name)]

    others = [
        field.name
        for field in schema
        if field.name in columns
        and _is_scalar(field.type)
        and not find_columns([field.name], (*GROUP_COLUMNS, *KEY_COLUMNS, *PATH_COLUMNS))
    ]
    nested = [".".join(parts) for field in schema for parts in _find_nested(field.type, (field.name,))]
    label, labels, names = read_labels(
        columns if selection.label in schema.names else [*columns, *nested],
        read,
        where,
        chosen=selection.label,
        others=others,
    )
    if labels is not None:
        declared = _read_class_names(shards, label)
        labels, names = attach_class_names(labels, names, declared, f"{where}, column {label}")
    _, groups = read_groups(columns, read, where)
    keys = read_keys(columns, read, where)
    if column.kind == "path":
        folders = [shard.path.parent for shard in shards for _ in range(shard.num_rows)]
        located = [
            locate_file(cell, folder) if isinstance(cell, str) and cell else (f"row {row}", None)
            for row, (folder, cell) in enumerate(zip(folders, read(column.name)))
        ]
        keys = keys or check_keys([key for key, _ in located], f"{where}, column {column.name}")
        return list_image_files(
            keys,
            [file or Path() for _, file in located],
            reading,
            where,
            problems={
                key: f"the column {column.name} is empty" for key, (_, file) in zip(keys, located) if file is None
            },
            labels=labels,
            class_names=names,
            groups=groups,
            left_out=left_out,
        )
    keys = keys or index_keys(count)
    _check_row_groups(shards, reading)
    headers = [shard.metadata for shard in shards]
    reader = ParquetImages([shard.path for shard in shards], column.parts, keys, reading, headers=headers)
    return Listing(keys, reader, labels, names, groups, left_out=dict(left_out or {}))


@contextmanager
def _parquet_errors(path: FilePath) -> Iterator[None]:
    """Convert what broken files raise to a SourceError that names the file."""
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError) as error:
        text = " ".join(str(error).split())
        reason = text if len(text) <= 300 else f"{text[:300]}…"
        raise SourceError(f"{path} cannot be read as parquet ({reason or type(error).__name__})") from error


@dataclass(frozen=True)
class _Shard:
    """The header of a parquet file."""

    path: FilePath
    schema: pa.Schema
    metadata: pq.FileMetaData

    @classmethod
    def read(cls, path: FilePath) -> _Shard:
        """Read the header; raises SourceError."""
        with _parquet_errors(path), _open_parquet(path) as file:
            str(file.schema_arrow)  # decodes all names, some of which may be damaged
            return cls(path, file.schema_arrow, file.metadata)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.metadata.num_rows)

    def read_column(self, name: str) -> list[Any]:
        """Return the values of a column; raises SourceError.

        Equal texts are one object: repeated ones need little space in the file, and must not in memory.
        """
        top, *fields = [name] if name in self.schema.names else name.split(".")
        values: list[Any] = []
        with _parquet_errors(self.path):
            texts = _text_columns(self.metadata, name)
            with _open_parquet(self.path, read_dictionary=texts, metadata=self.metadata) as file:
                chunks = file.read(columns=[name]).column(top).chunks
            for chunk in chunks:
                if pa.types.is_dictionary(chunk.type):
                    dictionary = chunk.dictionary.to_pylist()
                    values += [None if index is None else dictionary[index] for index in chunk.indices.to_pylist()]
                else:
                    values += chunk.to_pylist()
        for field in fields:
            values = [value.get(field) if isinstance(value, Mapping) else None for value in values]
        if len(values) != self.num_rows:
            raise SourceError(f"{self.path}, column {name} has {len(values)} rows, and the file {self.num_rows}")
        return values


def _open_parquet(path: FilePath, **options: Any) -> pq.ParquetFile:
    """Open a parquet file; pyarrow itself opens only paths that are UTF-8, and waits for a named pipe."""
    if isinstance(path, RemotePath):  # reads the footer and the column chunks, with a request for each
        stream = pa.PythonFile(path.open_unbuffered(), mode="r")
        return pq.ParquetFile(stream, **{**options, "memory_map": False}, pre_buffer=False)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is not a regular file")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return pq.ParquetFile(pa.PythonFile(path.open("rb"), mode="r"), **{**options, "memory_map": False})
    return pq.ParquetFile(path, **options)


def _text_columns(metadata: pq.FileMetaData, *names: str) -> list[str]:
    """Return those of the (nested) columns that contain texts or bytes, which can be read as a dictionary."""
    chunks = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    return [chunk.path for chunk in chunks if chunk.path in names and chunk.physical_type == "BYTE_ARRAY"]


def _check_same_columns(first: _Shard, other: _Shard) -> None:
    expected = {field.name: str(field.type) for field in first.schema}
    found = {field.name: str(field.type) for field in other.schema}
    if found == expected:
        return
    differing = [name for name in [*expected, *found] if expected.get(name) != found.get(name)]
    name = differing[0]
    raise SourceError(
        f"{first.path} and {other.path} have different columns: {name} is {expected.get(name, 'absent')} in the first "
        f"and {found.get(name, 'absent')} in the second; give files of one set"
    )


@dataclass(frozen=True)
class _ImageColumn:
    """A column that can contain images.

    Attributes:
        name: name of the top-level column.
        parts: names of the column and of the fields down to the images.
        kind: encoded bytes, arrays of pixels, or paths.
    """

    name: str
    parts: tuple[str, ...]
    kind: str

    @property
    def label(self) -> str:
        """The name by which a user selects it."""
        return ".".join(self.parts)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    return not (_is_bytes(kind) or _is_list(kind) or pa.types.is_struct(kind) or pa.types.is_map(kind))


def _depth(kind: pa.DataType) -> int:
    """Return the number of nested lists of numbers; 0 for other types."""
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) else 0


def _find_image_columns(kind: pa.DataType, parts: tuple[str, ...]) -> list[_ImageColumn]:
    """Return the columns and nested fields of a type that can contain images."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if _is_list(kind) and not _depth(kind):  # lists of one image
        kind = kind.value_type
    if _is_bytes(kind) or (pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)):
        return [_ImageColumn(parts[0], parts, "bytes")]
    if _depth(kind) in (2, 3):
        return [_ImageColumn(parts[0], parts, "pixels")]
    if pa.types.is_struct(kind):
        return [column for field in kind for column in _find_image_columns(field.type, (*parts, field.name))]
    return []


def _find_nested(kind: pa.DataType, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the fields of nested columns that contain single values."""
    if pa.types.is_struct(kind):
        return [nested for field in kind for nested in _find_nested(field.type, (*parts, field.name))]
    return [parts] if len(parts) > 1 and _is_scalar(kind) else []


def _choose_column(schema: pa.Schema, where: str, selection: Selection) -> _ImageColumn:
    """Return the column of the images."""
    found = [column for field in schema for column in _find_image_columns(field.type, (field.name,))]
    by_label = {column.label: column for column in found}
    if selection.column:
        if selection.column in by_label:
            return by_label[selection.column]
        name = find_column(selection.column, list(dict.fromkeys([*schema.names, *by_label])), where, "column")
        if name in by_label:
            return by_label[name]
        kind = schema.field(name).type
        if not _is_text(kind):
            raise SourceError(f"{where}, column {name} has type {kind}; expected encoded images or paths")
        return _ImageColumn(name, (name,), "path")
    usual = find_columns(list(by_label), IMAGE_COLUMNS)
    encoded = [column for column in found if column.kind == "bytes"]
    chosen = by_label[usual[0]] if usual else None
    candidates = encoded or found
    if chosen is None and len(candidates) == 1:
        chosen = candidates[0]
    if chosen is not None:
        others = [column.label for column in encoded if column != chosen]
        if others:
            warn_about_source(
                f"{where} has several columns that can be images; {chosen.label} is read, not {', '.join(others)} "
                f"(@column={others[0]})"
            )
        return chosen
    described = join_names([f"{field.name}: {field.type}" for field in schema])
    if candidates:
        names = ", ".join(column.label for column in candidates)
        raise SourceError(
            f"{where} has several columns that can be images: {names}; name one: @column={candidates[0].label}"
        )
    paths = find_columns([field.name for field in schema if _is_text(field.type)], PATH_COLUMNS)
    if not paths:
        raise SourceError(
            f"{where} has columns {described}; expected encoded images: struct<bytes, path> or binary, or paths in a "
            "column path or file_name (@column=NAME)"
        )
    return _ImageColumn(paths[0], (paths[0],), "path")


def _check_row_groups(shards: Sequence[_Shard], reading: ReadSettings) -> None:
    """Raise SourceError for a row group that exceeds the byte limit when it is decompressed."""
    for shard in shards:
        for number in range(shard.metadata.num_row_groups):
            # of all columns: RowGroupMetaData.column() ends the process if the statistics of the column are damaged
            with _parquet_errors(shard.path):
                size = shard.metadata.row_group(number).total_byte_size
            if size > reading.max_bytes:
                raise SourceError(
                    f"{shard.path}: row group {number} needs {size} bytes of memory, and the limit is "
                    f"{reading.max_bytes} (--max-bytes); smaller row groups also need less memory"
                )


def _read_class_names(shards: Sequence[_Shard], label: str) -> tuple[str, ...] | None:
    """Return the class names in the metadata of the `datasets` library; None, with a warning, if it is damaged."""
    names = [_parse_class_names(shard, label) for shard in shards]
    for shard, other in zip(shards, names):
        if other != names[0]:
            raise SourceError(
                f"{shards[0].path} and {shard.path} have different class names in the column {label}; give files of "
                "one set"
            )
    return names[0]


def _parse_class_names(shard: _Shard, label: str) -> tuple[str, ...] | None:
    raw = (shard.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    value: Any
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    for name in ("info", "features"):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, dict):
        feature = value.get(label)
        declared = feature.get("names") if isinstance(feature, dict) else None
        if declared is None:
            return None
        if isinstance(declared, list) and declared and all(isinstance(name, str) for name in declared):
            return tuple(map(encode_name, declared))
    warn_about_source(
        f"{shard.path}: the metadata 'huggingface' is damaged and not used; the classes of the column {label} have the "
        "names in the column itself"
    )
    return None


class ParquetImages:
    """Random access to the images of parquet files; keeps at most `row_groups` row groups in memory."""

    def __init__(
        self,
        paths: Sequence[FilePath],
        parts: Sequence[str],
        keys: Sequence[str],
        reading: ReadSettings = DEFAULT_READING,
        row_groups: int = 2,
        headers: Sequence[pq.FileMetaData] | None = None,
    ) -> None:
        self._paths, self._parts, self._keys = tuple(paths), tuple(parts), tuple(keys)
        self._reading, self._keep = reading, row_groups
        sizes: list[int] = []
        self._row_groups: list[tuple[int, int]] = []  # number of the file, number of the row group in it
        for number, header in enumerate(headers or [_Shard.read(path).metadata for path in paths]):
            for group in range(header.num_row_groups):
                with _parquet_errors(paths[number]):
                    sizes.append(header.row_group(group).num_rows)
                self._row_groups.append((number, group))
        self._ends = np.cumsum(sizes)
        self._rows: np.ndarray | None = None  # row of each image in these row groups; None: all in order
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_lock", "groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def select(self, indices: Sequence[int]) -> ParquetImages:
        """Return a reader of the images at these indices, which knows only their row groups."""
        rows = np.asarray(indices, dtype=np.int64) if self._rows is None else self._rows[list(indices)]
        sizes = np.diff(self._ends, prepend=0)
        groups, group_of = np.unique(np.searchsorted(self._ends, rows, side="right"), return_inverse=True)
        files, file_of = np.unique([self._row_groups[group][0] for group in groups], return_inverse=True)
        selected = copy.copy(self)
        selected._keys = tuple(self._keys[i] for i in indices)
        selected._paths = tuple(self._paths[file] for file in files)
        selected._row_groups = [(int(file), self._row_groups[group][1]) for file, group in zip(file_of, groups)]
        selected._ends = np.cumsum(sizes[groups])
        selected._rows = rows - (self._ends - sizes)[groups][group_of] + (selected._ends - sizes[groups])[group_of]
        selected._open()
        return selected

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        data = self._read_cell(index)
        if isinstance(data, bytes):
            return self.decode_encoded(index, data, "", least_size)
        return decode_object(data, self._keys[index], self._reading, least_size)

    def read_encoded(self, index: int) -> tuple[bytes, str]:
        """Return the encoded data of an image, and no suffix; raises UnreadableImageError, also for arrays."""
        data = self._read_cell(index)
        if isinstance(data, bytes):
            return data, ""
        raise UnreadableImageError(f"{self._keys[index]}: the row contains an array")

    def decode_encoded(self, index: int, data: bytes, suffix: str, least_size: LeastSize | None) -> DecodedImage:
        """Decode what `read_encoded` has returned."""
        return decode(data, self._keys[index], self._reading, least_size=least_size)

    def _read_cell(self, index: int) -> bytes | np.ndarray:
        with unreadable_errors(self._keys[index]):
            row = index if self._rows is None else int(self._rows[index])
            number = int(np.searchsorted(self._ends, row, side="right"))
            first = int(self._ends[number - 1]) if number else 0
            with self._lock, timed("reading"):
                cell = self._group(number)[row - first].as_py()
            for part in self._parts[1:]:
                cell = cell.get(part) if isinstance(cell, Mapping) else None
            return self._encoded(cell, self._paths[self._row_groups[number][0]].parent)

    def _encoded(self, cell: Any, folder: FilePath) -> bytes | np.ndarray:
        """Return the encoded image, or the array of pixels, of a cell; raises UnreadableImageError."""
        if isinstance(cell, list) and (not cell or not isinstance(cell[0], list | int | float)):
            if len(cell) != 1:
                raise UnreadableImageError(f"the row contains {len(cell)} images, expected one")
            cell = cell[0]
        path = None
        if isinstance(cell, Mapping):
            cell, path = cell.get("bytes"), cell.get("path")
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, list | np.ndarray):
            return np.asarray(cell)
        if isinstance(path, str) and path:
            _, file = locate_file(path, folder)
            with unreadable_errors(path):
                return read_bytes(file, self._reading.max_bytes)
        raise UnreadableImageError("the row contains no encoded image")

    def _group(self, number: int) -> pa.ChunkedArray:
        if number not in self.groups:
            while len(self.groups) >= self._keep:
                self.groups.popitem(last=False)
            file_number, group = self._row_groups[number]
            file = self._file(file_number)
            self.groups[number] = file.read_row_group(group, columns=[".".join(self._parts)]).column(self._parts[0])
        self.groups.move_to_end(number)
        return self.groups[number]

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._files:
            while len(self._files) >= self._keep:
                self._files.popitem(last=False)[1].close()
            # a file stores repeated images once; read as a dictionary, they need as little memory
            path, dotted = self._paths[number], ".".join(self._parts)
            with _open_parquet(path) as file:
                header = file.metadata
            texts = _text_columns(header, dotted, f"{dotted}.bytes")
            self._files[number] = _open_parquet(path, memory_map=True, read_dictionary=texts, metadata=header)
        self._files.move_to_end(number)
        return self._files[number]


def choose_shards(root: str, names: Sequence[str], split: str) -> list[str]:
    """Return those of the parquet files below a folder that belong to one split, sorted.

    The split of a file is its name without the number of the shard (`train-00000-of-00003.parquet`), or its folder
    (`train/0000.parquet`). If no file has a split, all are shards of one set.

    Raises:
        SourceError: there are several splits and none is given, the given one does not exist, or shards are missing.
    """
    by_split: dict[str, list[str]] = {}
    for name in sorted(names):
        by_split.setdefault(_split_of(name), []).append(name)
    listed = ", ".join(f"{name or 'without a split'} ({len(files)})" for name, files in by_split.items())
    if split:
        if split not in by_split:
            raise SourceError(f"{root} contains no parquet files of the split {split!r}; it contains {listed}")
        chosen = by_split[split]
    elif len(by_split) > 1:
        first = next(name for name in by_split if name)
        raise SourceError(f"{root} contains parquet files of several splits: {listed}; give one, as in {root}:{first}")
    else:
        chosen = next(iter(by_split.values()))
    matches = [match for match in (_SHARD.fullmatch(Path(name).stem) for name in chosen) if match]
    counts = {int(match["count"]) for match in matches}
    numbers = {int(match["number"]) for match in matches}
    if len(counts) == 1 and len(matches) == len(chosen) and not numbers >= set(range(min(counts))):
        missing = sorted(set(range(min(counts))) - numbers)
        raise SourceError(
            f"{root} contains {len(numbers)} of {min(counts)} shards (the first missing one is number {missing[0]}); "
            "fetch the others, or give a glob for those that exist"
        )
    return chosen


def _split_of(name: str) -> str:
    *folders, file = Path(name).parts
    stem = Path(file).stem
    shard = _SHARD.fullmatch(stem)
    if shard:
        stem = shard["name"]
        if stem and stem not in ("part", "data", "shard"):
            return stem
    plain = re.sub(r"[-_.]?\d+$", "", stem)
    return next((part for part in (plain, *reversed(folders)) if part.casefold() in _SPLITS), "")
