"""`farout evaluate`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.core.errors import UsageError
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors.base import load
from farout.evaluation.evaluate import evaluate as evaluate_detector
from farout.evaluation.evaluate import evaluate_scores
from farout.evaluation.results import Evaluation

__all__ = ["check_settings", "evaluate", "print_metrics"]

_COLUMN_TITLES = {"fpr95": "FPR95", "false_alarm": "false alarms", "detection": "detected", "images_per_s": "img/s"}
"""Columns printed next to detector, set and AUROC; metrics.csv has all columns."""


def evaluate(
    detector: str | None = None,
    *,
    id: str | None = None,
    ood: Sequence[str] = (),
    scores: Sequence[str] = (),
    out: str | None = None,
    limit: int | None = None,
    standard_baselines: bool = True,
    trivial_baselines: bool = True,
    random_weights_baseline: bool = False,
    baseline_images: str | None = None,
    baseline_limit: int | None = 1000,
    ood_subsets: int = 0,
    processes: int = 1,
    profile: bool = False,
    reading: ReadSettings,
    runtime: dict[str, Any],
) -> Evaluation:
    """Evaluate a detector, or given scores, on out-of-distribution images.

    Args:
        detector: folder of a fitted detector.
        id: in-distribution images that were not used in the fit.
        ood: one or more sources of out-of-distribution images.
        scores: evaluate score tables instead of a detector: the in-distribution file first, then the
            out-of-distribution files.
        out: folder of the results.
        limit: use a seeded random sample of this many images of each source; default: all.
        standard_baselines: also evaluate the methods that the detector names as its baselines.
        trivial_baselines: also evaluate trivial baselines (color, PNG size, edges, JPEG blocks).
        random_weights_baseline: also evaluate the same detector with random weights.
        baseline_images: images to fit the baselines on; default: those of the detector's fit.
        baseline_limit: maximum number of images to fit the trivial baselines and the random weights on.
        ood_subsets: also write OUT/subsets.csv: metrics over this many random subsets with one out-of-distribution
            image per five in-distribution images, as in many papers; 0: off.
        processes: share the images among this many processes on this machine, which use its GPUs in turn. The processes
            of `torchrun` and `accelerate launch` share them, too.
        profile: print the seconds of each stage after the run, such as reading, decoding and the network
            (docs/performance.md).
        reading: how image files are read.
        runtime: runtime settings that replace those of the fit.
    """
    if scores:
        return evaluate_scores(scores, out)
    assert detector is not None  # by `check_settings`
    assert out is not None
    return evaluate_detector(
        load(detector, **runtime),
        id,
        ood,
        out,
        limit=limit,
        reading=reading,
        standard_baselines=standard_baselines,
        trivial_baselines=trivial_baselines,
        random_weights_baseline=random_weights_baseline,
        baseline_images=baseline_images,
        baseline_limit=baseline_limit,
        ood_subsets=ood_subsets,
        processes=processes,
    )


def check_settings(
    *,
    detector: str | None,
    id: str | None,
    ood: Sequence[str],
    scores: Sequence[str],
    out: str | None,
    reading: ReadSettings,
    runtime: Mapping[str, Any],
    **others: Any,
) -> None:
    """Raises UsageError for score tables together with settings of a detector's evaluation, and for missing
    settings.
    """
    if scores:
        if detector is not None or id is not None or ood:
            raise UsageError("--scores evaluates score tables; leave out the detector, --id and --ood")
        parameters = inspect.signature(evaluate).parameters
        changed = [name for name, value in vars(reading).items() if value != getattr(DEFAULT_READING, name)]
        unused = [*runtime, *changed, *(name for name, value in others.items() if value != parameters[name].default)]
        if unused:
            raise UsageError(f"with --scores, {', '.join(unused)} has no effect; leave it out")
        return
    given = {"DETECTOR": detector, "--id": id, "--ood": ood, "--out": out}
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UsageError(f"missing {', '.join(missing)} (see `farout evaluate --help`)")


def print_metrics(evaluation: Evaluation) -> None:
    """Prints the evaluation of each detector's own score: AUROC with its interval, FPR95, and the share of flagged
    in-distribution images (false alarms) and out-of-distribution images (detected).
    """
    own = evaluation.method_scores
    columns = [column for column in _COLUMN_TITLES if own[column].notna().any()]
    table = new_table()
    table.add_column("detector", no_wrap=True)
    table.add_column("out-of-distribution", overflow="fold")
    for title in ("AUROC (95 %)", *(_COLUMN_TITLES[column] for column in columns)):
        table.add_column(title, no_wrap=True)
    for row in own.to_dict("records"):
        auroc = f"{row['auroc']:.3f} ({row['auroc_low']:.3f}-{row['auroc_high']:.3f})"
        numbers = [
            "–" if math.isnan(row[column]) else f"{row[column]:.{1 if column == 'images_per_s' else 3}f}"
            for column in columns
        ]
        table.add_row(str(row["detector"]), str(row["ood"]), auroc, *numbers)
    print_table(table)
    if "images_per_s" in columns and own["images_per_s"].isna().any():
        print_text("–: not measured, because features or scores were stored before")
    for pair in evaluation.differences.to_dict("records"):
        if pair["difference"] == pair["difference"]:  # not NaN
            interval = f"{pair['difference']:+.3f} ({pair['low']:+.3f} to {pair['high']:+.3f})"
            print_text(f"AUROC difference {pair['first']} - {pair['second']}, {pair['ood']}: {interval}")
    for path in evaluation.paths:
        print_text(path)
