"""Summary of a scored folder, from the parts as they are scored or from the finished table, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from farout.core.csv_files import read_csv_in_chunks
from farout.core.errors import StoreError
from farout.detectors.base import Detector, Scores
from farout.detectors.score_summary import HighestScores, ScoreSummary

__all__ = ["HighestScores", "ScoreSummary", "summarize_table"]

_ROWS = 65_536
"""Rows in memory at a time."""


def summarize_table(
    file: Path, detector: Detector, keys: Sequence[str], reasons: Mapping[str, str], keep: int = 500
) -> ScoreSummary:
    """Return the summary of a finished `scores.csv`: the same as that of the parts, without measurements.

    Args:
        file: the table; its rows are in the order of the source, and may be missing for unreadable images.
        detector: the detector that computed the scores.
        keys: keys of the source.
        reasons: why images are unreadable, by key.
        keep: number of images with the highest scores that are kept.

    Raises:
        StoreError: the table has a row that is not in the source.
    """
    summary = ScoreSummary(detector.calibration_scores[detector.score_name], detector.alpha, keep)
    remaining, start = enumerate(keys), 0
    for chunk in read_csv_in_chunks(file, _ROWS):
        scores = Scores.from_frame(chunk)
        indices = [next((index for index, key in remaining if key == row), -1) for row in scores.keys]
        if -1 in indices:
            raise StoreError(f"{file} has a row {scores.keys[indices.index(-1)]} that is not in the source")
        summary.add(scores, start, reasons=reasons if start == 0 else None, indices=indices)
        start += len(scores)
    return summary
