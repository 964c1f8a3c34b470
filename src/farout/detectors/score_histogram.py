"""Histogram of scores that needs one pass: its intervals are known from the calibration before any image is scored."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["ScoreHistogram"]

_LINEAR_BINS = 1024
"""Intervals per length of the calibration range: a bar of a chart covers twenty and more of them."""
_GROWTH = 1 + 1 / 256
"""Ratio of the distances of two neighboring edges from the calibration range, far outside of it."""
_RANGE = 1e9
"""The intervals end at this many lengths of the calibration range; scores beyond are counted together."""


class ScoreHistogram:
    """Counts of scores in intervals that depend on the calibration only, with the exact lowest and highest score.

    Histograms of parts of a set add up to that of the set, however it is divided. The intervals have equal widths
    around the calibration scores; farther away their widths grow with the distance, because a chart that contains such
    scores has wide bars.

    Args:
        calibration: scores (n,) of the calibration images, n >= 1, all finite.

    Attributes:
        counts: number of scores by interval, int64; the first and the last have no outer limit.
        minimum, maximum: lowest and highest score; infinite if there is none.
    """

    def __init__(self, calibration: ArrayLike) -> None:
        self._edges = _build_edges(np.asarray(calibration, dtype=np.float64))
        self.counts = np.zeros(len(self._edges) + 1, dtype=np.int64)
        self.minimum, self.maximum = np.inf, -np.inf

    def __len__(self) -> int:
        return int(self.counts.sum())

    def add(self, scores: ArrayLike) -> None:
        """Count scores; those that are not finite are left out."""
        values = np.asarray(scores, dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            bins = np.searchsorted(self._edges, values, side="right")
            self.counts += np.bincount(bins, minlength=len(self.counts))
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))

    def merge(self, other: ScoreHistogram) -> None:
        """Add the counts of a histogram with the same calibration."""
        self.counts += other.counts
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """One score per interval that is not empty, ascending, and its count.

        The scores are the centers of the intervals; the first is the lowest, and the last the highest score.
        """
        centers = np.concatenate([self._edges[:1], self._edges[:-1] / 2 + self._edges[1:] / 2, self._edges[-1:]])
        (occupied,) = np.nonzero(self.counts)
        values = centers[occupied]
        if len(values):
            values[0], values[-1] = self.minimum, self.maximum
        return values, self.counts[occupied]


def _build_edges(calibration: np.ndarray) -> np.ndarray:
    """Edges of the intervals, ascending."""
    low = calibration.min()
    # The axis of a chart of scores contains the lowest calibration score and this quantile. The highest one may be so
    # far away that all others would be in one interval.
    length = np.quantile(calibration, 0.995) - low or calibration.max() - low or abs(low) * 1e-6 or 1e-6
    linear = np.arange(1, 2 * _LINEAR_BINS + 1) / _LINEAR_BINS
    geometric = np.exp(np.arange(1, int(np.log(_RANGE) / np.log(_GROWTH))) * np.log(_GROWTH))
    above = np.concatenate([linear, linear[-1] * geometric])
    below = np.concatenate([linear[:_LINEAR_BINS], geometric])
    with np.errstate(over="ignore"):
        edges = low + length * np.concatenate([-below[::-1], [0.0], above])
    return np.unique(edges[np.isfinite(edges)])
