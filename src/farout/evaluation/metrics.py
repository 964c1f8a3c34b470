"""Detection metrics with 95 % confidence intervals, as fractions.

Higher scores mean more anomalous images; out-of-distribution (OOD) images are the positives unless a docstring says
otherwise. NaN scores are left out with a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from farout.core.errors import ConstantScoresWarning, FaroutError, MisleadingResultWarning, NaNScoresWarning
from farout.detectors.calibration import flag_outliers
from farout.evaluation.intervals import (
    auroc_interval,
    auroc_of_ranks,
    bootstrap_interval,
    count_independent,
    delong,
    dense_ranks,
    rule_of_three,
)

__all__ = [
    "DetectionMetrics",
    "aupr_in",
    "aupr_out",
    "auroc",
    "detection_metrics",
    "detection_rate",
    "false_alarm_rate",
    "fpr95",
]


@dataclass(frozen=True)
class DetectionMetrics:
    """AUROC, AUPR and FPR95 of one pair of sets with the numbers of scores; NaN if one of the sets has no scores."""

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


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Probability that an OOD image scores higher than an in-distribution one, ties counting half.

    NaN if one of the sets is empty or has a NaN.
    """
    return delong(id_scores, ood_scores)[0] if _has_numbers(id_scores, ood_scores) else float("nan")


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with OOD images as positives (scikit-learn's step-wise sum)."""
    return _average_precision(ood_scores, id_scores)


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with in-distribution images as positives and negated scores."""
    return _average_precision(-np.asarray(id_scores), -np.asarray(ood_scores))


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    if not _has_numbers(positives, negatives):
        return float("nan")
    is_positive = np.repeat([1, 0], [len(positives), len(negatives)])
    # only ranks matter, and scikit-learn refuses infinite scores
    from sklearn.metrics import average_precision_score  # takes long to import; a monitor does not use it

    ranks = stats.rankdata(np.concatenate([positives, negatives]))
    return float(average_precision_score(is_positive, ranks))


def fpr95(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """False positive rate at 95 % true positive rate, in-distribution images being the positives.

    The share of OOD images with a score at most the smallest threshold that accepts at least 95 % of the
    in-distribution images (score <= threshold; no interpolation between ties). OpenOOD 1.5 and pytorch-ood take OOD
    images as positives (threshold at 95 % OOD recall): their value is `fpr95(-ood_scores, -id_scores)`. NaN if one of
    the sets is empty or has a NaN.
    """
    if not _has_numbers(id_scores, ood_scores):
        return float("nan")
    rank = int(np.ceil(0.95 * len(id_scores) - 1e-9)) - 1
    threshold = np.partition(np.asarray(id_scores), rank)[rank]
    return float(np.mean(np.asarray(ood_scores) <= threshold))


def _has_numbers(*samples: np.ndarray) -> bool:
    """Whether no sample is empty or has a NaN. A comparison with NaN is False, which would look perfect."""
    return all(len(sample) > 0 and not np.isnan(sample).any() for sample in samples)


def false_alarm_rate(id_p_values: Any, alpha: float) -> float:
    """Share of in-distribution images with p <= alpha, among those that have a p-value."""
    return _flagged_share(id_p_values, alpha)


def detection_rate(ood_p_values: Any, alpha: float) -> float:
    """Share of OOD images with p <= alpha, among those that have a p-value."""
    return _flagged_share(ood_p_values, alpha)


def _flagged_share(p_values: Any, alpha: float) -> float:
    p = np.asarray(p_values, dtype=np.float64)
    p = p[~np.isnan(p)]
    return float(flag_outliers(p, alpha).mean()) if len(p) else float("nan")


def detection_metrics(
    id_scores: Any,
    ood_scores: Any,
    *,
    image_ids: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
    name: str = "",
    check_direction: bool = True,
) -> DetectionMetrics:
    """Compute all metrics of a pair of sets.

    Args:
        id_scores: one score per in-distribution image, (N,).
        ood_scores: one score per OOD image, (M,).
        image_ids: ids of the original image behind every score of both sets, if variants of one image are in both;
            intervals then resample original images instead of scores.
        draws: number of bootstrap samples.
        seed: seed of the bootstrap.
        name: name of what is evaluated, for the warnings.
        check_direction: whether to warn of an AUROC below one half.

    Warns:
        NaNScoresWarning: some scores are NaN.
        ConstantScoresWarning: all scores are equal.
        MisleadingResultWarning: the whole interval of the AUROC is below one half: the sign of the score is reversed,
            or the OOD images are simpler than the in-distribution ones.
    """
    prefix = f"{name}: " if name else ""
    samples = []
    for label, values in (("in-distribution", id_scores), ("out-of-distribution", ood_scores)):
        scores = np.asarray(values, dtype=np.float64).ravel()
        missing = int(np.isnan(scores).sum())
        if missing:
            message = f"{prefix}{missing} of {len(scores)} {label} scores are not numbers and are left out"
            warnings.warn(message, NaNScoresWarning, stacklevel=2)
        samples.append(scores)
    if image_ids is not None:
        if [len(ids) for ids in image_ids] != [len(scores) for scores in samples]:
            lengths = [len(ids) for ids in image_ids], [len(scores) for scores in samples]
            raise FaroutError(f"image_ids require one id per score, got {lengths[0]} ids for {lengths[1]} scores")
        image_ids = (
            np.asarray(image_ids[0])[~np.isnan(samples[0])],
            np.asarray(image_ids[1])[~np.isnan(samples[1])],
        )
    id_known, ood_known = (scores[~np.isnan(scores)] for scores in samples)
    if not len(id_known) or not len(ood_known):
        nan = float("nan")
        return DetectionMetrics(nan, nan, nan, nan, nan, nan, nan, nan, len(id_known), len(ood_known))
    if np.ptp(np.concatenate([id_known, ood_known])) == 0:
        message = f"{prefix}all scores are equal; the AUROC is one half by definition"
        warnings.warn(message, ConstantScoresWarning, stacklevel=2)

    independent_id, independent_ood = count_independent(image_ids, id_known, ood_known)
    fpr = fpr95(id_known, ood_known)
    fpr_interval = bootstrap_interval(fpr95, id_known, ood_known, image_ids=image_ids, draws=draws, seed=seed)
    fpr_low, fpr_high = _widen_at_bounds(fpr, fpr_interval, independent_ood)
    if image_ids is None:
        area, low, high = auroc_interval(id_known, ood_known)
    else:
        area = auroc(id_known, ood_known)
        ranks = dense_ranks(id_known, ood_known)
        area_interval = bootstrap_interval(auroc_of_ranks, *ranks, image_ids=image_ids, draws=draws, seed=seed)
        low, high = _widen_at_bounds(area, area_interval, min(independent_id, independent_ood))
    if check_direction and high < 0.5:
        message = f"AUROC {area:.3f} is below one half: the OOD images have lower scores than the in-distribution ones"
        warnings.warn(prefix + message, MisleadingResultWarning, stacklevel=2)
    return DetectionMetrics(
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        aupr_in=aupr_in(id_known, ood_known),
        aupr_out=aupr_out(id_known, ood_known),
        fpr95=fpr,
        fpr95_low=fpr_low,
        fpr95_high=fpr_high,
        n_id=len(id_known),
        n_ood=len(ood_known),
    )


def _widen_at_bounds(value: float, interval: tuple[float, float], count: int) -> tuple[float, float]:
    """Extend the interval of a rate of 0 or 1, for which all bootstrap samples agree.

    `count` images do not prove a rate of exactly 0 or 1.
    """
    low, high = interval
    margin = rule_of_three(count)
    return (min(low, 1 - margin) if value == 1 else low), (max(high, margin) if value == 0 else high)
