"""Readers of tables of encoded images: parquet files and sets of the Hugging Face hub."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from farout.core.errors import MissingExtraError, SourceError, UnreadableImageError
from farout.core.names import encode_name
from farout.data.decoding import DecodedImage, decode, unreadable_errors
from farout.data.file_listing import Listing, encode_groups, encode_labels, index_keys
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.untrusted_files import read_bytes

__all__ = ["ParquetImages", "list_hub", "list_parquet", "list_table"]

_IMAGE_COLUMNS = ("image", "img", "images")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


class ParquetImages:
    """Random access to the encoded images of a parquet file; keeps at most `row_groups` row groups in memory."""

    def __init__(self, path: Path, column: str, reading: ReadSettings = DEFAULT_READING, row_groups: int = 2) -> None:
        self._path, self._column, self._reading, self._keep = path, column, reading, row_groups
        self._open()
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum(sizes)

    def _open(self) -> None:
        self._file = pq.ParquetFile(self._path, memory_map=True)
        self._lock = threading.Lock()
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_lock", "groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __call__(self, index: int) -> DecodedImage:
        return decode(_encoded(self._cell(index), str(index)), str(index), self._reading)

    def _cell(self, index: int) -> object:
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        with self._lock:
            return self._group(group)[index - first].as_py()

    def _group(self, number: int) -> pa.ChunkedArray:
        if number not in self.groups:
            while len(self.groups) >= self._keep:
                self.groups.popitem(last=False)
            self.groups[number] = self._file.read_row_group(number, columns=[self._column]).column(0)
        self.groups.move_to_end(number)
        return self.groups[number]


def _encoded(cell: object, key: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(data, bytes):
        raise UnreadableImageError(f"{key}: the row contains no encoded image")
    return data


def list_parquet(path: Path, reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List a parquet file with encoded images (`struct{bytes, path}` or binary) and optionally `label`, `group`.

    Class names come from the schema that the `datasets` library writes, or from a label column of texts.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path} cannot be read as parquet ({error})") from error
    schema, count = file.schema_arrow, file.metadata.num_rows
    if not count:
        raise SourceError(f"{path} contains no images: it has 0 rows")
    column = _image_column(schema, path)
    label = _first_present(_LABEL_COLUMNS, schema.names)
    labels, names = (
        _encode_labels(_read_column(file, label), _read_class_names(schema, label), str(path))
        if label
        else (None, None)
    )
    groups = encode_groups(_read_column(file, "group"), str(path)) if "group" in schema.names else None
    return Listing(index_keys(count), ParquetImages(path, column, reading), labels, names, groups)


def _read_column(file: pq.ParquetFile, column: str) -> list[Any]:
    return file.read(columns=[column]).column(0).to_pylist()


def _first_present(candidates: Sequence[str], present: Iterable[str]) -> str | None:
    names = list(present)
    return next((name for name in candidates if name in names), None)


def _contains_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: pa.Schema, path: Path) -> str:
    fitting = [field.name for field in schema if _contains_bytes(field.type)]
    column = _first_present(_IMAGE_COLUMNS, fitting) or (fitting[0] if fitting else None)
    if column is None:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise SourceError(f"{path} has columns {columns}; expected encoded images: struct<bytes, path> or binary")
    return column


def _read_class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None or label is None:
        return None
    feature = json.loads(raw).get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names")
    return tuple(encode_name(str(name)) for name in names) if isinstance(names, list) else None


_Labels = tuple[tuple[int, ...] | None, tuple[str, ...] | None]


def _encode_labels(values: Sequence[object], names: tuple[str, ...] | None, where: str) -> _Labels:
    labels, text_names = encode_labels(values, where)
    if any(label == -1 for label in labels):  # the hub's mark of a split whose labels are withheld
        return None, None
    if names is None:
        return labels, text_names
    if not all(0 <= label < len(names) for label in labels):
        raise SourceError(f"{where} has labels {min(labels)}..{max(labels)} but {len(names)} class names")
    return labels, names


def list_hub(
    location: str,
    split: str,
    image: str | None = None,
    label: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
) -> Listing:
    """List a set of the Hugging Face hub, `owner/name` or `owner/name/config`, with the `datasets` library.

    Code from the hub is never executed. Raises MissingExtraError without that library, and SourceError if the set
    cannot be loaded: no connection, unknown name or split, or no access.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f'hf://{location} requires the datasets library: pip install "farout[hub]"') from error
    owner, name, *config = location.split("/")
    try:
        table = datasets.load_dataset(f"{owner}/{name}", name=config[0] if config else None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"hf://{location}:{split} cannot be loaded ({type(error).__name__}: {reason}); check the connection, the "
            "name, the split and your access, or save the set as $FAROUT_DATA/<name>/<split>.parquet and use "
            "<name>:<split>"
        ) from error
    return list_table(table, f"hf://{location}:{split}", image, label, reading)


class _TableImages:
    """Random access to the encoded images of a `datasets` table, which is memory-mapped."""

    def __init__(self, table: Any, column: str, reading: ReadSettings) -> None:
        self._table, self._column, self._reading = table, column, reading

    def __call__(self, index: int) -> DecodedImage:
        cell = self._table[index][self._column]
        if isinstance(cell, Mapping) and cell.get("bytes") is None and cell.get("path"):
            with unreadable_errors(f"{index}: {cell['path']}"):
                data = read_bytes(str(cell["path"]), self._reading.max_bytes)
            return decode(data, str(index), self._reading)
        return decode(_encoded(cell, str(index)), str(index), self._reading)


def list_table(
    table: Any,
    where: str,
    image: str | None = None,
    label: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
) -> Listing:
    """List a `datasets.Dataset` with an image column."""
    import datasets

    fitting = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    column = image if image in fitting else _first_present(_IMAGE_COLUMNS, fitting) or (fitting[0] if fitting else None)
    if column is None or not len(table):
        raise SourceError(f"{where} has {len(table)} rows and columns {', '.join(table.features)}; expected images")
    label = label if label in table.features else _first_present(_LABEL_COLUMNS, table.features)
    labels, names = None, None
    if label is not None:
        names = tuple(map(encode_name, getattr(table.features[label], "names", None) or ())) or None
        labels, names = _encode_labels(list(table[label]), names, where)
    groups = encode_groups(list(table["group"]), where) if "group" in table.features else None
    raw = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Listing(index_keys(len(table)), _TableImages(raw, column, reading), labels, names, groups)
