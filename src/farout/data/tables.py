"""Readers of tables of the `datasets` library: sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farout.core.errors import MissingExtraError, SourceError, UnreadableImageError
from farout.core.hub import explain_failure, hub_access
from farout.core.names import encode_name
from farout.data.columns import (
    attach_class_names,
    find_column,
    find_columns,
    read_groups,
    read_keys,
    read_labels,
    warn_about_source,
)
from farout.data.decoding import DecodedImage, LeastSize, decode, unreadable_errors
from farout.data.file_listing import Listing, check_count, index_keys
from farout.data.parquet_files import IMAGE_COLUMNS
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection
from farout.data.untrusted_files import read_bytes

__all__ = ["list_hub", "list_table"]


def list_hub(
    location: str,
    split: str,
    image: str | None = None,
    label: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
    selection: Selection = NO_SELECTION,
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
    with hub_access() as obstacle:
        try:
            table = datasets.load_dataset(f"{owner}/{name}", name=config[0] if config else None, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = explain_failure(error, obstacle)
            if reason != obstacle:
                reason = f"{type(error).__name__}: {reason}"
            raise SourceError(
                f"hf://{location}:{split} cannot be loaded ({reason}); check the connection, the name, the split and "
                "your access, or save the set as $FAROUT_DATA/<name>/<split>.parquet and use <name>:<split>"
            ) from error
    return list_table(table, f"hf://{location}:{split}", image, label, reading, selection)


class _TableImages:
    """Random access to the encoded images of a `datasets` table, which is memory-mapped."""

    def __init__(self, table: Any, column: str, keys: tuple[str, ...], reading: ReadSettings) -> None:
        self._table, self._column, self._keys, self._reading = table, column, keys, reading

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        key = self._keys[index]
        with unreadable_errors(key):
            cell = self._table[index][self._column]
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
            if data is None and path:
                with unreadable_errors(str(path)):
                    data = read_bytes(str(path), self._reading.max_bytes)
            if not isinstance(data, bytes):
                raise UnreadableImageError("the row contains no encoded image")
        return decode(data, key, self._reading, least_size=least_size)


def list_table(
    table: Any,
    where: str,
    image: str | None = None,
    label: str | None = None,
    reading: ReadSettings = DEFAULT_READING,
    selection: Selection = NO_SELECTION,
) -> Listing:
    """List a `datasets.Dataset` with an image column.

    Args:
        table: the Dataset.
        where: its name, for messages.
        image: column of the images, if the table has it.
        label: column of the labels, if the table has it.
        reading: how images are read.
        selection: columns that the user names, which must exist.

    Raises:
        SourceError: the table is empty, has no column of images, several of which none is known, or wrong labels.
    """
    import datasets

    selection.check_used("split", "column", "label", where=where, kind="a table")
    columns = list(table.features)
    fitting = [name for name in columns if isinstance(table.features[name], datasets.Image)]
    if selection.column:
        column = find_column(selection.column, columns, where, "column")
        if column not in fitting:
            raise SourceError(f"{where}, column {column} contains no images; those that do are {', '.join(fitting)}")
    else:
        usual = [image] if image in fitting else find_columns(fitting, IMAGE_COLUMNS)
        if not fitting:
            raise SourceError(f"{where} has {len(table)} rows and columns {', '.join(columns)}; expected images")
        if not usual and len(fitting) > 1:
            raise SourceError(
                f"{where} has several columns of images: {', '.join(fitting)}; name one: @column={fitting[0]}"
            )
        column = str((usual or fitting)[0])
        if len(fitting) > 1 and image is None:
            others = [name for name in fitting if name != column]
            warn_about_source(
                f"{where} has several columns of images; {column} is read, not {', '.join(others)} "
                f"(@column={others[0]})"
            )
    check_count(len(table), where, reading.max_bytes)
    others = [name for name in columns if name != column]

    def read(name: str) -> list[Any]:
        return list(table[name])

    unknown = [name for name in others if isinstance(table.features[name], datasets.Value | datasets.ClassLabel)]
    chosen = selection.label or (label if label in others else "") or ""
    label_column, labels, names = read_labels(others, read, where, chosen=chosen, others=unknown)
    if labels is not None:
        declared = tuple(map(encode_name, getattr(table.features[label_column], "names", None) or ())) or None
        labels, names = attach_class_names(labels, names, declared, f"{where}, column {label_column}")
    _, groups = read_groups(others, read, where)
    keys = read_keys(others, read, where) or index_keys(len(table))
    raw = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Listing(keys, _TableImages(raw, column, keys, reading), labels, names, groups)
