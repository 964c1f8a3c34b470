"""Files of cached features: one Arrow table each, with an image's content hash, its features and a checksum per row.

The files are Arrow IPC files (Feather version 2) without compression, which pyarrow, pandas and polars read, too:

    image      fixed_size_binary[16]            content hash of the image
    features   fixed_size_list<float>[width]
    check      uint32                           CRC-32 of both; a flipped bit would otherwise become part of scores

A file is never changed after it was written.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    "open_feature_file",
    "row_bytes",
    "write_feature_file",
]

FORMAT = 4
"""Version of the file layout: 3 had structured arrays of numpy. It decides the folder of a kind of features."""
SUFFIX = ".arrow"
HASH_BYTES = 16
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
    rows, width = values.shape
    checks = [compute_check(image_hash, row.tobytes()) for image_hash, row in zip(hashes, values, strict=True)]
    # from buffers, because pyarrow imports pandas to convert arrays
    numbers = pa.Array.from_buffers(pa.float32(), rows * width, [None, pa.py_buffer(values)])
    columns = [
        pa.Array.from_buffers(pa.binary(HASH_BYTES), rows, [None, pa.py_buffer(b"".join(hashes))]),
        pa.FixedSizeListArray.from_arrays(numbers, width),
        pa.Array.from_buffers(pa.uint32(), rows, [None, pa.py_buffer(np.array(checks, "<u4"))]),
    ]
    schema = _schema(width)
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


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """One file of features, which `open_feature_file` creates.

    Files are opened for each reading and not kept open, so that any process may delete them at any time on every
    system, thousands of them need no file descriptors, and the features do not stay in memory.

    Attributes:
        path: the file.
        rows: number of rows.
        offset: where the features of the first row are.
        row_size: bytes of features per row.
    """

    path: Path
    rows: int
    offset: int
    row_size: int

    def read(self, rows: Iterable[tuple[int, bytes, int]]) -> Iterator[tuple[bytes, Array | None]]:
        """The content hash and the features of rows, or None for a damaged row.

        Args:
            rows: number, content hash and checksum of each row.

        Raises:
            OSError: the file cannot be read.
        """
        with open_regular_file(self.path) as file:
            for row, image_hash, check in sorted(rows):
                file.seek(self.offset + row * self.row_size)
                content = file.read(self.row_size)
                is_intact = len(content) == self.row_size and compute_check(image_hash, content) == check
                yield image_hash, np.frombuffer(content, "<f4") if is_intact else None


def open_feature_file(path: Path, width: int) -> tuple[FeatureFile, Array, Array]:
    """Open a file: the file, its content hashes uint8 (rows, 16), and the checksums of its rows.

    Raises:
        OSError: the file cannot be read.
        StoreError: it is damaged or of another layout.
    """
    batch, whole = _open_batch(path)
    if not batch.schema.equals(_schema(width)) or any(column.null_count for column in batch.columns):
        raise StoreError("it is of another layout")
    rows, row_size = batch.num_rows, 4 * width
    images, features, check = batch.column("image"), batch.column("features").values, batch.column("check")
    hashes = np.frombuffer(images.buffers()[1], np.uint8, HASH_BYTES * rows, HASH_BYTES * images.offset)
    # a column of fixed-size rows is one block of the file, in which row i starts at i times the size of a row
    offset = features.buffers()[1].address - whole.address + 4 * features.offset if rows else 0
    if not 0 <= offset <= whole.size - row_size * rows:
        raise StoreError("it is of another layout")
    checks = np.frombuffer(check.buffers()[1], "<u4", rows, 4 * check.offset)
    return FeatureFile(path, rows, offset, row_size), hashes.reshape(rows, HASH_BYTES).copy(), checks.copy()
