"""Confidence intervals: DeLong for the area under the ROC curve, bootstrap for other metrics and dependent images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from farout.core.errors import FaroutError

__all__ = [
    "Difference",
    "auroc_interval",
    "auroc_of_ranks",
    "bootstrap_interval",
    "count_independent",
    "delong",
    "dense_ranks",
    "paired_difference",
    "rule_of_three",
]

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(in-distribution scores, out-of-distribution scores) -> value."""
_Z95 = float(stats.norm.ppf(0.975))


def delong(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUROC and its structural components, by midranks in O(n log n) (Sun and Xu 2014, algorithm 2).

    Returns:
        The area; for every in-distribution score the share of OOD scores above it, and for every OOD score the share
        of in-distribution scores below it (ties count half). The variance of the area is
        var(components_id) / n_id + var(components_ood) / n_ood (DeLong et al. 1988).
    """
    id_scores, ood_scores = np.asarray(id_scores, dtype=np.float64), np.asarray(ood_scores, dtype=np.float64)
    ranks = stats.rankdata(np.concatenate([ood_scores, id_scores]))
    components_ood = (ranks[: len(ood_scores)] - stats.rankdata(ood_scores)) / len(id_scores)
    components_id = 1 - (ranks[len(ood_scores) :] - stats.rankdata(id_scores)) / len(ood_scores)
    return float(components_ood.mean()), components_id, components_ood


def _delong_variance(components_id: np.ndarray, components_ood: np.ndarray) -> float:
    """Variance of the area; one image alone contributes the largest possible variance, 1/4."""
    parts = (components_id, components_ood)
    return float(sum(np.var(part, ddof=1) / len(part) if len(part) > 1 else 0.25 for part in parts))


def auroc_interval(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, float, float]:
    """AUROC with the ends of its 95 % interval: DeLong's variance, normal on the logit scale, hence within (0, 1).

    At an area of 0 or 1 the variance is 0; the interval is then that of the rule of three for min(n_id, n_ood)
    independent pairs.
    """
    area, components_id, components_ood = delong(id_scores, ood_scores)
    if area in (0.0, 1.0):
        margin = rule_of_three(min(len(components_id), len(components_ood)))
        return (area, 1 - margin, 1.0) if area == 1 else (area, 0.0, margin)
    # the derivative of the logit at the area is 1 / (area (1 - area))
    half = _Z95 * math.sqrt(_delong_variance(components_id, components_ood)) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return area, float(special.expit(logit - half)), float(special.expit(logit + half))


def rule_of_three(count: int) -> float:
    """The rate at which `count` independent trials show no case with probability 5 % (exact form, about 3 / count)."""
    return float(1 - 0.05 ** (1 / count))


def count_independent(image_ids: tuple[np.ndarray, np.ndarray] | None, *samples: np.ndarray) -> list[int]:
    """Number of independent images in each sample: its scores, or the original images behind them in `image_ids`."""
    return [len(sample) for sample in samples] if image_ids is None else [len(np.unique(ids)) for ids in image_ids]


def dense_ranks(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank of every score among the distinct scores of both samples, from 0."""
    ranks = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)[1]
    return ranks[: len(id_scores)], ranks[len(id_scores) :]


def auroc_of_ranks(id_ranks: np.ndarray, ood_ranks: np.ndarray) -> float:
    """AUROC of dense ranks by counting, without sorting in every bootstrap sample; NaN if a sample is empty."""
    if not len(id_ranks) or not len(ood_ranks):
        return float("nan")
    counts = np.bincount(id_ranks, minlength=int(ood_ranks.max()) + 1)
    below = np.cumsum(counts) - 0.5 * counts
    return float(below[ood_ranks].mean() / len(id_ranks))


class _GroupedIndices:
    """Indices of a sample's scores by the original image, to resample images with all their scores."""

    def __init__(self, image_of_score: np.ndarray, image_count: int) -> None:
        self.sizes = np.bincount(image_of_score, minlength=image_count)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.order = np.argsort(image_of_score, kind="stable")

    def indices_of(self, images: np.ndarray) -> np.ndarray:
        """Indices of the scores of the given images, repetitions included, without a loop over images."""
        sizes = self.sizes[images]
        offsets = np.repeat(self.starts[images] - (np.cumsum(sizes) - sizes), sizes)
        return self.order[np.arange(len(offsets)) + offsets]


def _bootstrap_indices(
    n_id: int, n_ood: int, image_ids: tuple[np.ndarray, np.ndarray] | None, draws: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of resampled in-distribution and OOD scores, one bootstrap sample at a time."""
    generator = np.random.default_rng(seed)
    if image_ids is None:
        for _ in range(draws):
            yield generator.integers(0, n_id, n_id), generator.integers(0, n_ood, n_ood)
        return
    images, image_of_score = np.unique(np.concatenate(image_ids), return_inverse=True)
    id_scores, ood_scores = (_GroupedIndices(part, len(images)) for part in np.split(image_of_score, [n_id]))
    for _ in range(draws):
        resampled = generator.integers(0, len(images), len(images))
        yield id_scores.indices_of(resampled), ood_scores.indices_of(resampled)


def bootstrap_interval(
    metric: Metric,
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    *,
    image_ids: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a metric.

    Args:
        metric: function of in-distribution and OOD scores.
        id_scores: (N,).
        ood_scores: (M,).
        image_ids: ids of the original image behind every score of both samples; resample these instead of scores.
        draws: number of bootstrap samples.
        seed: seed of the resampling.
    """
    resampled = _bootstrap_indices(len(id_scores), len(ood_scores), image_ids, draws, seed)
    values = [metric(id_scores[id_rows], ood_scores[ood_rows]) for id_rows, ood_rows in resampled]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A metric of one detector minus that of another on the same images, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero; only then is one detector called better."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    *,
    metric: Metric | None = None,
    image_ids: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Difference:
    """Difference of two detectors, each given as (id_scores, ood_scores) of the same images in the same order.

    Without `metric` and `image_ids`: AUROC with DeLong's covariance (DeLong et al. 1988); otherwise a paired bootstrap.
    A difference without variance, such as that of a perfect and a constant detector, is widened by `rule_of_three`.

    Args:
        first: scores of the first detector.
        second: scores of the second detector.
        metric: function of in-distribution and OOD scores; None: AUROC.
        image_ids: as in `bootstrap_interval`.
        draws: number of bootstrap samples.
        seed: seed of the resampling.

    Raises:
        FaroutError: samples of different lengths, or NaN scores.
    """
    detectors = [tuple(np.asarray(scores, dtype=np.float64) for scores in pair) for pair in (first, second)]
    if [len(scores) for scores in detectors[0]] != [len(scores) for scores in detectors[1]]:
        raise FaroutError(
            "a paired difference requires scores of the same images, but the detectors have different numbers of scores"
        )
    if any(np.isnan(scores).any() for pair in detectors for scores in pair):
        raise FaroutError("a paired difference requires scores that are numbers; leave out images without both scores")
    (id_first, ood_first), (id_second, ood_second) = detectors
    if metric is None and image_ids is None:
        return _delong_difference(id_first, ood_first, id_second, ood_second)
    if metric is None:
        metric = auroc_of_ranks
        (id_first, ood_first), (id_second, ood_second) = dense_ranks(*detectors[0]), dense_ranks(*detectors[1])
    values = [
        metric(id_first[id_rows], ood_first[ood_rows]) - metric(id_second[id_rows], ood_second[ood_rows])
        for id_rows, ood_rows in _bootstrap_indices(len(id_first), len(ood_first), image_ids, draws, seed)
    ]
    low, high = np.nanquantile(values, [0.025, 0.975])
    value = metric(id_first, ood_first) - metric(id_second, ood_second)
    # all bootstrap samples agree on a difference: a few images would decide with certainty
    margin = rule_of_three(min(count_independent(image_ids, id_first, ood_first))) if low == high and value else 0.0
    return Difference(value, float(low) - margin, float(high) + margin)


def _delong_difference(
    id_first: np.ndarray, ood_first: np.ndarray, id_second: np.ndarray, ood_second: np.ndarray
) -> Difference:
    first, first_id, first_ood = delong(id_first, ood_first)
    second, second_id, second_ood = delong(id_second, ood_second)
    value, variance = first - second, _delong_variance(first_id - second_id, first_ood - second_ood)
    if variance > 0 or value == 0:
        half = _Z95 * math.sqrt(variance)
        return Difference(value, value - half, value + half)
    # no variance, yet a difference: combine the intervals of both areas, which the rule of three widens
    _, first_low, first_high = auroc_interval(id_first, ood_first)
    _, second_low, second_high = auroc_interval(id_second, ood_second)
    below = math.hypot(first - first_low, second_high - second)
    above = math.hypot(first_high - first, second - second_low)
    return Difference(value, value - below, value + above)
