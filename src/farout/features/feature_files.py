"""Files of cached features: one Arrow table each, with an image's content hash, its features and a checksum per row.

The files are Arrow IPC files (Feather version 2) without compression, which pyarrow, pandas and polars read, too:

    image      fixed_size_binary[16]            content hash of the image
    features   fixed_size_list<float>[width]
    check      uint32                           CRC-32 of both; a flipped bit would otherwise become part of scores

A file is never changed after it was written. Only its hashes and checksums are kept in memory, 28 bytes per row.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from farout.core import store
from farout.core.errors import StoreError
from farout.core.files import open_regular_file

__all__ = [
    "FORMAT",
    "HASH_BYTES",
    "SUFFIX",
    "FeatureFile",
    "compute_check",
    "count_rows",
    "row_bytes",
    "write_feature_file",
]

FORMAT = 4
"""Version of the file layout: 3 had structured arrays of numpy. It decides the folder of a kind of features."""
SUFFIX = ".arrow"
HASH_BYTES = 16
_UInt64 = np.ndarray[Any, np.dtype[np.uint64]]
Array = np.ndarray[Any, np.dtype[Any]]


def row_bytes(width: int) -> int:
    """Size of a row in a file."""
    return HASH_BYTES + 4 * width + 4


def compute_check(image_hash: bytes, features: bytes) -> int:
    """CRC-32 of a row: of the content hash and of the features as little-endian float32."""
    return zlib.crc32(features, zlib.crc32(image_hash))


def write_feature_file(path: Path, hashes: Sequence[bytes], features: Array, last_used: float | None = None) -> None:
    """Write rows atomically.

    Args:
        path: the file.
        hashes: content hashes of the images, 16 bytes each.
        features: float32 (rows, width).
        last_used: modification time of the file, by which the least recently used one is found; default: now.
    """
    values = np.ascontiguousarray(features, "<f4")
    checks = [compute_check(image_hash, row.tobytes()) for image_hash, row in zip(hashes, values, strict=True)]
    columns = [
        pa.array(hashes, pa.binary(HASH_BYTES)),
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        pa.array(checks, pa.uint32()),
    ]
    schema = _schema(values.shape[1])
    with store.atomic_file(path) as temporary:
        with temporary.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        if last_used is not None:
            os.utime(temporary, (last_used, last_used))


def _schema(width: int) -> pa.Schema:
    return pa.schema(
        [
            ("image", pa.binary(HASH_BYTES)),
            ("features", pa.list_(pa.float32(), width)),
            ("check", pa.uint32()),
        ]
    )


def count_rows(path: Path) -> int:
    """Number of rows of a file; 0 if it cannot be read."""
    try:
        return _open_batch(path)[0].num_rows
    except (OSError, StoreError):
        return 0


def _open_batch(path: Path) -> tuple[pa.RecordBatch, pa.Buffer]:
    """The rows of a file and the whole file, mapped to memory; raises OSError, or StoreError for a damaged file."""
    with open_regular_file(path) as file:
        try:
            whole = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            reader = pa.ipc.open_file(whole)
            if reader.num_record_batches != 1:
                raise StoreError(f"it has {reader.num_record_batches} record batches, expected one")
            batch = reader.get_batch(0)
            batch.validate()
        except StoreError:
            raise
        except Exception as error:  # Arrow has an error for each kind of damage; an empty file cannot be mapped
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
                raise
            raise StoreError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    return batch, whole


class FeatureFile:
    """One file: where the features of which image are.

    Files are opened for each reading and not kept open, so that any process may delete them at any time on every
    system, thousands of them need no file descriptors, and the features do not stay in memory.

    Args:
        path: the file.
        width: number of features per image.

    Attributes:
        rows: number of rows.

    Raises:
        OSError: the file cannot be read.
        StoreError: it is damaged or of another layout.
    """

    def __init__(self, path: Path, width: int) -> None:
        batch, whole = _open_batch(path)
        if not batch.schema.equals(_schema(width)) or any(column.null_count for column in batch.columns):
            raise StoreError("it is of another layout")
        self.path, self.rows, self._width = path, batch.num_rows, width
        features = batch.column("features").values
        values = features.buffers()[1]
        # a column of fixed-size rows is one block of the file, in which row i starts at i times the size of a row
        self._offset = values.address - whole.address + 4 * features.offset if self.rows else 0
        if not 0 <= self._offset <= whole.size - 4 * width * self.rows:
            raise StoreError("it is of another layout")
        images = batch.column("image")
        hashes = np.frombuffer(images.buffers()[1], ">u8", 2 * self.rows, HASH_BYTES * images.offset).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._high, self._low = (hashes[order, half].astype(np.uint64) for half in (0, 1))
        self._row, self._check = order.astype(np.uint32), batch.column("check").to_numpy()[order]

    def find(self, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, int, int]]:
        """The hash, row and checksum of each row of one of these images."""
        if not self.rows or not hashes:
            return
        wanted = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)
        starts = np.searchsorted(self._high, wanted[:, 0])
        is_there = self._high[np.minimum(starts, self.rows - 1)] == wanted[:, 0]
        for number in np.flatnonzero(is_there).tolist():
            high, low = wanted[number]
            position = int(starts[number])
            while position < self.rows and self._high[position] == high:
                if self._low[position] == low:
                    yield hashes[number], int(self._row[position]), int(self._check[position])
                position += 1

    def read(self, hashes: Sequence[bytes]) -> tuple[dict[bytes, Array], set[bytes]]:
        """Read the features of those of these images that the file has, and the images whose rows are damaged.

        Raises OSError if the file cannot be read.
        """
        found: dict[bytes, Array] = {}
        damaged: set[bytes] = set()
        matches = sorted(self.find(hashes), key=lambda match: match[1])
        if matches:
            size = 4 * self._width
            with open_regular_file(self.path) as file:
                for image_hash, row, check in matches:
                    file.seek(self._offset + row * size)
                    content = file.read(size)
                    if len(content) == size and compute_check(image_hash, content) == check:
                        found.setdefault(image_hash, np.frombuffer(content, "<f4"))
                    else:
                        damaged.add(image_hash)
        return found, damaged - found.keys()

    def hashes(self) -> list[bytes]:
        """Content hashes of all rows, in the order of the rows."""
        pairs = np.empty((self.rows, 2), ">u8")
        pairs[self._row, 0], pairs[self._row, 1] = self._high, self._low
        content = pairs.tobytes()
        return [content[start : start + HASH_BYTES] for start in range(0, len(content), HASH_BYTES)]
