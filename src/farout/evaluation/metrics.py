"""How well scores tell out-of-distribution images from in-distribution ones: fractions, with 95 % intervals.

Scores are higher for images further out; out-of-distribution (OOD) images are the positives unless a docstring says
otherwise. Scores that are not numbers are left out with a warning and counted in neither side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score

from farout.core.errors import ConstantScoresWarning, FaroutError, NaNScoresWarning, TrapWarning
from farout.detectors.calibration import is_out
from farout.evaluation.intervals import (
    area_of_ranks,
    bootstrap,
    delong,
    dense_ranks,
    exact_reach,
    independent,
    interval_of_auroc,
)

__all__ = ["DetectionMetrics", "aupr_in", "aupr_out", "auroc", "detection", "evaluate", "false_alarm", "fpr95"]


@dataclass(frozen=True)
class DetectionMetrics:
    """AUROC, AUPR and FPR95 of one pair of sets, with the counts they rest on; NaN where a side is empty."""

    auroc: float
    auroc_low: float
    auroc_high: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    fpr95_low: float
    fpr95_high: float
    n_id: int
    n_ood: int


def _clean(scores: Any, side: str, start: str) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64).ravel()
    good = scores[~np.isnan(scores)]
    if len(good) < len(scores):
        message = f"{start}{len(scores) - len(good)} of {len(scores)} {side} scores are not numbers and are left out"
        warnings.warn(message, NaNScoresWarning, stacklevel=4)
    return good


def _comparable(*sides: np.ndarray) -> bool:
    """Whether both sides have scores and all are numbers: a comparison with NaN is False, which would look perfect."""
    return all(len(side) > 0 and not np.isnan(side).any() for side in sides)


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Probability that an OOD image scores higher than an in-distribution one, ties counting half; NaN if one side is
    empty or holds a NaN (`evaluate` leaves those out).
    """
    return delong(id_scores, ood_scores)[0] if _comparable(id_scores, ood_scores) else float("nan")


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with OOD images as positives (scikit-learn's step-wise sum)."""
    return _average_precision(ood_scores, id_scores)


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with in-distribution images as positives, scores negated."""
    return _average_precision(-np.asarray(id_scores), -np.asarray(ood_scores))


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    if not _comparable(positives, negatives):
        return float("nan")
    truth = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    # only ranks matter, and scikit-learn refuses infinite scores
    return float(average_precision_score(truth, stats.rankdata(np.r_[positives, negatives])))


def fpr95(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Share of OOD images taken for in-distribution at the smallest threshold that recalls at least 95 % of the
    in-distribution images (in-distribution = score <= threshold; no interpolation between ties). In-distribution
    images are the positives here. OpenOOD 1.5 and pytorch-ood take OOD images as positives (threshold at 95 % OOD
    recall): their figure is `fpr95(-ood_scores, -id_scores)`. NaN if one side is empty or holds a NaN.
    """
    if not _comparable(id_scores, ood_scores):
        return float("nan")
    return float(np.mean(np.asarray(ood_scores) <= _recall_threshold(np.asarray(id_scores))))


def _recall_threshold(id_scores: np.ndarray) -> float:
    needed = int(np.ceil(0.95 * len(id_scores) - 1e-9))
    return float(np.partition(id_scores, needed - 1)[needed - 1])


def false_alarm(id_p: Any, alpha: float) -> float:
    """Share of in-distribution images with p <= alpha, among those that have a p-value."""
    return _flagged(id_p, alpha)


def detection(ood_p: Any, alpha: float) -> float:
    """Share of OOD images with p <= alpha, among those that have a p-value."""
    return _flagged(ood_p, alpha)


def _flagged(p: Any, alpha: float) -> float:
    p = np.asarray(p, dtype=np.float64)
    known = p[~np.isnan(p)]
    return float(is_out(known, alpha).mean()) if len(known) else float("nan")


def evaluate(
    id_scores: Any,
    ood_scores: Any,
    *,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
    name: str = "",
) -> DetectionMetrics:
    """All metrics of a pair of sets.

    Args:
        id_scores: one score per in-distribution image.
        ood_scores: one score per out-of-distribution image.
        groups: ids of the source image behind every score of both sides, where variants of one image are on both:
            intervals then resample source images instead of scores.
        draws: number of bootstrap samples.
        seed: seed of the bootstrap.
        name: what is rated, which warnings begin with.

    Warns:
        NaNScoresWarning: some scores are not numbers; they are left out.
        ConstantScoresWarning: all scores are equal.
        TrapWarning: the AUROC and its whole interval are below one half. The sign of the score may be wrong, or the OOD
            images may be simpler than the in-distribution ones.
    """
    kept = _drop(groups, id_scores, ood_scores)
    start = f"{name}: " if name else ""
    inside = _clean(id_scores, "in-distribution", start)
    outside = _clean(ood_scores, "out-of-distribution", start)
    if not len(inside) or not len(outside):
        nan = float("nan")
        return DetectionMetrics(nan, nan, nan, nan, nan, nan, nan, nan, len(inside), len(outside))
    if np.ptp(np.r_[inside, outside]) == 0:
        message = f"{start}all scores are equal; the AUROC is one half by definition"
        warnings.warn(message, ConstantScoresWarning, stacklevel=2)
    rate = fpr95(inside, outside)
    spread = bootstrap(fpr95, inside, outside, groups=kept, draws=draws, seed=seed)
    spread = _widened(rate, spread, independent(kept, inside, outside)[1])
    if kept is None:
        area, low, high = interval_of_auroc(inside, outside)
    else:
        area = auroc(inside, outside)
        drawn = bootstrap(area_of_ranks, *dense_ranks(inside, outside), groups=kept, draws=draws, seed=seed)
        low, high = _widened(area, drawn, min(independent(kept, inside, outside)))
    if high < 0.5:
        message = f"AUROC {area:.3f} is below one half: the OOD images have lower scores than the in-distribution ones"
        warnings.warn(start + message, TrapWarning, stacklevel=2)
    pair = (inside, outside)
    return DetectionMetrics(area, low, high, aupr_in(*pair), aupr_out(*pair), rate, *spread, len(inside), len(outside))


def _widened(value: float, interval: tuple[float, float], count: int) -> tuple[float, float]:
    """At 0 or 1 every draw of a bootstrap is the same, yet `count` images do not prove a rate of exactly 0 or 1."""
    low, high = interval
    reach = exact_reach(count)
    return (min(low, 1 - reach) if value == 1 else low), (max(high, reach) if value == 0 else high)


def _drop(groups: tuple[np.ndarray, np.ndarray] | None, *sides: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The groups of the scores that are numbers."""
    if groups is None:
        return None
    if [len(ids) for ids in groups] != [np.size(scores) for scores in sides]:
        given = [len(ids) for ids in groups], [np.size(scores) for scores in sides]
        raise FaroutError(f"groups require one id per score, got {given[0]} ids for {given[1]} scores")
    first, second = (
        np.asarray(ids)[~np.isnan(np.asarray(scores, dtype=np.float64))]
        for ids, scores in zip(groups, sides, strict=True)
    )
    return first, second
