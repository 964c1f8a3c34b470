"""Intervals: DeLong for areas under the ROC curve, bootstrap for the rest and for images that share a source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from farout.core.errors import FaroutError

__all__ = [
    "Difference",
    "area_of_ranks",
    "bootstrap",
    "delong",
    "dense_ranks",
    "exact_reach",
    "independent",
    "interval_of_auroc",
    "paired_difference",
]

Metric = Callable[[np.ndarray, np.ndarray], float]
_Z95 = float(stats.norm.ppf(0.975))


def delong(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUROC and its structural components, by midranks in O(n log n) (Sun & Xu 2014, algorithm 2).

    Returns the area, and for every in-distribution (OOD) score the share of the other side that it is told apart from.
    The area's variance is var(components_id) / n_id + var(components_ood) / n_ood (DeLong et al. 1988).
    """
    inside, outside = np.asarray(id_scores, dtype=np.float64), np.asarray(ood_scores, dtype=np.float64)
    ranks = stats.rankdata(np.concatenate([outside, inside]))
    of_ood = (ranks[: len(outside)] - stats.rankdata(outside)) / len(inside)
    of_id = 1 - (ranks[len(outside) :] - stats.rankdata(inside)) / len(outside)
    return float(of_ood.mean()), of_id, of_ood


def _variance(of_id: np.ndarray, of_ood: np.ndarray) -> float:
    parts = [np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.25 for values in (of_id, of_ood)]
    return float(sum(parts))


def interval_of_auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, float, float]:
    """AUROC with its 95 % interval: DeLong's variance, normal on the logit scale so that it stays within (0, 1).

    At an area of 0 or 1 the variance is 0; the interval then reaches as far as the area that would show no error
    among min(n_id, n_ood) independent pairs with probability .05 (the rule of three, exact form).
    """
    area, of_id, of_ood = delong(id_scores, ood_scores)
    variance = _variance(of_id, of_ood)
    if area in (0.0, 1.0):
        reach = exact_reach(min(len(of_id), len(of_ood)))
        return (area, 1 - reach, 1.0) if area == 1 else (area, 0.0, reach)
    half = _Z95 * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    return area, _expit(logit - half), _expit(logit + half)


def exact_reach(count: int) -> float:
    """The rate that shows no case among `count` independent trials with probability .05 (exact rule of three)."""
    return float(1 - 0.05 ** (1 / count))


def independent(groups: tuple[np.ndarray, np.ndarray] | None, *sides: np.ndarray) -> list[int]:
    """Independent images of either side: its scores, or the source images that `groups` names behind them."""
    return [len(side) for side in sides] if groups is None else [len(np.unique(ids)) for ids in groups]


def dense_ranks(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of every score among the different scores of both sides, from 0; of either side."""
    ranks = np.unique(np.r_[id_scores, ood_scores], return_inverse=True)[1]
    return ranks[: len(id_scores)], ranks[len(id_scores) :]


def area_of_ranks(id_ranks: np.ndarray, ood_ranks: np.ndarray) -> float:
    """AUROC of dense ranks by counting: no sort in a draw of a bootstrap. NaN if a draw left one side empty."""
    if not len(id_ranks) or not len(ood_ranks):
        return float("nan")
    counts = np.bincount(id_ranks, minlength=int(ood_ranks.max()) + 1)
    below = np.cumsum(counts) - 0.5 * counts
    return float(below[ood_ranks].mean() / len(id_ranks))


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


@dataclass(frozen=True)
class _Side:
    """Places of one side's scores, ordered by source image; where each image's begin, and how many they are."""

    order: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, count: int) -> _Side:
        sizes = np.bincount(codes, minlength=count)
        return cls(np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes, sizes)

    def places(self, chosen: np.ndarray) -> np.ndarray:
        """All places of the chosen images, repeats included; one gather, for a loop over images takes seconds."""
        sizes = self.sizes[chosen]
        shift = np.repeat(self.starts[chosen] - (np.cumsum(sizes) - sizes), sizes)
        return self.order[np.arange(len(shift)) + shift]


def _draws(
    n_id: int, n_ood: int, groups: tuple[np.ndarray, np.ndarray] | None, draws: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of resampled scores on both sides, one draw at a time."""
    generator = np.random.default_rng(seed)
    if groups is None:
        for _ in range(draws):
            yield generator.integers(0, n_id, n_id), generator.integers(0, n_ood, n_ood)
        return
    names, codes = np.unique(np.concatenate(groups), return_inverse=True)
    inside, outside = (_Side.of(side, len(names)) for side in np.split(codes, [n_id]))
    for _ in range(draws):
        chosen = generator.integers(0, len(names), len(names))
        yield inside.places(chosen), outside.places(chosen)


def bootstrap(
    metric: Metric,
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    *,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a metric; both sides are resampled, by source image where `groups` names them."""
    places = _draws(len(id_scores), len(ood_scores), groups, draws, seed)
    values = [metric(id_scores[a], ood_scores[b]) for a, b in places]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A metric of one detector less that of another, on the same images, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero: only then is one called better."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    *,
    metric: Metric | None = None,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Difference:
    """Difference of two detectors, each given as (id_scores, ood_scores) of the same images in the same order.

    Without `metric` and `groups`: AUROC by DeLong's covariance (DeLong et al. 1988); else by a paired bootstrap, of
    AUROC or of `metric`; `groups` as in `bootstrap`. A difference that has no variance, such as that of a perfect and a
    constant detector, reaches as far as `exact_reach` says of so few images.
    Raises FaroutError for sides of different lengths or scores that are not numbers.
    """
    sides = [tuple(np.asarray(side, dtype=np.float64) for side in pair) for pair in (first, second)]
    if [len(side) for side in sides[0]] != [len(side) for side in sides[1]]:
        raise FaroutError("a paired difference requires scores of the same images, the two detectors have other counts")
    if any(np.isnan(side).any() for pair in sides for side in pair):
        raise FaroutError(
            "a paired difference requires scores that are numbers; leave out images without a score in both"
        )
    if metric is None and groups is None:
        return _delong_difference(sides[0], sides[1])
    of = metric or area_of_ranks
    one, other = sides if metric is not None else [dense_ranks(*pair) for pair in sides]
    places = _draws(len(one[0]), len(one[1]), groups, draws, seed)
    values = [of(one[0][a], one[1][b]) - of(other[0][a], other[1][b]) for a, b in places]
    low, high = np.nanquantile(values, [0.025, 0.975])
    value = of(*one) - of(*other)
    # every draw alike, yet a difference: a few images would decide with certainty
    reach = exact_reach(min(independent(groups, *one))) if low == high and value else 0.0
    return Difference(value, float(low) - reach, float(high) + reach)


def _delong_difference(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> Difference:
    area_a, id_a, ood_a = delong(*first)
    area_b, id_b, ood_b = delong(*second)
    value, variance = area_a - area_b, _variance(id_a - id_b, ood_a - ood_b)
    if variance > 0 or value == 0:
        half = _Z95 * math.sqrt(variance)
        return Difference(value, value - half, value + half)
    # the same without draws
    (_, low_a, high_a), (_, low_b, high_b) = interval_of_auroc(*first), interval_of_auroc(*second)
    down, up = math.hypot(area_a - low_a, high_b - area_b), math.hypot(high_a - area_a, area_b - low_b)
    return Difference(value, value - down, value + up)
