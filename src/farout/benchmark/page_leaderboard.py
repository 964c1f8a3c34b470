"""The leaderboard of a benchmark's page: every detector and indicator by group and by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from farout.benchmark.metrics import split_markers
from farout.benchmark.results_folder import BenchmarkResults, SourcePair, markers_of_row
from farout.evaluation.scored_datasets import METHOD_SCORE

__all__ = [
    "METRIC_TITLES",
    "LeaderboardColumn",
    "LeaderboardRow",
    "explain_markers",
    "list_columns",
    "list_rows",
]

METRIC_TITLES = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
"""Metrics of the leaderboard with their titles."""
_DIGITS = 6
"""The page shows three digits; rounding to four first would give other figures than the tables."""

Cells: TypeAlias = list[tuple[float, str] | None]
"""Per metric the value and its interval or deviation; None if unknown."""


@dataclass(frozen=True)
class LeaderboardColumn:
    """The mean over a group of sets, or one pair of sources; `markers` apply to the whole column."""

    title: str
    note: str
    markers: tuple[str, ...] = ()
    group: str | None = None
    pair: SourcePair | None = None


@dataclass(frozen=True)
class LeaderboardRow:
    """A detector by one of its indicators, with its cells per column; `cell_markers` apply to single cells."""

    detector: str
    indicator: str
    markers: tuple[str, ...]
    is_baseline: bool
    cells: list[Cells]
    cell_markers: list[tuple[str, ...]]

    @property
    def is_own_score(self) -> bool:
        """Whether this is the method's own score."""
        return self.indicator == METHOD_SCORE


def list_columns(results: BenchmarkResults) -> list[LeaderboardColumn]:
    """The groups, then the sets."""
    columns = []
    for group, part in results.groups.groupby("ood_group", sort=False):
        counts = {
            name: int(part[name].max()) for name in ("sets", "untested") if name in part and part[name].notna().any()
        }
        notes = []
        if counts.get("sets"):
            notes.append(f"of {counts['sets']} set{'s' * (counts['sets'] != 1)}")
        if counts.get("untested"):
            notes.append(f"{counts['untested']} untested")
        note = ", ".join(notes) or "of the group's sets"
        columns.append(LeaderboardColumn(f"{str(group) or 'other'} (mean)", note, group=str(group)))
    for pair in results.pairs:
        rows = results.metrics[(results.metrics["id"] == pair.id) & (results.metrics["ood"] == pair.ood)]
        first = rows.iloc[0]
        note = ", ".join(part for part in (first.get("ood_group", ""), "dev" * (first.get("role") == "dev")) if part)
        columns.append(LeaderboardColumn(pair.title, note, results.markers_of_pair(pair), pair=pair))
    return columns


def list_rows(results: BenchmarkResults, columns: Sequence[LeaderboardColumn]) -> list[LeaderboardRow]:
    """A row per detector and indicator: own scores first, then by the AUROC of the first column, highest first."""
    by_set, by_group = _summarize(results.metrics, ["id", "ood"]), _summarize(results.groups, ["ood_group"])
    markers: dict[Any, dict[str, None]] = {}
    table = results.metrics
    keys = zip(table["detector"], table["indicator"], table["id"], table["ood"])
    for key, marker in zip(keys, table["marker"]):
        markers.setdefault(key, {}).update(dict.fromkeys(markers_of_row(marker)))

    rows = []
    unknown: Cells = [None] * len(METRIC_TITLES)
    for detector, indicator in dict.fromkeys(zip(table["detector"], table["indicator"])):
        cells: list[Cells] = []
        cell_markers: list[tuple[str, ...]] = []
        for column in columns:
            if column.pair is None:
                cells.append(by_group.get((detector, indicator, column.group), unknown))
                cell_markers.append(())
            else:
                key = (detector, indicator, column.pair.id, column.pair.ood)
                cells.append(by_set.get(key, unknown))
                cell_markers.append(tuple(markers.get(key, ())))
        detector_markers, is_baseline = results.markers_of_detector(detector), results.is_baseline(detector)
        rows.append(LeaderboardRow(detector, indicator, detector_markers, is_baseline, cells, cell_markers))

    def order(row: LeaderboardRow) -> tuple[Any, ...]:
        first = row.cells[0][0]
        return not row.is_own_score, row.indicator, -first[0] if first is not None else 1.0, row.detector

    return sorted(rows, key=order)


def _summarize(table: pd.DataFrame, columns: list[str]) -> dict[Any, Cells]:
    """Every metric by detector, indicator and `columns`: mean over seeds with its deviation, or one seed's interval."""
    summary: dict[Any, Cells] = {}
    for key, part in table.groupby(["detector", "indicator", *columns], sort=False):
        summary[key] = [_summarize_metric(part, metric) for metric in METRIC_TITLES]
    return summary


def _summarize_metric(part: pd.DataFrame, metric: str) -> tuple[float, str] | None:
    values = part[metric].dropna().to_numpy(dtype=float) if metric in part else np.zeros(0)
    if not len(values):
        return None
    low, high, deviation = (
        float(part[name].iloc[0]) if name in part else np.nan
        for name in (f"{metric}_low", f"{metric}_high", f"{metric}_std")
    )
    if len(values) > 1:
        text = f"± {values.std(ddof=1):.3f}"
    elif np.isfinite(deviation):
        text = f"± {deviation:.3f}"
    else:
        text = "–".join(f"{bound:.3f}" for bound in (low, high) if np.isfinite(bound))
    return round(float(values.mean()), _DIGITS), text


def explain_markers(results: BenchmarkResults) -> dict[str, str]:
    """The meaning of every marker in the table, from the provenance of the benchmark."""
    meanings = results.provenance.get("markers", {})
    used = dict.fromkeys(word for cell in results.metrics["marker"].unique() for word in split_markers(cell))
    return {word: str(meanings.get(word, "")) if isinstance(meanings, dict) else "" for word in used}
