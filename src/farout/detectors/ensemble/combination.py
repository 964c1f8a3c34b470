"""How the scores of several detectors are combined into one: standardization, tail probabilities, learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from farout.features.densities import FittedStatistics

__all__ = ["Standardization", "TailProbabilities", "learn_weights"]

_SMALLEST = 1e-12
_TAIL_QUANTILE = 0.9


@dataclass(frozen=True)
class Standardization(FittedStatistics):
    """z = (t(s) - median) / (1.4826 median |t(s) - median|) per column, at least the lowest z of the fit.

    t is the logarithm for a column of positive scores, whose errors are factors, and else the identity. Median and
    absolute deviation do not depend on a few unusual images. An image that one detector finds more normal than every
    image of the fit must not make up for what another one finds, hence the lowest value.
    """

    uses_log: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    lowest: np.ndarray

    @classmethod
    def fit(cls, scores: np.ndarray) -> Self:
        """From scores (n, d), one column per detector."""
        uses_log = np.asarray((scores > 0).all(0))
        values = _transform(scores, uses_log)
        center = np.median(values, axis=0)
        deviation = 1.4826 * np.median(np.abs(values - center), axis=0)
        # more than half of the values are equal: the standard deviation; all are equal: the resolution of float32
        floor = np.maximum(_SMALLEST, np.finfo(np.float32).eps * np.abs(values).max(0))
        scale = np.where(deviation > floor, deviation, np.maximum(values.std(0), floor))
        return cls(uses_log, center, scale, ((values - center) / scale).min(0))

    def transform(self, scores: np.ndarray) -> np.ndarray:
        """z of scores (n, d); NaN where a score is NaN."""
        return np.maximum((_transform(scores, self.uses_log) - self.center) / self.scale, self.lowest)


def _transform(scores: np.ndarray, uses_log: np.ndarray) -> np.ndarray:
    return np.where(uses_log, np.log(np.maximum(scores, _SMALLEST)), scores)


@dataclass(frozen=True)
class TailProbabilities(FittedStatistics):
    """log P(Z >= z) per column, for normal images.

    Up to the 90 % quantile u of the fit, the log of the share (1 + #{z_i > z}) / (n + 1), interpolated; from there on
    log P(Z >= u) - (z - u) / mean excess over u: an exponential tail, which is a generalized Pareto distribution of
    shape 0. A share alone would be equal for all images beyond the fit, which then could not be ranked.
    """

    z: np.ndarray  # sorted
    threshold: np.ndarray
    mean_excess: np.ndarray

    @classmethod
    def fit(cls, z: np.ndarray) -> Self:
        """From z scores (n, d) of normal images."""
        ascending = np.sort(z, axis=0)
        threshold = np.quantile(ascending, _TAIL_QUANTILE, axis=0)
        excess = np.maximum(ascending - threshold, 0)
        count = np.maximum((excess > 0).sum(0), 1)
        # fewer than 5 values above the threshold: the mean excess of a normal distribution over its 90 % quantile
        mean_excess = np.where(count >= 5, excess.sum(0) / count, 0.47)
        return cls(ascending, threshold, np.maximum(mean_excess, 1e-3))

    def log_p(self, z: np.ndarray) -> np.ndarray:
        """Log probabilities (n, d) of z scores (n, d)."""
        n = len(self.z)
        log_shares = np.log((n - np.arange(n)) / (n + 1))  # of the sorted values
        columns = []
        for column, ascending in enumerate(self.z.T):
            threshold = self.threshold[column]
            inner = np.interp(np.minimum(z[:, column], threshold), ascending, log_shares)
            columns.append(inner - np.maximum(z[:, column] - threshold, 0) / self.mean_excess[column])
        return np.stack(columns, axis=1)


def learn_weights(normal: np.ndarray, changed: np.ndarray, prior: float) -> np.ndarray:
    """Weights (d,) of z scores, at least 0 and of sum 1, that distinguish changed from normal images.

    Logistic regression on sum_i w_i z_i + b, both sets with equal influence, w_i >= 0, with the penalty
    prior / 2 * d * sum_i (w_i - 1 / d)^2: the weights stay near equal ones unless the images clearly say otherwise.

    Args:
        normal: z scores (n, d) of normal images.
        changed: z scores (m, d) of changed images.
        prior: strength of the penalty.
    """
    from scipy.optimize import minimize  # takes a second of every command that imports it

    d = normal.shape[1]
    z = np.concatenate([normal, changed])
    sign = np.concatenate([np.full(len(normal), -1.0), np.full(len(changed), 1.0)])
    share = np.concatenate([np.full(len(normal), 0.5 / len(normal)), np.full(len(changed), 0.5 / len(changed))])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, offset = parameters[:d], parameters[d]
        margin = sign * (z @ weights + offset)
        slope = -share * sign * np.exp(-np.logaddexp(0, margin))
        deviation = weights - 1 / d
        value = (share * np.logaddexp(0, -margin)).sum() + prior / 2 * d * (deviation**2).sum()
        return float(value), np.append(slope @ z + prior * d * deviation, slope.sum())

    start = np.append(np.full(d, 1 / d), 0.0)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * d + [(None, None)])
    weights: np.ndarray = found.x[:d]
    return weights / weights.sum() if weights.sum() > 0 else np.full(d, 1 / d)
