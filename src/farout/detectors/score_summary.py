"""Summary of the scores of a set in bounded memory: what the manifest and the page of a scored folder contain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from farout.core.errors import FaroutError
from farout.detectors.calibration import (
    find_largest_selected,
    flag_outliers,
    sort_calibration,
    warn_about_score_range,
)
from farout.detectors.results import Measurements, Scores
from farout.detectors.score_histogram import ScoreHistogram

__all__ = ["HighestScores", "ScoreSummary"]


@dataclass(frozen=True)
class HighestScores:
    """The images with the highest scores, in descending order; those of equal scores in the order of their keys.

    Attributes:
        scores: one row per image; `scores.measurements` has the same rows, or is None if they are unknown.
        indices: indices of the images in the source.
    """

    scores: Scores
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)


class ScoreSummary:
    """Counts and highest scores of a set of images, from one pass over its parts.

    The memory depends on the number of calibration images and of rows that are kept, not on the number of images,
    except for the reasons of unreadable images. The result does not depend on how the set is divided into parts, nor
    on the order in which they are added or merged.

    Args:
        calibration: scores (n,) of the calibration images.
        alpha: images with a p-value of at most alpha are flagged.
        keep: number of images with the highest scores that are kept.

    Attributes:
        calibration: the calibration scores in ascending order.
        p_value_counts: number of images by the number of calibration scores that are at least as high, int64 (n + 1,).
        histogram: histogram of the scores.
    """

    def __init__(self, calibration: ArrayLike, alpha: float, keep: int = 500) -> None:
        self.calibration, self.alpha, self.keep = sort_calibration(calibration), alpha, keep
        self.p_value_counts = np.zeros(len(self.calibration) + 1, dtype=np.int64)
        self.histogram = ScoreHistogram(self.calibration)
        self._counts: Counter[str] = Counter()
        self._reasons: list[tuple[int, dict[str, str]]] = []
        self._highest: HighestScores | None = None

    def add(
        self,
        scores: Scores,
        start: int,
        measurements: Measurements | None = None,
        reasons: Mapping[str, str] | None = None,
        *,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Add a part of the set.

        Args:
            scores: one row per image of the part.
            start: index of the first of them in the source.
            measurements: the measurements of the part in the same order, without unreadable images; default: those of
                `scores`.
            reasons: why images of the part are unreadable, by key.
            indices: indices of the rows in the source, if they are not consecutive: with the policy `skip`, there are
                no rows for unreadable images.
        """
        positions = np.arange(start, start + len(scores)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._counts.update(scores.status)
        if reasons:
            self._reasons.append((start, dict(reasons)))
        (rows,) = np.nonzero(np.isfinite(scores.score))
        values = scores.score[rows]
        self.histogram.add(values)
        at_least = len(self.calibration) - np.searchsorted(self.calibration, values, side="left")
        self.p_value_counts += np.bincount(at_least, minlength=len(self.p_value_counts))
        if self._highest is not None and len(self._highest) >= self.keep:  # most parts have no row above the lowest
            rows = rows[values >= self._highest.scores.score[-1]] if self.keep else rows[:0]
        if not len(rows):
            return
        measurements = scores.measurements if measurements is None else measurements
        candidates = replace(scores, measurements=None).select(rows)
        if measurements is not None:
            measured = np.cumsum(np.array(scores.status) != "unreadable") - 1
            candidates.measurements = measurements.select(measured[rows].tolist())
        self._keep_highest(HighestScores(candidates, tuple(positions[rows].tolist())))

    def merge(self, other: ScoreSummary) -> None:
        """Add the summary of other images of the same set and detector.

        Raises:
            FaroutError: the other summary has another calibration, alpha or number of rows.
        """
        if (
            not np.array_equal(self.calibration, other.calibration)
            or self.alpha != other.alpha
            or self.keep != other.keep
        ):
            raise FaroutError("summaries of scores can only be merged if calibration, alpha and keep are the same")
        self._counts.update(other._counts)
        self._reasons += other._reasons
        self.p_value_counts += other.p_value_counts
        self.histogram.merge(other.histogram)
        if other._highest is not None:
            self._keep_highest(other._highest)

    def _keep_highest(self, rows: HighestScores) -> None:
        """Add rows to the highest ones, and drop those that are too many."""
        parts = [rows] if self._highest is None else [self._highest, rows]
        has_measurements = all(part.scores.measurements is not None for part in parts)
        scores = Scores.join([part.scores for part in parts])
        indices = [index for part in parts for index in part.indices]
        if not has_measurements:
            scores.measurements = None
        ranks = sorted(zip((-scores.score).tolist(), scores.keys, indices, range(len(indices))))
        order = [row for *_, row in ranks[: self.keep]]
        self._highest = HighestScores(scores.select(order), tuple(indices[row] for row in order))

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by status."""
        return dict(sorted(self._counts.items()))

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons of unreadable images by key, in the order of the source."""
        ordered = sorted(self._reasons, key=lambda part: part[0])
        return {key: reason for _, reasons in ordered for key, reason in reasons.items()}

    @property
    def p_values(self) -> np.ndarray:
        """The possible p-values (n + 1,), ascending: those of the images that `p_value_counts` counts."""
        return (1 + np.arange(len(self.p_value_counts))) / len(self.p_value_counts)

    @property
    def scored(self) -> int:
        """Number of images with a score."""
        return int(self.p_value_counts.sum())

    @property
    def flagged(self) -> int:
        """Number of flagged images."""
        return int(self.p_value_counts[flag_outliers(self.p_values, self.alpha)].sum())

    def benjamini_hochberg(self, q: float) -> float:
        """Largest p-value that `calibration.benjamini_hochberg` selects among all images; 0 if it selects none."""
        return find_largest_selected(self.p_values, self.p_value_counts, q)

    def top(self, count: int) -> HighestScores:
        """The images with the highest scores, at most `keep`."""
        if self._highest is None:
            return HighestScores(Scores.empty(()), ())
        rows = range(min(count, len(self._highest)))
        return HighestScores(self._highest.scores.select(rows), self._highest.indices[: len(rows)])

    def warn(self, name: str) -> None:
        """Warn as `calibration.warn_about_scores`, of the images that could be read."""
        readable = sum(count for status, count in self._counts.items() if status != "unreadable")
        low, high = self.histogram.minimum, self.histogram.maximum
        warn_about_score_range(readable, self.scored, low, high, name, stacklevel=4)
