"""Summary of a scored folder, from the parts as they are scored or from the finished tables, in bounded memory."""

from __future__ import annotations

from farout.detectors.score_summary import HighestScores, ScoreSummary

__all__ = ["HighestScores", "ScoreSummary"]
