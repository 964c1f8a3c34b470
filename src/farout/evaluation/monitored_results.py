"""Monitoring of scored folders and tables into a folder: table, alarms and rates, and an HTML page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from farout.core import store
from farout.core.csv_files import write_csv
from farout.core.errors import FaroutError, StoreError, TooFewImagesWarning
from farout.core.files import hash_file
from farout.core.names import expand_path
from farout.data.splits import calibration_size
from farout.detectors.base import Detector, load
from farout.evaluation.monitoring import FDRMethod, Monitor, Statistic, expected_flag_range, rate_interval
from farout.evaluation.score_streams import Order, ScoreStream, read_score_stream
from farout.report.monitor_page import write_monitor_page

__all__ = ["MonitoredResults", "monitor_results"]

_TABLE, _SUMMARY, _PAGE = "monitor.csv", "monitor.json", "page.html"


@dataclass(frozen=True)
class MonitoredResults:
    """What `monitor_results` has written.

    Attributes:
        folder: the folder.
        monitor: the monitor after the last image; it continues with `update`.
        summary: the content of `monitor.json`.
    """

    folder: Path
    monitor: Monitor
    summary: dict[str, Any]


def monitor_results(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    by: Order | None = None,
    detector: Detector | str | Path | None = None,
    calibration_images: int | None = None,
    alpha: float | None = None,
    statistic: Statistic = "martingale",
    threshold: float | None = None,
    window: int = 100,
    fdr: float | None = None,
    fdr_method: FDRMethod = "lond",
    seed: int = 0,
) -> MonitoredResults:
    """Watch the p-values of scored images over time: `monitor.csv`, `monitor.json` and `page.html`.

    An earlier monitoring in the same folder is replaced, so that the command can be repeated as results arrive.

    Args:
        results: folders written by `farout score`, or tables (.csv, .parquet) with the columns key, score and p_value,
            all of one detector.
        out: folder of the monitoring.
        by: time order: `time` (a column), `row` (as given), `key` (numbers in it by value) or `mtime` (modification
            time of the image files); default: `time` if all tables have this column, else `row`.
        detector: the detector or its folder, for tables without p-values.
        calibration_images: number of calibration images of the detector, for tables without manifest.
        alpha: false-alarm rate that images are flagged at; default: that of the detector, else 0.05.
        statistic: what raises alarms: `martingale` (at most one alarm, with a probability of at most 1 / threshold
            while nothing changes) or `shiryaev-roberts` (repeated, on average at most one false alarm per `threshold`
            images).
        threshold: value of the statistic that raises an alarm; default: 100, or 10,000 for shiryaev-roberts.
        window: number of images for the windowed false-alarm rate.
        fdr: select images one by one at this false discovery rate, which requires `farout[monitor]`.
        fdr_method: method of the selection: `lond` (guaranteed for p-values of one calibration set) or `lord++`
            (selects more; proven for independent p-values).
        seed: seed of the random order of images with the same p-value.

    Raises:
        FaroutError: for settings out of range, or if no row has a p-value.
        StoreError: for results that cannot be read or are of several detectors, and if `out` contains other files.
    """
    folder = expand_path(out)
    _check_folder(folder)
    fitted = load(detector) if isinstance(detector, str | Path) else detector
    stream = read_score_stream(results, by=by, detector=fitted)
    monitor = Monitor(
        _choose_calibration_size(stream, calibration_images),
        alpha=alpha if alpha is not None else stream.alpha if stream.alpha is not None else 0.05,
        statistic=statistic,
        threshold=threshold,
        window=window,
        fdr=fdr,
        fdr_method=fdr_method,
        seed=seed,
    )
    decisions = monitor.update(stream.table)
    if not monitor.images:
        counts = ", ".join(f"{count} {status}" for status, count in monitor.status.items()) or "no rows"
        raise FaroutError(f"no image has a p-value ({counts}), so there is nothing to monitor")
    _warn_about_calibration(monitor)
    decisions.insert(0, "result", stream.table["result"])
    if "time" in stream.table:
        decisions.insert(2, "time", stream.table["time"])
    write_csv(decisions, folder / _TABLE)
    summary = _summarize(stream, monitor)
    write_monitor_page(decisions, _join_windows(decisions, monitor), summary, folder / _PAGE)
    summary["files"] = {name: hash_file(folder / name) for name in (_TABLE, _PAGE)}
    store.write_sealed_json(folder / _SUMMARY, summary)
    return MonitoredResults(folder, monitor, summary)


def _check_folder(folder: Path) -> None:
    """Raise StoreError unless the folder is new, empty, or contains nothing but an earlier monitoring."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; give a folder for the results")
    names = [] if not folder.is_dir() else sorted(path.name for path in folder.iterdir())
    own = (_TABLE, _SUMMARY, _PAGE)
    others = [name for name in names if name not in own and not name.startswith(tuple(f".{each}." for each in own))]
    if others:
        raise StoreError(f"{folder} contains other files ({', '.join(others[:3])}, …); give a new folder")


def _choose_calibration_size(stream: ScoreStream, given: int | None) -> int:
    known = stream.calibration_images
    if known is None and given is None:
        raise FaroutError(
            "tables do not tell the number of calibration images behind their p-values; give --calibration-images, or "
            "the folder of the detector with --detector"
        )
    if known is not None and given is not None and known != given:
        raise FaroutError(f"calibration_images is {given}, but the detector of the results has {known}; leave it out")
    return int(known if known is not None else given)  # type: ignore[arg-type]


def _warn_about_calibration(monitor: Monitor) -> None:
    calibration_images = monitor.calibration_images
    if calibration_images < calibration_size(0, monitor.alpha):
        message = f"with {calibration_images} calibration images no p-value reaches alpha {monitor.alpha}"
        warnings.warn(f"{message}, so nothing can be flagged", TooFewImagesWarning, stacklevel=3)
    if monitor.fdr is not None and monitor.first_fdr_level < 1 / (calibration_images + 1):
        needed = math.ceil(1 / monitor.first_fdr_level) - 1
        message = f"{monitor.fdr_method} tests the first image at the level {monitor.first_fdr_level:.2g}"
        warnings.warn(
            f"{message}, later images at lower levels as long as none is selected, and no p-value of "
            f"{calibration_images} calibration images is that low, so nothing can be selected; at least {needed} are "
            "necessary, or `farout score --fdr`, which selects all images together",
            TooFewImagesWarning,
            stacklevel=3,
        )


def _summarize(stream: ScoreStream, monitor: Monitor) -> dict[str, Any]:
    low, high = rate_interval(np.array([monitor.flagged]), np.array([monitor.images]))
    times = stream.table.get("time")
    expected = expected_flag_range(monitor.images, monitor.calibration_images, monitor.alpha)
    return {
        "results": list(stream.results),
        "order": stream.order,
        "detector": stream.detector,
        "settings": monitor.settings,
        "rows": monitor.rows,
        "counts": monitor.status,
        "images": monitor.images,
        "flagged": monitor.flagged,
        "rate": monitor.flagged / monitor.images,
        "rate_interval": [float(low[0]), float(high[0])],
        "expected_range": list(expected),
        "selected": None if monitor.fdr is None else monitor.selected,
        "log10_martingale": monitor.log10_martingale,
        "log10_shiryaev_roberts": monitor.log10_shiryaev_roberts if monitor.log10_shiryaev_roberts > -np.inf else None,
        "alarms": [
            {**asdict(alarm), "time": None if times is None else times.iloc[alarm.row - 1]} for alarm in monitor.alarms
        ],
        "versions": store.versions(),
    }


def _join_windows(decisions: pd.DataFrame, monitor: Monitor) -> pd.DataFrame:
    """One row per window, without overlap, for the page; the last one may be shorter."""
    scored = decisions[decisions["p_value"].notna()]
    number = np.arange(len(scored)) // monitor.window
    grouped = scored.groupby(number)
    sizes = grouped.size().to_numpy()
    flagged = grouped["flagged"].sum().to_numpy(dtype=int)
    low, high = rate_interval(flagged, sizes)
    expected = [expected_flag_range(int(size), monitor.calibration_images, monitor.alpha)[1] for size in sizes]
    last = np.cumsum(sizes)
    columns = {"first": last - sizes + 1, "last": last, "key": grouped["key"].first().to_numpy(), "flagged": flagged}
    rates = {"rate": flagged / sizes, "low": low, "high": high, "is_high": flagged / sizes > np.array(expected)}
    return pd.DataFrame({**columns, **rates, "alarms": grouped["alarm"].sum().to_numpy(dtype=int)})
