"""`farout monitor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from farout.cli.output import print_existing
from farout.cli.terminal import print_text
from farout.evaluation.monitored_results import MonitoredResults, monitor_results
from farout.evaluation.monitoring import FDRMethod, Statistic
from farout.evaluation.score_streams import Order

__all__ = ["ALARM_STATUS", "monitor", "print_monitored_results"]

ALARM_STATUS = 3
"""Exit status of `farout monitor --fail-on-alarm` if there was an alarm."""
_SHOWN_ALARMS = 5


def monitor(
    results: Sequence[str],
    *,
    out: str,
    by: Order | None = None,
    detector: str | None = None,
    calibration_images: int | None = None,
    alpha: float | None = None,
    statistic: Statistic = "martingale",
    threshold: float | None = None,
    window: int = 100,
    fdr: float | None = None,
    fdr_method: FDRMethod = "lond",
    seed: int = 0,
    fail_on_alarm: bool = False,
) -> MonitoredResults:
    """Watch the p-values of scored images over time: martingale, false-alarm rate, alarms.

    Args:
        results: folders written by `farout score`, also with `--watch`, or tables (.csv, .parquet) with the columns
            key, score and p_value; all of one detector.
        out: folder of the monitoring; an earlier monitoring there is replaced.
        by: time order: `time` (a column), `row` (as given), `key` (numbers in it by value) or `mtime` (modification
            time of the image files); default: `time` if all tables have this column, else `row`.
        detector: folder of the detector, for tables without p-values.
        calibration_images: number of calibration images of the detector, for tables without a manifest.
        alpha: false-alarm rate that images are flagged at; default: that of the detector, else 0.05.
        statistic: what raises alarms: `martingale` (at most one alarm, with a probability of at most 1 / threshold
            while nothing changes) or `shiryaev-roberts` (repeated, on average at most one false alarm per `threshold`
            images).
        threshold: value of the statistic that raises an alarm; default: 100, or 10,000 for shiryaev-roberts.
        window: number of images for the windowed false-alarm rate.
        fdr: select images one by one at this false discovery rate; requires `farout[monitor]`.
        fdr_method: method of the selection: `lond` (guaranteed for p-values of one calibration set) or `lord++`
            (selects more; proven for independent p-values).
        seed: seed of the random order of images with the same p-value.
        fail_on_alarm: exit with status 3 if there was an alarm.
    """
    return monitor_results(
        results,
        out,
        by=by,
        detector=detector,
        calibration_images=calibration_images,
        alpha=alpha,
        statistic=statistic,
        threshold=threshold,
        window=window,
        fdr=fdr,
        fdr_method=fdr_method,
        seed=seed,
    )


def print_monitored_results(monitored: MonitoredResults, arguments: Mapping[str, Any]) -> None:
    """Prints counts, the false-alarm rate with its interval, alarms, and the files.

    Exits with status 3 if there was an alarm and `--fail-on-alarm` is given.
    """
    state, summary = monitored.monitor, monitored.summary
    others = "".join(f", {count} {status}" for status, count in state.status.items() if status != "ok")
    selected = "" if state.fdr is None else f", {state.selected} selected"
    print_text(f"{state.images} images ({state.flagged} flagged{selected}){others}; order: {summary['order']}")
    (low, high), (expected_low, expected_high) = summary["rate_interval"], summary["expected_range"]
    print_text(
        f"flagged: {summary['rate']:.3f} ({low:.3f}-{high:.3f}); expected while nothing changes: "
        f"{expected_low:.3f}-{expected_high:.3f}"
    )
    statistic = state.statistic.replace("martingale", "the martingale").replace("shiryaev-roberts", "Shiryaev-Roberts")
    for alarm in state.alarms[:_SHOWN_ALARMS]:
        print_text(f"ALARM at image {alarm.image} ({alarm.key}): {statistic} reached {state.threshold:g}")
    if len(state.alarms) > _SHOWN_ALARMS:
        print_text(f"  … and {len(state.alarms) - _SHOWN_ALARMS} more alarms, listed in monitor.json")
    if not state.alarms:
        print_text(f"no alarm: {statistic} did not reach {state.threshold:g}")
    print_existing(monitored.folder, "monitor.csv", "monitor.json", "page.html")
    if state.alarms and arguments["fail_on_alarm"]:
        raise SystemExit(ALARM_STATUS)
