"""Scoring of images that are at hand: encoded bytes, PIL images, arrays or paths in, a table of scores out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.core.files import hash_file
from farout.core.profiling import count_images, timed
from farout.data.image_objects import path_of
from farout.data.image_source import ImageSource
from farout.data.in_memory import list_images
from farout.data.read_settings import DEFAULT_READING, FULL_RANGE, ReadSettings
from farout.detectors.base import Detector, Measurements, find_detector, load
from farout.detectors.calibration import check_fitted
from farout.detectors.results import Scores

__all__ = ["MeasuredImages", "Scorer"]

Table = TypeVar("Table", pa.Table, pa.RecordBatch, pd.DataFrame, dict[str, Any])


@dataclass(frozen=True)
class MeasuredImages:
    """What the networks have computed about the images of a source.

    Attributes:
        measurements: of the readable images, in their order; None if there are none.
        unreadable: the reason by key of each unreadable image.
        content: content hash of each image, with the variant applied; "unreadable" if it cannot be read.
    """

    measurements: Measurements | None
    unreadable: dict[str, str]
    content: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of images that were measured."""
        return 0 if self.measurements is None else len(self.measurements)


class Scorer:
    """Scores tables of images with a detector; safe to share between threads, and to send to other processes.

    A scorer of a folder is pickled as the path of the folder and its settings. The detector is loaded at first use,
    once per process for all scorers of the same folder.

    Each image is decoded once. Its score does not depend on the others in the table (see docs/reproducibility.md), so
    that a data set can be cut into tables in any way.

    Args:
        detector: a fitted detector or its folder.
        reading: limits for encoded images and files, and the value range of images with more than 8 bits; None: that of
            the fitted images. `frames` must be `first`.
        fingerprint: that of the detector which the folder must contain; None: any. A scorer that was pickled after it
            was used requires the same detector.
        **runtime: replaces device, precision, batch_size, workers or cache of the fit, see `Runtime`; only with a
            folder.

    Raises:
        FaroutError: the detector is not fitted, or a setting does not fit.
        StoreError: at first use, the folder is no intact detector.

    Example:
        >>> scorer = farout.Scorer("detector")
        >>> scorer({"key": ["a", "b"], "image": [png_bytes, pil_image]})
    """

    def __init__(
        self,
        detector: Detector | str | Path,
        *,
        reading: ReadSettings = DEFAULT_READING,
        fingerprint: str | None = None,
        **runtime: Any,
    ) -> None:
        if reading.frames != "first":
            raise FaroutError("a scorer gives one score per image; frames must be 'first'")
        self.reading, self._runtime = reading, runtime
        self._loaded: _LoadedDetector | None = None
        self._fingerprint = fingerprint
        if isinstance(detector, Detector):
            check_fitted(detector)
            if runtime:
                raise FaroutError(f"{', '.join(runtime)}: give these settings to farout.load, which makes the detector")
            self.folder: Path | None = None
            self._loaded = _LoadedDetector(detector, threading.RLock())
        else:
            self.folder = find_detector(detector)

    @property
    def detector(self) -> Detector:
        """The detector, loaded if it was not yet."""
        return self._load().detector

    def _load(self) -> _LoadedDetector:
        if self._loaded is None:
            assert self.folder is not None
            hashes = self.folder / store.HASHES_FILE
            version = hash_file(hashes) if hashes.is_file() else ""
            with _loading_lock:
                loaded = _load_once(self.folder, version, tuple(sorted(self._runtime.items())))
            if self._fingerprint not in (None, loaded.detector.fingerprint):
                raise StoreError(
                    f"{self.folder} contains another detector than the one that was given; it was fitted or changed "
                    "meanwhile"
                )
            self._loaded = loaded
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            raise FaroutError(
                "a scorer of a detector in memory cannot be sent to another process; save the detector and give the "
                "folder: Scorer(folder)"
            )
        if self._loaded is not None and self._fingerprint is None:
            self._fingerprint = self._loaded.detector.fingerprint
        return {**vars(self), "_loaded": None}

    def __repr__(self) -> str:
        return f"Scorer({str(self.folder) if self.folder is not None else self.detector!r})"

    def __call__(self, table: Table) -> Table:
        """Score the images of a table.

        Args:
            table: a table of pyarrow, a DataFrame, or a dict of columns of equal length: `image` (encoded bytes, PIL
                images, arrays or tensors of one image each, or {"bytes": ..., "path": ...}) or `path` (of image
                files), and `key` (texts; default: the paths, else the row numbers). Others are ignored.

        Returns:
            A table of the same type (of a record batch, a table) with a row per image in the same order: `key`,
            `score` (higher = more anomalous), `p_value`, `is_ood`, `status`, `reason`, and each indicator of the
            method. An image that cannot be read has the status `unreadable`, a reason, and no score; `is_ood` is then
            null.

        Raises:
            FaroutError: the table has no images, or columns of different lengths.
        """
        keys, images = _read_columns(table)
        scored = self.score(images, keys)
        if isinstance(table, pd.DataFrame):
            return scored.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get)
        if isinstance(table, Mapping):
            return {name: scored[name].to_numpy(zero_copy_only=False) for name in scored.column_names}
        return scored

    def score(self, images: Sequence[object], keys: Sequence[str] | None = None) -> pa.Table:
        """Score images, see `__call__`.

        Args:
            images: objects as in the column `image`, or paths.
            keys: name of each image in the result; default: the paths, else the row numbers.
        """
        if keys is None:
            keys = [path_of(image) or str(row) for row, image in enumerate(images)]
        if len(keys) != len(images):
            raise FaroutError(f"there are {len(images)} images and {len(keys)} keys; expected one key per image")
        loaded = self._load()
        value_range = loaded.detector.preprocessing.value_range
        listing = list_images(images, self.reading, require_range=value_range is None)
        source = ImageSource("images", listing, policy="nan", memory_mib=0, reading=self.reading)
        source = source.with_value_range(value_range or FULL_RANGE)
        with loaded.lock:
            measured = self.measure(source)
            scores = Scores.empty(loaded.detector.calibration_scores)
            if measured.measurements is not None:
                scores = loaded.detector.score_measurements(measured.measurements)
        source.warn_about_reading()
        return _to_table(scores.reindex(source.keys), keys, measured.unreadable)

    def measure(self, source: ImageSource, advance: Callable[[int], object] | None = None) -> MeasuredImages:
        """Run the networks on all images of a source.

        Args:
            source: images opened by `Detector.open_images`.
            advance: called with a number of images that are done, for progress bars.
        """
        loaded, parts, content = self._load(), list[Measurements](), ["unreadable"] * len(source)
        with loaded.lock:
            for batch in loaded.detector.load_batches(source):
                count_images(len(batch.keys))
                if batch.keys:
                    with timed("network"):
                        parts.append(loaded.detector.measure(batch))
                for index, identity in zip(batch.indices, batch.identities, strict=True):
                    content[index] = identity
                if advance is not None:
                    advance(len(batch.keys))
        if advance is not None:
            advance(content.count("unreadable"))
        return MeasuredImages(Measurements.join(parts) if parts else None, source.unreadable, tuple(content))


@dataclass(frozen=True)
class _LoadedDetector:
    """A detector, and the lock that a thread holds while it uses its networks."""

    detector: Detector
    lock: threading.RLock


_loading_lock = threading.Lock()
"""Threads that use a folder for the first time at once would otherwise each load it."""


@lru_cache(maxsize=4)
def _load_once(folder: Path, version: str, runtime: tuple[tuple[str, Any], ...]) -> _LoadedDetector:
    """Load a detector, unless this process did; `version` differs if the folder was written again."""
    return _LoadedDetector(load(folder, **dict(runtime)), threading.RLock())


def _read_columns(table: Any) -> tuple[list[str] | None, list[object]]:
    """Return the keys, if there are any, and the images of a table."""
    if isinstance(table, pa.Table | pa.RecordBatch):
        names = table.schema.names
    elif isinstance(table, pd.DataFrame | Mapping):
        names = list(table)
    else:
        raise FaroutError(f"expected a table of pyarrow, a DataFrame or a dict of columns, got {type(table).__name__}")
    name = next((name for name in ("image", "path") if name in names), None)
    if name is None:
        raise FaroutError(f"the table has the columns {', '.join(map(str, names))}; expected 'image' or 'path'")
    images = _read_column(table[name])
    keys = [str(key) for key in _read_column(table["key"])] if "key" in names else None
    if keys is None and "path" in names:
        keys = [str(path) for path in _read_column(table["path"])]
    if keys is not None and len(keys) != len(images):
        raise FaroutError(f"the column {name} has {len(images)} rows and the keys {len(keys)}; expected as many")
    return keys, images


def _read_column(column: Any) -> list[object]:
    """Return the values of a column; lists of numbers, as pyarrow stores arrays, become arrays of their own type."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in _read_column(chunk)]
    if not isinstance(column, pa.Array):
        return column.tolist() if isinstance(column, np.ndarray) and column.dtype == object else list(column)
    if isinstance(column, pa.FixedShapeTensorArray):
        return list(column.to_numpy_ndarray())
    if isinstance(column, pa.ExtensionArray):  # such as the tensors of Ray
        return list(column.to_numpy(zero_copy_only=False))
    values, kind = column.to_pylist(), column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return values
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return [None if value is None else np.array(value, dtype=kind.to_pandas_dtype()) for value in values]


def _to_table(scores: Scores, keys: Sequence[str], unreadable: Mapping[str, str]) -> pa.Table:
    has_score = np.array([status == "ok" for status in scores.status], dtype=bool)
    columns: dict[str, pa.Array] = {
        "key": pa.array(keys, pa.string()),
        "score": pa.array(scores.score, pa.float64()),
        "p_value": pa.array(scores.p_value, pa.float64()),
        "is_ood": pa.array(scores.is_ood, pa.bool_(), mask=~has_score),
        "status": pa.array(scores.status, pa.string()),
        "reason": pa.array([unreadable.get(key, "") for key in scores.keys], pa.string()),
    }
    return pa.table(columns | {name: pa.array(values, pa.float64()) for name, values in scores.indicators.items()})
