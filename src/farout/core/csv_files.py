"""Tables as CSV: written in one form everywhere, with cells that no spreadsheet evaluates, and read back as written."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from farout.core import store
from farout.core.names import encode_cell

__all__ = ["CsvWriter", "format_rows", "open_csv_writer", "read_csv", "read_csv_in_chunks", "write_csv"]

MISSING = frozenset({"", "nan", "NaN", "NA", "null", "None"})
"""Cells without a value in a column of numbers; in a column of texts they are texts."""


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    r"""Write a table atomically, in UTF-8 with lines that end in `\n`.

    Texts that a spreadsheet would evaluate, and control characters, are percent-encoded (`encode_cell`).
    """
    with open_csv_writer(path) as writer:
        writer.write(table)


@contextmanager
def open_csv_writer(path: str | Path) -> Iterator[CsvWriter]:
    """Write a table in several parts, atomically, with the same bytes as `write_csv` writes for all of them."""
    with store.atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield CsvWriter(file)


class CsvWriter:
    """Writes parts of a table; the header comes from the first one."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._is_first = file, True

    def write(self, table: pd.DataFrame) -> None:
        """Write the rows of a table, which has the columns of the first one."""
        safe = table.rename(columns=lambda name: _encode_text(str(name)))
        for position, kind in enumerate(safe.dtypes):
            if not pd.api.types.is_numeric_dtype(kind):
                safe.isetitem(position, np.array([_encode_text(cell) for cell in safe.iloc[:, position]], dtype=object))
        safe.to_csv(self._file, index=False, lineterminator="\n", header=self._is_first)
        self._is_first = False


def format_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
    """Return rows as lines of a CSV file in the form of `write_csv`, for files that are extended."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(map(_encode_text, columns))
    writer.writerows([_encode_text(row[name]) for name in columns] for row in rows)
    return text.getvalue()


def _encode_text(cell: Any) -> Any:
    return encode_cell(cell) if isinstance(cell, str) else cell


def read_csv(path: str | Path, texts: Collection[str] = ("key",), missing: Collection[str] = MISSING) -> pd.DataFrame:
    """Read a table with a header line.

    Other columns than `texts` become numbers or booleans if all their cells are, `missing` ones aside; numbers have
    every digit that was written.

    Args:
        path: the file, in UTF-8.
        texts: columns that stay texts, such as a key `007` or `NA`.
        missing: cells without a value in the other columns.

    Raises:
        ValueError: the file is not in UTF-8, is empty, or has rows of different lengths.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False, index_col=False)
    return _parse_columns(table, texts, missing)


def read_csv_in_chunks(path: str | Path, rows: int, texts: Collection[str] = ("key",)) -> Iterator[pd.DataFrame]:
    """Read a table as `read_csv`, at most `rows` rows at a time; a column is typed by the cells of each chunk."""
    with (
        Path(path).open(encoding="utf-8-sig", newline="") as file,
        pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False, index_col=False, chunksize=rows) as reader,
    ):
        for chunk in reader:
            yield _parse_columns(chunk.reset_index(drop=True), texts, MISSING)


def _parse_columns(table: pd.DataFrame, texts: Collection[str], missing: Collection[str]) -> pd.DataFrame:
    for name in table.columns:
        if name not in texts:
            table[name] = _parse_column(list(table[name]), missing)
    return table


def _parse_column(cells: list[str], missing: Collection[str]) -> Any:
    present = [cell for cell in cells if cell not in missing]
    if not all(cell in ("True", "False") for cell in present):
        try:
            numbers = np.array([np.nan if cell in missing else _parse_number(cell) for cell in cells], dtype=np.float64)
        except ValueError:
            return [np.nan if cell in missing else cell for cell in cells]
        is_integer = len(present) == len(cells) and not any(set(cell) & set(".eEnNiI") for cell in cells)
        is_exact = is_integer and bool((np.abs(numbers) < 2**53).all())
        return np.array([int(cell) for cell in cells], dtype=np.int64) if is_exact else numbers
    if not present:
        return np.full(len(cells), np.nan)
    values = [np.nan if cell in missing else cell == "True" for cell in cells]
    return np.array(values, dtype=bool if len(present) == len(cells) else object)


def _parse_number(cell: str) -> float:
    if "_" in cell:  # Python reads 1_0 as 10
        raise ValueError(cell)
    return float(cell)
