"""The leaderboard of a benchmark: every detector and indicator by groups of sets and by sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from farout.benchmark.page_data import DIGITS, Bench, Pair, of_figures
from farout.benchmark.table import words_of
from farout.evaluation.scored_datasets import OWN

__all__ = ["METRICS", "Column", "Row", "columns", "indicators", "marker_notes", "rows"]

METRICS = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
"""Metrics of the leaderboard, and how they are called."""
Cells: TypeAlias = list[tuple[float, str] | None]
"""Per metric the value and how sure it is, in words; None where there is no figure."""


@dataclass(frozen=True)
class Column:
    """A group of sets (its mean), or one pair of sources; markers: words that stand with the set."""

    title: str
    note: str
    markers: tuple[str, ...] = ()
    group: str | None = None
    pair: Pair | None = None


@dataclass(frozen=True)
class Row:
    """A detector by one of its indicators, with its cells per column; remarks: markers of single cells."""

    detector: str
    indicator: str
    markers: tuple[str, ...]
    control: bool
    cells: list[Cells]
    remarks: list[tuple[str, ...]]

    @property
    def own(self) -> bool:
        """Whether this is the method's own score."""
        return self.indicator == OWN


def columns(bench: Bench) -> list[Column]:
    """Groups first, then sets."""
    groups = [
        Column(f"{name or 'other'} (mean)", _group_note(part), group=str(name))
        for name, part in bench.groups.groupby("group", sort=False)
    ]
    first = {(row["id"], row["ood"]): row for row in bench.metrics.iloc[::-1].to_dict("records")}
    return groups + [
        Column(pair.title, _note(first[pair.inside, pair.outside]), bench.of_set(pair), pair=pair)
        for pair in bench.pairs
    ]


def _group_note(part: pd.DataFrame) -> str:
    """How many sets it is of, and how many could not be had."""
    counts = {name: int(part[name].max()) for name in ("sets", "untested") if name in part and part[name].notna().any()}
    words = {"sets": "of {} set" + "s" * (counts.get("sets") != 1), "untested": "{} untested"}
    return ", ".join(words[name].format(count) for name, count in counts.items() if count) or "of the group's sets"


def _note(row: dict[Any, Any]) -> str:
    """What kind of set it is: near or far, and whether choices may be made on it."""
    return ", ".join(part for part in (row.get("group", ""), "dev" if row.get("role") == "dev" else "") if part)


def indicators(bench: Bench) -> list[str]:
    """Names of all indicators, the methods' own score first."""
    return [OWN, *sorted(set(bench.metrics["indicator"]) - {OWN})]


def rows(bench: Bench, wanted: Sequence[Column]) -> list[Row]:
    """One a detector and indicator: own scores first, then by the first column's AUROC, the highest first."""
    sets, groups = _summed(bench.metrics, ["id", "ood"]), _summed(bench.groups, ["group"])
    remarks = _remarks(bench)

    def cells(who: tuple[str, str], column: Column) -> Cells:
        if column.pair is None:
            return groups.get((*who, column.group), [None] * len(METRICS))
        return sets.get((*who, column.pair.inside, column.pair.outside), [None] * len(METRICS))

    def words(who: tuple[str, str], column: Column) -> tuple[str, ...]:
        return remarks.get((*who, column.pair.inside, column.pair.outside), ()) if column.pair else ()

    found = [
        Row(
            *who,
            bench.of_detector(who[0]),
            bench.is_control(who[0]),
            [cells(who, column) for column in wanted],
            [words(who, column) for column in wanted],
        )
        for who in dict.fromkeys(zip(bench.metrics["detector"], bench.metrics["indicator"]))
    ]
    return sorted(found, key=lambda row: (not row.own, row.indicator, -_leading(row), row.detector))


def _remarks(bench: Bench) -> dict[Any, tuple[str, ...]]:
    """Markers of single figures, by detector, indicator and pair."""
    table = bench.metrics
    who = zip(table["detector"], table["indicator"], table["id"], table["ood"])
    found: dict[Any, dict[str, None]] = {}
    for key, text in zip(who, table["marker"]):
        found.setdefault(key, {}).update(dict.fromkeys(of_figures(text)))
    return {key: tuple(words) for key, words in found.items()}


def _leading(row: Row) -> float:
    return row.cells[0][0][0] if row.cells[0][0] is not None else -1.0


def _summed(table: pd.DataFrame, of: list[str]) -> dict[Any, Cells]:
    """Per detector, indicator and `of`, of each metric: the mean over seeds with its deviation; of one seed, with its
    interval where there is one.
    """
    found: dict[Any, Cells] = {}
    for who, part in table.groupby(["detector", "indicator", *of], sort=False):
        columns = {str(name): part[name].to_numpy() for name in part if str(name).startswith(tuple(METRICS))}
        found[who] = [_cell(columns, metric) for metric in METRICS]
    return found


def _cell(columns: dict[str, np.ndarray], metric: str) -> tuple[float, str] | None:
    values = columns.get(metric, np.zeros(0)).astype(float)
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    beside = {name: float(columns.get(f"{metric}_{name}", [np.nan])[0]) for name in ("low", "high", "std")}
    if len(known) > 1:
        words = f"± {known.std(ddof=1):.3f}"
    elif np.isfinite(beside["std"]):
        words = f"± {beside['std']:.3f}"
    else:
        words = "–".join(f"{beside[name]:.3f}" for name in ("low", "high") if np.isfinite(beside[name]))
    return round(float(known.mean()), DIGITS), words


def marker_notes(bench: Bench) -> dict[str, str]:
    """What each marker of the table means, as the benchmark says."""
    told = bench.provenance.get("markers", {})
    used = dict.fromkeys(word for text in dict.fromkeys(bench.metrics["marker"]) for word in words_of(text))
    return {word: str(told.get(word, "")) for word in used} if isinstance(told, dict) else dict.fromkeys(used, "")
