"""ROC curves and histograms of a benchmark's pairs, as paths that a page draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from farout.benchmark.page_data import DIGITS, Bench, Pair, Run
from farout.evaluation.metrics import auroc, fpr95
from farout.report.histogram import Histogram

__all__ = ["curves", "roc_path"]

_POINTS = 64


def curves(bench: Bench) -> list[list[dict[str, Any] | None]]:
    """Of each run and pair: paths of the ROC curve and of both histograms, with their numbers; None where there are no
    scores.
    """
    return [[_curve(run, pair) for pair in bench.pairs] for run in bench.runs]


def _curve(run: Run, pair: Pair) -> dict[str, Any] | None:
    if pair.inside not in run.sides or pair.outside not in run.sides:
        return None
    inside, outside = (_numbers(run.sides[name].scores.score) for name in (pair.inside, pair.outside))
    if not len(inside) or not len(outside):
        return None
    high = max(np.quantile(np.r_[inside, outside], 0.98), np.quantile(inside, 0.995))
    bars = Histogram.of(inside, outside, run.threshold(), float(high), bins=40)
    return {
        "roc": roc_path(inside, outside),
        "id": bars.outline(bars.first),
        "ood": bars.outline(bars.second),
        "mark": bars.mark if bars.mark is not None and 0 <= bars.mark <= 100 else None,
        "low": bars.ends[0],
        "high": bars.ends[1] + (" and above" if bars.above else ""),
        "auroc": round(auroc(inside, outside), DIGITS),
        "fpr95": round(fpr95(inside, outside), DIGITS),
        "counts": [len(inside), len(outside)],
    }


def _numbers(scores: np.ndarray) -> np.ndarray:
    return scores[np.isfinite(scores)]


def roc_path(inside: np.ndarray, outside: np.ndarray) -> str:
    """The curve in a square of 100 by 100 whose first row is the top: x is the share of in-distribution images above a
    threshold, y that of the others; at most `2 * _POINTS` corners, spread evenly along the curve.
    """
    edges = np.unique(np.r_[inside, outside])[::-1]
    across, up = (
        np.r_[0, 1 - np.searchsorted(np.sort(side), edges, side="left") / len(side)] for side in (inside, outside)
    )
    length = across + up
    ends = np.searchsorted(length, np.linspace(0, 2, _POINTS) - 1e-9)
    # with the corner before each: many images of one score make a long straight piece
    chosen = np.unique(np.clip(np.r_[ends, ends - 1], 0, len(edges)))
    points = [f"{round(100 * x, 1):g} {round(100 - 100 * y, 1):g}" for x, y in zip(across[chosen], up[chosen])]
    return "M" + "L".join(dict.fromkeys(points))
