"""What the page of a benchmark is made of, read from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from farout.benchmark.table import words_of
from farout.core import store
from farout.core.errors import StoreError
from farout.detectors.base import Scores
from farout.scoring.folder import read_scores

__all__ = ["DIGITS", "Bench", "Pair", "Run", "Side", "of_figures", "read_bench", "read_sides"]

DIGITS = 6
"""Of figures in the page's data. It shows three: a figure rounded to four first would differ from the tables."""
_METRICS = ("detector", "indicator", "id", "ood", "seed", "marker", "auroc", "fpr95", "aupr_in", "aupr_out")
_NAMES = ("bench", "detector", "indicator", "id", "ood", "group", "role", "marker")
_GROUPS = ("detector", "indicator", "group", "auroc")


_CONTROL = "control"
_OF_DETECTORS, _OF_SETS = (_CONTROL, "backbone"), ("size", "overlap")
"""Words of `marker` that all rows of a detector, or of a set, have; the others are of one row."""


@dataclass(frozen=True)
class Pair:
    """An in-distribution and an out-of-distribution source, by name, and how the page calls them."""

    inside: str
    outside: str
    title: str


@dataclass(frozen=True)
class Side:
    """A scored source: its folder, its name, what became of unreadable images, and its scores."""

    folder: Path
    source: str
    policy: Any
    scores: Scores


@dataclass(frozen=True)
class Run:
    """A detector fitted with one seed, and what it scored, by the name of the source; nothing where no score folders
    were kept.
    """

    detector: str
    seed: int
    sides: dict[str, Side]

    def threshold(self) -> float:
        """The score that flagged images lie above, as far as its images tell: halfway between the highest that is not
        flagged and the lowest that is; infinite where none is.
        """
        frames = [side.scores for side in self.sides.values()]
        flagged = [scores.score[scores.is_ood].min() for scores in frames if scores.is_ood.any()]
        below = [
            part.max()
            for part in (scores.score[~scores.is_ood & (scores.score == scores.score)] for scores in frames)
            if len(part)
        ]
        if not flagged:
            return math.inf
        return float(min(flagged) if not below else (min(flagged) + max(below)) / 2)


@dataclass(frozen=True)
class Bench:
    """A benchmark: its tables, its specification as written, free notes on how it was made, the first seed of each
    detector with its scores, and which detectors are controls.
    """

    metrics: pd.DataFrame
    groups: pd.DataFrame
    spec: str
    provenance: dict[str, Any]
    runs: tuple[Run, ...]
    controls: frozenset[str]

    @property
    def name(self) -> str:
        """What the benchmark is called."""
        return str(self.metrics["bench"].iloc[0])

    @property
    def about(self) -> str:
        """What its specification says of it; empty where it says nothing."""
        told = yaml.safe_load(self.spec)
        return str(told.get("about") or "") if isinstance(told, dict) else ""

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return int(self.metrics["seed"].nunique())

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of sources, in the order of `metrics.csv`."""
        found = list(dict.fromkeys(zip(self.metrics["id"], self.metrics["ood"])))
        several = len({inside for inside, _ in found}) > 1
        return tuple(Pair(a, b, f"{b} (id: {a})" if several else b) for a, b in found)

    def of_detector(self, detector: str) -> tuple[str, ...]:
        """Markers that stand with a detector."""
        return self._of(self.metrics["detector"] == detector, _OF_DETECTORS)

    def of_set(self, pair: Pair) -> tuple[str, ...]:
        """Markers that stand with a set."""
        chosen = (self.metrics["id"] == pair.inside) & (self.metrics["ood"] == pair.outside)
        return self._of(chosen, _OF_SETS)

    def _of(self, chosen: pd.Series, known: tuple[str, ...]) -> tuple[str, ...]:
        found = {word for text in self.metrics.loc[chosen, "marker"].unique() for word in words_of(text)}
        return tuple(word for word in known if word in found)

    def is_control(self, detector: str) -> bool:
        """Whether it is there to be beaten."""
        return detector in self.controls


def of_figures(marker: str) -> list[str]:
    """Those words of a marker that stand with a single figure."""
    return [word for word in words_of(marker) if word not in _OF_DETECTORS + _OF_SETS]


def read_bench(folder: Path) -> Bench:
    """Reads `metrics.csv`, `groups.csv`, `bench.yaml`, `provenance.json` and the scores of each detector's first seed.

    Raises StoreError where one of the four is missing or lacks what the page needs.
    """
    metrics = _table(folder / "metrics.csv", _METRICS)
    groups = _table(folder / "groups.csv", _GROUPS)
    if not len(metrics):
        raise StoreError(f"{folder / 'metrics.csv'} has no rows; expected one per detector, indicator, set and seed")
    spec = folder / "bench.yaml"
    if not spec.is_file():
        raise StoreError(f"{spec} is missing; the folder is incomplete or is not that of a benchmark")
    firsts = metrics.groupby("detector", sort=False)["seed"].min()
    runs = tuple(_run(folder, str(name), int(seed)) for name, seed in firsts.items())
    provenance = store.read_json(folder / "provenance.json")
    return Bench(metrics, groups, spec.read_text(encoding="utf-8"), provenance, runs, _controls(metrics))


def _table(path: Path, wanted: tuple[str, ...]) -> pd.DataFrame:
    """A table; cells of text that are empty are empty, not gaps."""
    if not path.is_file():
        raise StoreError(f"{path} is missing; the folder is incomplete or is not that of a benchmark")
    table = pd.read_csv(path, keep_default_na=False, na_values=["", "nan"], dtype=dict.fromkeys(_NAMES, str))
    lacking = [name for name in wanted if name not in table]
    if lacking:
        raise StoreError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(map(str, table.columns))}")
    words = {name: table[name].fillna("") for name in _NAMES if name in table}
    return table.assign(**{"bench": "benchmark", **words})


def _controls(metrics: pd.DataFrame) -> frozenset[str]:
    """Detectors that are marked as controls."""
    marked = metrics.loc[[_CONTROL in words_of(text) for text in metrics["marker"]], "detector"]
    return frozenset(map(str, marked))


def _run(folder: Path, detector: str, seed: int) -> Run:
    sides = read_sides(folder / "rated" / f"{detector}-{seed}" / "scores")
    return Run(detector, seed, {side.source: side for side in sides})


def read_sides(folder: Path) -> list[Side]:
    """The score folders inside a folder, by name; none where there is no such folder."""
    return [_side(path) for path in sorted(folder.glob("*/manifest.json"))]


def _side(manifest: Path) -> Side:
    about = store.read_json(manifest)
    return Side(manifest.parent, str(about["source"]), about["policy"], read_scores(manifest.parent))
