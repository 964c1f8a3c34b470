"""How well scores tell out-of-distribution images from in-distribution ones: fractions, with 95 % intervals.

Scores are higher for images further out; out-of-distribution (OOD) images are the positives unless a docstring says
otherwise. Scores that are not numbers are left out with a warning and counted in neither side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from farout.calibration import is_out
from farout.errors import ConstantScoresWarning, NaNScoresWarning, TrapWarning
from farout.evaluation.intervals import bootstrap, delong, interval_of_auroc

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


def _clean(scores: Any, side: str) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64).ravel()
    good = scores[~np.isnan(scores)]
    if len(good) < len(scores):
        message = f"{len(scores) - len(good)} of {len(scores)} {side} scores are not numbers and are left out"
        warnings.warn(message, NaNScoresWarning, stacklevel=4)
    return good


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Probability that an OOD image scores higher than an in-distribution one, ties counting half; NaN if one side is
    empty.
    """
    return delong(id_scores, ood_scores)[0] if len(id_scores) and len(ood_scores) else float("nan")


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with OOD images as positives (scikit-learn's step-wise sum)."""
    return _average_precision(ood_scores, id_scores)


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with in-distribution images as positives, scores negated."""
    return _average_precision(-np.asarray(id_scores), -np.asarray(ood_scores))


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    if not len(positives) or not len(negatives):
        return float("nan")
    truth = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    return float(average_precision_score(truth, np.r_[positives, negatives]))


def fpr95(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Share of OOD images taken for in-distribution at the smallest threshold that recalls at least 95 % of the
    in-distribution images (in-distribution = score <= threshold; OpenOOD's definition; no interpolation between
    ties). NaN without images.
    """
    if not len(id_scores) or not len(ood_scores):
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
) -> DetectionMetrics:
    """All metrics of a pair of sets.

    Args:
        id_scores, ood_scores: one score per image.
        groups: ids of the source image behind every score of both sides, where variants of one image are on both:
            intervals then resample source images instead of scores.
        draws, seed: of the bootstrap.

    Warns:
        NaNScoresWarning, ConstantScoresWarning, and TrapWarning for an AUROC that lies below one half with its whole
        interval: the sign is turned round, or the OOD images are simpler than the in-distribution ones.
    """
    kept = _drop(groups, id_scores, ood_scores)
    inside, outside = _clean(id_scores, "in-distribution"), _clean(ood_scores, "out-of-distribution")
    if not len(inside) or not len(outside):
        nan = float("nan")
        return DetectionMetrics(nan, nan, nan, nan, nan, nan, nan, nan, len(inside), len(outside))
    if np.ptp(np.r_[inside, outside]) == 0:
        warnings.warn("all scores are equal; the AUROC is one half by definition", ConstantScoresWarning, stacklevel=2)
    spread = bootstrap(fpr95, inside, outside, groups=kept, draws=draws, seed=seed)
    if kept is None:
        area, low, high = interval_of_auroc(inside, outside)
    else:
        area = auroc(inside, outside)
        low, high = bootstrap(auroc, inside, outside, groups=kept, draws=draws, seed=seed)
    if high < 0.5:
        message = f"AUROC {area:.3f} lies below one half: the OOD images score as nearer than the in-distribution ones"
        warnings.warn(message, TrapWarning, stacklevel=2)
    pair = (inside, outside)
    return DetectionMetrics(
        area, low, high, aupr_in(*pair), aupr_out(*pair), fpr95(*pair), *spread, len(inside), len(outside)
    )


def _drop(groups: tuple[np.ndarray, np.ndarray] | None, *sides: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The groups of the scores that are numbers."""
    if groups is None:
        return None
    first, second = (
        np.asarray(ids)[~np.isnan(np.asarray(scores, dtype=np.float64))]
        for ids, scores in zip(groups, sides, strict=True)
    )
    return first, second
