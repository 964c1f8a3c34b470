"""From scores to p-values, flags and discoveries, by comparison with good images that nothing was fitted on."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from scipy import stats

from farout.core.errors import ConstantScoresWarning, FaroutError, NaNScoresWarning
from farout.detectors.interface import DetectorInterface
from farout.detectors.results import Measurements

__all__ = ["benjamini_hochberg", "calibrate", "check_alpha", "check_scores", "is_out", "p_values", "threshold"]


def calibrate(detector: DetectorInterface, measurements: Measurements) -> None:
    """Uses these measurements for the p-values; raises FaroutError where a score of them is not a number."""
    scores = {name: value.double().numpy() for name, value in detector.compute_scores(measurements).items()}
    bad = sorted(name for name, value in scores.items() if not np.isfinite(value).all())
    if bad:
        raise FaroutError(f"calibration scores are not numbers for {', '.join(bad)}; look for damaged images")
    detector.calibration = measurements
    detector.calibration_rows = scores
    detector.calibration_scores = {name: np.sort(value) for name, value in scores.items()}


def check_alpha(alpha: float) -> None:
    """Raises FaroutError unless alpha is between 0 and 1."""
    if not 0 < alpha < 1:
        raise FaroutError(f"alpha is a false-alarm rate between 0 and 1, got {alpha}")


def p_values(scores: Any, calibration: Any) -> np.ndarray:
    """(1 + #{calibration >= s}) / (n + 1), float64, shape of `scores` (Vovk et al. 2005; Bates et al. 2023, eq. 2).

    Valid for any score: a good image has p <= alpha with probability at most alpha. A score that is not a number has
    no p-value. Raises FaroutError when the calibration is empty or not all numbers.
    """
    scores, sorted_ = np.asarray(scores, dtype=np.float64), _sorted(calibration)
    above = len(sorted_) - np.searchsorted(sorted_, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + above) / (len(sorted_) + 1))


def _sorted(calibration: Any) -> np.ndarray:
    values = np.asarray(calibration, dtype=np.float64).ravel()
    if not len(values) or np.isnan(values).any():
        bad = int(np.isnan(values).sum())
        raise FaroutError(f"calibration requires scores that are numbers, got {len(values)} of which {bad} are not")
    return np.sort(values)


def is_out(p: Any, alpha: float) -> np.ndarray:
    """p <= alpha, bool; an image without p-value is not flagged (its status says why)."""
    # a p-value k / (n + 1) that equals alpha on paper may differ from it in the last bit
    return np.asarray(p, dtype=np.float64) <= alpha * (1 + 1e-12)


def threshold(calibration: Any, alpha: float) -> float:
    """The score that flagged images lie above: s is flagged exactly when s > threshold; infinite where there are too
    few calibration images (n < 1 / alpha - 1) to flag anything.
    """
    sorted_ = _sorted(calibration)
    allowed = math.floor(alpha * (1 + 1e-12) * (len(sorted_) + 1)) - 1  # calibration images that may lie as far out
    if allowed < 0:
        return math.inf
    return float(sorted_[-1 - allowed]) if allowed < len(sorted_) else -math.inf


def benjamini_hochberg(p: Any, q: float) -> np.ndarray:
    """Which images are selected at false discovery rate q (Benjamini & Hochberg 1995), bool; images without p-value
    are not among the tests and never selected.
    """
    p = np.asarray(p, dtype=np.float64)
    chosen, known = np.zeros(p.shape, dtype=bool), ~np.isnan(p)
    if known.any():
        chosen[known] = stats.false_discovery_control(p[known], method="bh") <= q * (1 + 1e-12)
    return chosen


def check_scores(scores: Any, name: str) -> None:
    """Warns of scores that are not numbers, and of scores that are all equal."""
    scores = np.asarray(scores, dtype=np.float64)
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        message = f"{name}: {bad} of {scores.size} scores are not numbers; they are left out of every metric"
        warnings.warn(message, NaNScoresWarning, stacklevel=3)
    good = scores[np.isfinite(scores)]
    if good.size > 1 and good.min() == good.max():
        message = f"{name}: all {good.size} scores are {good[0]:g}; they distinguish nothing"
        warnings.warn(message, ConstantScoresWarning, stacklevel=3)
