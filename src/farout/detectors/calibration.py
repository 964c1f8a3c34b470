"""From scores to p-values and flags, by comparison with normal images that nothing was fitted on."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from farout.core.errors import ConstantScoresWarning, FaroutError, NaNScoresWarning
from farout.detectors.interface import DetectorInterface
from farout.detectors.results import Measurements

__all__ = [
    "benjamini_hochberg",
    "check_alpha",
    "check_fitted",
    "check_seed",
    "compute_p_values",
    "find_largest_selected",
    "flag_outliers",
    "score_threshold",
    "set_calibration",
    "sort_calibration",
    "warn_about_score_range",
    "warn_about_scores",
]

_ROUNDING = 1 + 1e-12
"""A p-value k / (n + 1) that equals alpha on paper may differ from it in the last bit."""


def set_calibration(detector: DetectorInterface, measurements: Measurements) -> None:
    """Use these measurements for the p-values; raises FaroutError where one of their scores is not a number."""
    scores = {name: value.double().numpy() for name, value in detector.compute_scores(measurements).items()}
    invalid = sorted(name for name, value in scores.items() if not np.isfinite(value).all())
    if invalid:
        raise FaroutError(f"calibration scores are not numbers for {', '.join(invalid)}; look for damaged images")
    detector.calibration = measurements
    detector.calibration_scores = {name: np.sort(value) for name, value in scores.items()}


def check_fitted(detector: DetectorInterface) -> None:
    """Raise FaroutError unless the detector has been fitted."""
    if not detector.is_fitted:
        raise FaroutError(
            f"this {type(detector).__name__} has not been fitted; call fit(images) or farout.load(folder)"
        )


def check_alpha(alpha: float) -> None:
    """Raise FaroutError unless alpha is between 0 and 1."""
    if not 0 < alpha < 1:
        raise FaroutError(f"alpha is a false-alarm rate between 0 and 1, got {alpha}")


def check_seed(seed: int) -> None:
    """Raise FaroutError unless the seed is an integer from 0 to 2^63 - 1, which every random generator accepts."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise FaroutError(f"seed is {seed!r}; expected an integer from 0 to 2^63 - 1")


def compute_p_values(scores: ArrayLike, calibration: ArrayLike) -> np.ndarray:
    """p = (1 + #{calibration >= s}) / (n + 1), float64, shape of `scores` (Vovk et al. 2005; Bates et al. 2023, eq. 2).

    Valid for any score: a normal image has p <= alpha with probability at most alpha. A score that is not a number has
    no p-value. Raises FaroutError when the calibration is empty or contains NaN.
    """
    scores, ascending = np.asarray(scores, dtype=np.float64), sort_calibration(calibration)
    at_least = len(ascending) - np.searchsorted(ascending, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(ascending) + 1))


def sort_calibration(calibration: ArrayLike) -> np.ndarray:
    """Return the scores in ascending order, float64 (n,); raises FaroutError if there are none, or for NaN."""
    values = np.asarray(calibration, dtype=np.float64).ravel()
    if not len(values) or np.isnan(values).any():
        invalid = int(np.isnan(values).sum())
        raise FaroutError(f"calibration requires scores that are numbers, got {len(values)} of which {invalid} are not")
    return np.sort(values)


def flag_outliers(p_values: ArrayLike, alpha: float) -> np.ndarray:
    """p <= alpha, bool; an image without p-value is not flagged (its status says why)."""
    return np.asarray(p_values, dtype=np.float64) <= alpha * _ROUNDING


def score_threshold(calibration: ArrayLike, alpha: float) -> float:
    """The threshold of the flag: an image is flagged exactly when its score is greater.

    Infinite where there are too few calibration images (n < 1 / alpha - 1) to flag anything.
    """
    ascending = sort_calibration(calibration)
    # p <= alpha allows this many calibration scores >= s
    allowed = math.floor(alpha * _ROUNDING * (len(ascending) + 1)) - 1
    if allowed < 0:
        return math.inf
    return float(ascending[-1 - allowed]) if allowed < len(ascending) else -math.inf


def benjamini_hochberg(p_values: ArrayLike, q: float) -> np.ndarray:
    """Select images at false discovery rate q (Benjamini & Hochberg 1995), bool.

    Images without p-value are not among the tests and never selected.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    selected, has_p_value = np.zeros(p_values.shape, dtype=bool), ~np.isnan(p_values)
    if has_p_value.any():
        from scipy import stats  # takes a second to import

        adjusted = stats.false_discovery_control(p_values[has_p_value], method="bh")
        selected[has_p_value] = adjusted <= q * _ROUNDING
    return selected


def find_largest_selected(p_values: np.ndarray, counts: np.ndarray, q: float) -> float:
    """Largest p-value that `benjamini_hochberg` selects; 0 if it selects none.

    Args:
        p_values: the different p-values (k,), ascending.
        counts: number of images (k,) by p-value.
        q: the false discovery rate.
    """
    p_values, counts = p_values[counts > 0], counts[counts > 0]
    if not len(p_values):
        return 0.0
    # of equal p-values, the last one has the smallest adjusted value
    adjusted = np.minimum(p_values * (counts.sum() / np.cumsum(counts)), 1)
    selected = p_values[adjusted <= q * _ROUNDING]
    return float(selected[-1]) if len(selected) else 0.0


def warn_about_scores(scores: Any, name: str) -> None:
    """Warn of scores that are not numbers, and of scores that are all equal."""
    scores = np.asarray(scores, dtype=np.float64)
    finite = scores[np.isfinite(scores)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)
    warn_about_score_range(scores.size, finite.size, low, high, name, stacklevel=4)


def warn_about_score_range(count: int, finite: int, low: float, high: float, name: str, *, stacklevel: int = 3) -> None:
    """Warn as `warn_about_scores`, of this number of scores and of finite ones, and their lowest and highest value."""
    if finite < count:
        message = f"{name}: {count - finite} of {count} scores are not numbers; they are left out of every metric"
        warnings.warn(message, NaNScoresWarning, stacklevel=stacklevel)
    if finite > 1 and low == high:
        message = f"{name}: all {finite} scores are {low:g}; they distinguish nothing"
        warnings.warn(message, ConstantScoresWarning, stacklevel=stacklevel)
