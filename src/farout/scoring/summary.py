"""Summary of a scored folder, from the parts as they are scored or from the finished table, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from farout.core.csv_files import read_csv_in_chunks
from farout.core.errors import StoreError
from farout.detectors.base import Scores
from farout.detectors.score_summary import HighestScores, ScoreSummary

__all__ = ["HighestScores", "ScoreSummary", "add_table"]

_ROWS = 65_536
"""Rows in memory at a time."""


def add_table(summary: ScoreSummary, file: Path, keys: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Add a finished `scores.csv` to an empty summary, which is then that of the parts, but for their measurements.

    Args:
        summary: a summary of the detector that computed the scores.
        file: the table; its rows are in the order of the source, and may be missing for unreadable images.
        keys: keys of the source.
        reasons: why images are unreadable, by key.

    Raises:
        StoreError: the table has a row that is not in the source.
    """
    remaining, start = enumerate(keys), 0
    for chunk in read_csv_in_chunks(file, _ROWS):
        scores = Scores.from_frame(chunk)
        indices = [next((index for index, key in remaining if key == row), -1) for row in scores.keys]
        if -1 in indices:
            raise StoreError(f"{file} has a row {scores.keys[indices.index(-1)]} that is not in the source")
        summary.add(scores, start, indices=indices)
        start += len(scores)
    summary.add(Scores.empty(()), 0, reasons=reasons)
