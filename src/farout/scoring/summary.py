"""Summary of a scored folder, from the parts as they are scored or from the finished table, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farout.core.csv_files import read_csv_in_chunks
from farout.core.errors import MisleadingResultWarning, StoreError
from farout.data.image_source import ImageSource
from farout.detectors.base import Scores
from farout.detectors.score_summary import HighestScores, ScoreSummary

__all__ = ["HighestScores", "ScoreSummary", "ScoredParts", "add_table"]

_ROWS = 65_536
"""Rows in memory at a time."""


class ScoredParts:
    """The parts of a source together: their summary, and what the manifest says about them, for both engines.

    Args:
        source: the source.
        summary: an empty summary.
    """

    def __init__(self, source: ImageSource, summary: ScoreSummary) -> None:
        self._source, self._summary = source, summary
        self._contents: list[str] = []
        self._environments: list[dict[str, Any]] = []

    def add(
        self, part: range, scores: Scores, unreadable: Mapping[str, str], content: str, environment: dict[str, Any]
    ) -> None:
        """Add the next part: its indices, scores, reasons of unreadable images, content hash, and environment."""
        keys, indices = self._source.keys, None
        if self._source.policy == "skip":  # without rows for unreadable images
            indices = [index for index in part if keys[index] not in unreadable]
        self._summary.add(scores, part.start, reasons=unreadable, indices=indices)
        self._contents.append(content)
        if environment not in self._environments:
            self._environments.append(environment)

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest. Warns of scores that say nothing, and of several environments."""
        self._summary.warn(self._source.name)
        if len(self._environments) > 1:
            message = "parts were scored with other library versions or processors; scores differ by rounding"
            text = f"{self._source.name}: {message} (manifest.json lists them)"
            warnings.warn(text, MisleadingResultWarning, stacklevel=3)
        return {
            "contents": self._contents,
            "counts": self._summary.counts,
            "flagged": self._summary.flagged,
            "unreadable": self._summary.unreadable,
            "left_out": self._source.left_out,
            "further_frames": sum(self._source.further_frames.values()),
            "environments": self._environments,
        }


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
