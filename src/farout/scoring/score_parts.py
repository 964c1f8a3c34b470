"""Parts of a scored set: files with fixed boundaries, which any process can write, on a disk or an object store."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from farout.core import storage
from farout.core.errors import ReadError, StoreError
from farout.core.schema import Schema, check_content
from farout.core.storage import FilePath
from farout.detectors.base import Scores

__all__ = ["ScoredPart", "list_parts", "read_part", "remove_part", "remove_temporary_parts", "write_part"]

FOLDER = "parts"
_COLUMNS = {
    "key": pa.string(),
    "score": pa.float64(),
    "p_value": pa.float64(),
    "is_ood": pa.bool_(),
    "status": pa.string(),
    "reason": pa.string(),
}
"""Columns of every part; those of the method's indicators follow."""


@dataclass(frozen=True)
class ScoredPart:
    """Consecutive images of a source, scored.

    Attributes:
        indices: their indices in the source.
        scores: their scores; without unreadable images if these are skipped.
        unreadable: reasons by key.
        content: hash of the pixels of all of them.
        environment: what they were scored with, see `Runtime.describe_environment`.
    """

    indices: range
    scores: Scores
    unreadable: dict[str, str]
    content: str
    environment: dict[str, Any]


class _PartContent(Schema):
    """The file next to the table of a part; a part with both files is complete."""

    images: int
    counts: dict[str, int]
    unreadable: dict[str, str]
    content: str
    environment: dict[str, Any]
    table: str


def _part_path(out: FilePath, start: int, suffix: str) -> FilePath:
    return out / FOLDER / f"{start:09d}{suffix}"


def list_parts(out: FilePath) -> frozenset[int]:
    """The index of the first image of each complete part."""
    files = storage.list_files(out / FOLDER)
    names = {name.removesuffix(".json") for name in files if re.fullmatch(r"[0-9]{9,}\.json", name)}
    return frozenset(int(name) for name in names if f"{name}.parquet" in files)


def write_part(out: FilePath, part: ScoredPart) -> None:
    """Write a part; to write it again changes nothing but the environment."""
    scores = part.scores
    columns = {
        "key": list(scores.keys),
        "score": scores.score,
        "p_value": scores.p_value,
        "is_ood": [bool(flag) if status == "ok" else None for flag, status in zip(scores.is_ood, scores.status)],
        "status": list(scores.status),
        "reason": [part.unreadable.get(key, "") for key in scores.keys],
        **scores.indicators,
    }
    schema = pa.schema([(name, _COLUMNS.get(name, pa.float64())) for name in columns])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    storage.write_bytes(_part_path(out, part.indices.start, ".parquet"), buffer.getvalue())
    about = _PartContent(
        images=len(part.indices),
        counts=dict(sorted(Counter(scores.status).items())),
        unreadable=part.unreadable,
        content=part.content,
        environment=dict(part.environment),
        table=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    storage.write_sealed_json(_part_path(out, part.indices.start, ".json"), about.model_dump())


def read_part(out: FilePath, indices: range) -> ScoredPart:
    """Read a part; raises StoreError if it is missing, was changed after it was written, or has other images."""
    where = _part_path(out, indices.start, ".json")
    content = storage.read_sealed_json(where)
    check_content(content, _PartContent, str(where))
    about = _PartContent(**content)
    path = _part_path(out, indices.start, ".parquet")
    try:
        data = storage.read_bytes(path)
    except ReadError as error:
        raise StoreError(str(error)) from error
    if hashlib.sha256(data).hexdigest() != about.table:
        raise StoreError(f"{path} was changed after it was written: its SHA-256 is not the recorded one")
    if about.images != len(indices):
        raise StoreError(f"{path} has {about.images} images, expected {len(indices)}")
    table = pq.read_table(io.BytesIO(data))
    scores = Scores(
        keys=tuple(table["key"].to_pylist()),
        score=_to_numbers(table["score"]),
        p_value=_to_numbers(table["p_value"]),
        is_ood=np.array([flag is True for flag in table["is_ood"].to_pylist()], dtype=bool),
        status=tuple(table["status"].to_pylist()),
        indicators={name: _to_numbers(table[name]) for name in table.column_names if name not in _COLUMNS},
    )
    return ScoredPart(indices, scores, about.unreadable, about.content, about.environment)


def remove_temporary_parts(out: FilePath) -> None:
    """Remove files that killed workers left unfinished; no worker may write meanwhile."""
    if isinstance(out, Path):  # an object store has no unfinished objects
        for temporary in (out / FOLDER).glob(".*.*"):
            temporary.unlink(missing_ok=True)


def _to_numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def remove_part(out: FilePath, start: int) -> None:
    """Remove the files of a part, if there are any: the one that makes it complete first."""
    for suffix in (".json", ".parquet"):
        storage.remove(_part_path(out, start, suffix))
