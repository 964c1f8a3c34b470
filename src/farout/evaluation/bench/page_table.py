"""The leaderboard of a benchmark: every detector and indicator by groups of sets and by sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from farout.evaluation.bench.page_data import OWN, Bench, Pair

__all__ = ["MARKERS", "METRICS", "Column", "Row", "columns", "indicators", "marker_notes", "rows"]

METRICS = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
"""Metrics of the leaderboard, and how they are called."""
MARKERS = {
    "control": "there to be beaten: it has learnt nothing, or sees only trivial traits of an image",
    "outliers": "was shown outliers of some kind in training",
    "labels": "was told the classes of good images in training",
    "pretrained": "its backbone was trained on other images before",
}
"""What a marker means, where `markers` in `provenance.json` does not say otherwise."""


Cells: TypeAlias = list[list[float | None] | None]
"""Per metric [value, low, high], or None where there is no figure; low and high are None where there is no interval."""


@dataclass(frozen=True)
class Column:
    """A group of sets (its mean), or one pair of sources."""

    title: str
    note: str
    group: str | None = None
    pair: Pair | None = None


@dataclass(frozen=True)
class Row:
    """A detector by one of its indicators, with its cells per column."""

    detector: str
    indicator: str
    markers: tuple[str, ...]
    control: bool
    cells: list[Cells]

    @property
    def own(self) -> bool:
        """Whether this is the method's own score."""
        return self.indicator == OWN


def columns(bench: Bench) -> list[Column]:
    """Groups first, then sets."""
    names = dict.fromkeys(bench.groups["group"])
    groups = [Column(_group_title(name), "mean of a group", group=name) for name in names]
    roles = bench.metrics.drop_duplicates(["id", "ood"]) if "role" in bench.metrics else bench.metrics.head(0)
    known = {(row["id"], row["ood"]): _note(row) for row in roles.to_dict("records")}
    return groups + [Column(pair.title, known.get((pair.inside, pair.outside), ""), pair=pair) for pair in bench.pairs]


def _group_title(name: str) -> str:
    return f"{name} (mean)" if name else "other (mean)"


def _note(row: dict[Any, Any]) -> str:
    """What kind of set it is: near or far, and whether choices may be made on it."""
    return ", ".join(part for part in (row.get("group", ""), "dev" if row["role"] == "dev" else "") if part)


def indicators(bench: Bench) -> list[str]:
    """Names of all indicators, the methods' own score first."""
    return [OWN, *sorted(set(bench.metrics["indicator"]) - {OWN})]


def rows(bench: Bench, wanted: Sequence[Column]) -> list[Row]:
    """One a detector and indicator: own scores first, then by the first column's AUROC, the highest first."""
    sets, groups = _summed(bench.metrics, ["id", "ood"]), _summed(bench.groups, ["group"])

    def cells(who: tuple[str, str], column: Column) -> Cells:
        if column.pair is None:
            return groups.get((*who, column.group), [None] * len(METRICS))
        return sets.get((*who, column.pair.inside, column.pair.outside), [None] * len(METRICS))

    names = dict.fromkeys(zip(bench.metrics["detector"], bench.metrics["indicator"]))
    found = [
        Row(who[0], who[1], bench.markers[who[0]], bench.is_control(who[0]), [cells(who, column) for column in wanted])
        for who in names
    ]
    return sorted(found, key=lambda row: (not row.own, row.indicator, -_leading(row), row.detector))


def _leading(row: Row) -> float:
    first = row.cells[0][0]
    return -1.0 if first is None or first[0] is None else first[0]


def _summed(table: pd.DataFrame, of: list[str]) -> dict[Any, Cells]:
    """Per detector, indicator and `of`, of each metric: the mean over seeds with the smallest and the largest; of one
    seed, with its interval where there is one.
    """
    found: dict[Any, Cells] = {}
    for who, part in table.groupby(["detector", "indicator", *of], sort=False):
        columns = {str(name): part[name].to_numpy() for name in part if str(name).startswith(tuple(METRICS))}
        found[who] = [_cell(columns, metric) for metric in METRICS]
    return found


def _cell(columns: dict[str, np.ndarray], metric: str) -> list[float | None] | None:
    values = columns.get(metric, np.zeros(0)).astype(float)
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = (known.min(), known.max()) if len(known) > 1 else (np.nan, np.nan)
    if len(values) == 1:
        low, high = (float(columns.get(f"{metric}_{end}", [np.nan])[0]) for end in ("low", "high"))
    return [_rounded(value) for value in (float(known.mean()), float(low), float(high))]


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def marker_notes(bench: Bench) -> dict[str, str]:
    """What each marker that stands in the table means; the benchmark's own words come first."""
    own = bench.provenance.get("markers", {})
    known = MARKERS | (own if isinstance(own, dict) else {})
    used = dict.fromkeys(word for name in dict.fromkeys(bench.metrics["detector"]) for word in bench.markers[name])
    return {word: str(known.get(word, "as the benchmark's specification says")) for word in used}
