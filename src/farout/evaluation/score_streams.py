"""Scores of one detector in time order, read from scored folders and tables."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from farout.core.errors import FaroutError, StoreError
from farout.core.names import decode_file_name, find_path
from farout.core.remote_files import is_url
from farout.data.source_spec import parse_spec
from farout.detectors.base import Detector, Scores
from farout.detectors.calibration import compute_p_values
from farout.scoring.folder import read_manifest, read_score_table
from farout.scoring.watch import is_watched, read_watch_settings

__all__ = ["Order", "ScoreStream", "read_score_stream"]

Order = Literal["time", "row", "key", "mtime"]
_ORDERS = {
    "time": "column time",
    "row": "rows as they are in the results, one result after the other",
    "key": "keys, with numbers in them by value",
    "mtime": "modification time of the image files",
}


@dataclass(frozen=True)
class _Origin:
    """What a folder of results says about its scores."""

    detector: str
    calibration_images: int
    alpha: float
    images: str


@dataclass(frozen=True)
class ScoreStream:
    """Scores of one detector in time order.

    Attributes:
        table: one row per image: `result`, the path of its result; `key`; `status`; `p_value`, NaN where there is none;
            `time`, if it decides the order.
        order: description of what decides the order.
        results: path and number of rows of each result.
        calibration_images: number of calibration images of the detector; None if no manifest tells.
        alpha: the detector's false-alarm rate; None if no manifest tells.
        detector: fingerprint of the detector; None if no manifest tells.
    """

    table: pd.DataFrame
    order: str
    results: tuple[dict[str, Any], ...]
    calibration_images: int | None
    alpha: float | None
    detector: str | None


def read_score_stream(
    results: Sequence[str | Path], *, by: Order | None = None, detector: Detector | None = None
) -> ScoreStream:
    """Read results and put their rows in time order; rows of equal time stay in the order of the results.

    Args:
        results: folders written by `score_folder` or a `FolderWatcher`, or tables (.csv, .parquet) with the columns
            `key`, `score` and `p_value`, and optionally `status` and `time` (numbers, or times as ISO 8601).
        by: `time`, `row`, `key` or `mtime`; None: `time` if all tables have this column, else `row`.
        detector: the detector of the scores: p-values that a table lacks are computed, given ones are compared.

    Raises:
        FaroutError: for no result, one given twice, or an order that the results do not have.
        StoreError: for a result that cannot be read, has no p-values, or is of another detector than the others.
    """
    if not results:
        raise FaroutError("monitoring requires at least one scored folder or score table")
    for result in results:
        if is_url(str(result)):
            raise FaroutError(
                f"{result} is on an object store, and monitoring reads results of this machine; copy the folder "
                "(manifest.json and scores.csv are enough)"
            )
    paths = [find_path(result) for result in results]
    tables = [os.path.realpath(path / "scores.csv" if path.is_dir() else path) for path in paths]
    for path, table in zip(paths, tables):
        if tables.count(table) > 1:
            raise FaroutError(f"{path} is given twice; give each result once")
    origins = [_read_origin(path) for path in paths]
    fingerprint = _check_same_detector(paths, origins, detector)
    parts = [_read_result(path, detector) for path in paths]
    if by is None:
        with_time = [path for path, part in zip(paths, parts) if "time" in part]
        if with_time and len(with_time) < len(paths):
            other = next(path for path in paths if path not in with_time)
            raise FaroutError(f"{with_time[0]} has a column time and {other} has none; choose the order with --by")
        by = "time" if with_time else "row"
    positions = [_find_positions(by, *each) for each in zip(paths, origins, parts)]
    joined = pd.concat(parts, ignore_index=True)[["result", "key", "status", "p_value"]]
    if by == "time":
        times = [time for part in positions for time in part]
        joined["time"] = [time.isoformat() if isinstance(time, pd.Timestamp) else time for time in times]
    if by != "row":
        joined = joined.iloc[_sort_stable(by, positions)].reset_index(drop=True)
    known = next((origin for origin in origins if origin is not None), None)
    calibration_images, alpha = (None, None) if known is None else (known.calibration_images, known.alpha)
    if detector is not None:
        calibration_images, alpha = len(detector.calibration), detector.alpha
    return ScoreStream(
        joined,
        _ORDERS[by],
        tuple({"path": str(path), "rows": len(part)} for path, part in zip(paths, parts)),
        calibration_images,
        alpha,
        fingerprint,
    )


def _read_origin(path: Path) -> _Origin | None:
    """Detector and images of a folder of results; None for a table."""
    if os.path.lexists(path / "manifest.json"):
        manifest = read_manifest(path)
        about = manifest["about"]
        return _Origin(manifest["detector"], about["calibration_images"], about["alpha"], manifest["location"])
    if is_watched(path):
        settings = read_watch_settings(path)
        return _Origin(settings["detector"], settings["calibration_images"], settings["alpha"], settings["folder"])
    return None


def _check_same_detector(
    paths: Sequence[Path], origins: Sequence[_Origin | None], detector: Detector | None
) -> str | None:
    """The fingerprint of the detector of all results; raises StoreError if there are two."""
    first, fingerprint = ("the given detector", detector.fingerprint) if detector is not None else ("", None)
    for path, origin in zip(paths, origins):
        if origin is None:
            continue
        if fingerprint is not None and origin.detector != fingerprint:
            raise StoreError(
                f"{path} has scores of another detector than {first} (or of the same one before it was fitted or "
                "calibrated again); monitor the results of each detector separately"
            )
        first, fingerprint = str(path), origin.detector
    return fingerprint


def _read_result(path: Path, detector: Detector | None) -> pd.DataFrame:
    scores, table = read_score_table(path)
    if is_watched(path if path.is_dir() else path.parent) and bool(table.tail(1).iloc[:, -1].isna().any()):
        table = table.iloc[:-1]  # a row that is being written
        scores = Scores.from_frame(table)
    p_values = scores.p_value
    if detector is not None:
        computed = compute_p_values(scores.score, detector.calibration_scores[detector.score_name])
        differing = np.flatnonzero(np.abs(p_values - computed) > 1e-3 / (len(detector.calibration) + 1))
        if len(differing):
            row = differing[0]
            raise StoreError(
                f"{path}: {scores.keys[row]} has the p-value {p_values[row]:.8g}, but that of its score by the given "
                f"detector is {computed[row]:.8g}; give the detector that computed the scores"
            )
        p_values = computed
    elif "p_value" not in table:
        raise StoreError(
            f"{path} has no column p_value; give the detector of the scores with --detector, so that it is computed"
        )
    columns = {"result": str(path), "key": list(scores.keys), "status": list(scores.status)}
    part = pd.DataFrame(columns | {"p_value": p_values})
    return part.assign(time=table["time"].to_numpy()) if "time" in table else part


def _find_positions(by: Order, path: Path, origin: _Origin | None, part: pd.DataFrame) -> list[Any]:
    """What the rows of one result are sorted by."""
    if by == "time":
        if "time" not in part:
            raise FaroutError(f"{path} has no column time; give tables with times, or another order with --by")
        return _parse_times(part["time"], path, list(part["key"]))
    if by == "key":
        return [_split_numbers(key) for key in part["key"]]
    if by == "mtime":
        location = parse_spec(origin.images).location if origin is not None else str(path.parent)
        folder = find_path(location)
        if not folder.is_dir():
            raise FaroutError(f"--by mtime requires image files in a folder, and the images of {path} are {location}")
        return [_modification_time(folder / decode_file_name(key), path) for key in part["key"]]
    return []


def _sort_stable(by: Order, positions: Sequence[list[Any]]) -> list[int]:
    joined = [position for part in positions for position in part]
    kinds = {isinstance(position, pd.Timestamp) for position in joined}
    if by == "time" and len(kinds) > 1:
        raise FaroutError("the column time has numbers in one result and dates in another; give one kind of time")
    return sorted(range(len(joined)), key=joined.__getitem__)


def _parse_times(times: pd.Series[Any], path: Path, keys: Sequence[str]) -> list[Any]:
    """Numbers, or points in time in UTC; raises StoreError that names the first row without a time."""
    parsed: pd.Series[Any]
    if pd.api.types.is_numeric_dtype(times) and not pd.api.types.is_bool_dtype(times):
        parsed = times.astype(float)
    elif pd.api.types.is_datetime64_any_dtype(times):
        parsed = pd.to_datetime(times, utc=True)
    else:
        parsed = pd.to_datetime(times, utc=True, format="ISO8601", errors="coerce")
    missing = np.flatnonzero(parsed.isna())
    if len(missing):
        key, time = keys[missing[0]], str(times.iloc[missing[0]])
        raise StoreError(
            f"{path}: {key} has the time {time!r}; every row requires a number or a time such as 2026-05-31T12:00:00Z"
        )
    return list(parsed)


def _split_numbers(key: str) -> list[tuple[int, int, str]]:
    """Text and numbers of a key, so that `frame_9` is before `frame_10`."""
    parts = re.split(r"([0-9]+)", key)
    return [(0, int(part), part) if index % 2 else (1, 0, part) for index, part in enumerate(parts)]


def _modification_time(file: Path, result: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except (OSError, ValueError) as error:
        raise FaroutError(
            f"--by mtime requires the image files of {result}, and {file} cannot be found; give another order"
        ) from error
