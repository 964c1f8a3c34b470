"""Read the results of a benchmark back from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from farout.benchmark.metrics import split_markers
from farout.core import store
from farout.core.csv_files import read_csv
from farout.core.errors import StoreError
from farout.core.yaml_files import parse_yaml
from farout.data.image_source import Policy
from farout.detectors.base import Scores
from farout.evaluation.evaluate import TEXT_COLUMNS
from farout.scoring.folder import read_manifest, read_scores

__all__ = [
    "BenchmarkResults",
    "DetectorScores",
    "ScoredFolder",
    "SourcePair",
    "markers_of_row",
    "read_results",
    "read_scored_folders",
]

_METRICS_COLUMNS = ("detector", "indicator", "id", "ood", "seed", "marker", "auroc", "fpr95", "aupr_in", "aupr_out")
_GROUPS_COLUMNS = ("detector", "indicator", "ood_group", "auroc")
_TEXT_COLUMNS = (*TEXT_COLUMNS, "bench", "marker")
_DETECTOR_MARKERS, _SET_MARKERS = ("baseline", "pretrained"), ("size", "overlap")
"""Markers that all rows of a detector, or of a set, have; the others belong to single rows."""


@dataclass(frozen=True)
class SourcePair:
    """An in-distribution and an out-of-distribution source by name, and the title of the pair on the page."""

    id: str
    ood: str
    title: str


@dataclass(frozen=True)
class ScoredFolder:
    """A scored source: its folder, its name, the policy for unreadable images, and its scores."""

    folder: Path
    source: str
    policy: Policy
    scores: Scores


@dataclass(frozen=True)
class DetectorScores:
    """The scores of a detector that was fitted with one seed, by source; empty if no score folders were kept."""

    detector: str
    seed: int
    scored: dict[str, ScoredFolder]

    def threshold(self) -> float:
        """Estimate of the score above which images are flagged; infinite if no image is flagged.

        The midpoint between the highest score that is not flagged and the lowest one that is.
        """
        tables = [folder.scores for folder in self.scored.values()]
        flagged = [scores.score[scores.is_ood].min() for scores in tables if scores.is_ood.any()]
        passed = [
            part.max()
            for part in (scores.score[~scores.is_ood & (scores.score == scores.score)] for scores in tables)
            if len(part)
        ]
        if not flagged:
            return math.inf
        return float(min(flagged) if not passed else (min(flagged) + max(passed)) / 2)


@dataclass(frozen=True)
class BenchmarkResults:
    """The tables of a benchmark, its specification as text, its provenance, and the scores of each first seed."""

    metrics: pd.DataFrame
    groups: pd.DataFrame
    spec: str
    provenance: dict[str, Any]
    detector_scores: tuple[DetectorScores, ...]

    @property
    def name(self) -> str:
        """The name of the benchmark."""
        return str(self.metrics["bench"].iloc[0])

    @property
    def about(self) -> str:
        """The description in the specification; may be empty."""
        spec = parse_yaml(self.spec, "the specification")
        return str(spec.get("about") or "") if isinstance(spec, dict) else ""

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(self.metrics["seed"].nunique())

    @property
    def pairs(self) -> tuple[SourcePair, ...]:
        """The pairs of sources, in the order of `metrics.csv`."""
        pairs = list(dict.fromkeys(zip(self.metrics["id"], self.metrics["ood"])))
        several = len({id_name for id_name, _ in pairs}) > 1
        return tuple(SourcePair(a, b, f"{b} (id: {a})" if several else b) for a, b in pairs)

    def markers_of_detector(self, detector: str) -> tuple[str, ...]:
        """Markers that apply to a detector."""
        return self._markers(self.metrics["detector"] == detector, _DETECTOR_MARKERS)

    def markers_of_pair(self, pair: SourcePair) -> tuple[str, ...]:
        """Markers that apply to a set."""
        rows = (self.metrics["id"] == pair.id) & (self.metrics["ood"] == pair.ood)
        return self._markers(rows, _SET_MARKERS)

    def _markers(self, rows: pd.Series, words: tuple[str, ...]) -> tuple[str, ...]:
        found = {word for cell in self.metrics.loc[rows, "marker"].unique() for word in split_markers(cell)}
        return tuple(word for word in words if word in found)

    def is_baseline(self, detector: str) -> bool:
        """Whether this is a trivial or a random-weights baseline."""
        return "baseline" in self.markers_of_detector(detector)


def markers_of_row(marker: str) -> list[str]:
    """The words of a cell of the column `marker` that apply to its row only, not to its detector or set."""
    return [word for word in split_markers(marker) if word not in _DETECTOR_MARKERS + _SET_MARKERS]


def read_results(folder: Path) -> BenchmarkResults:
    """Read `metrics.csv`, `groups.csv`, `bench.yaml`, `provenance.json` and the scores of each detector's first seed.

    Raises StoreError if one of the four files is missing or incomplete.
    """
    metrics = _read_table(folder / "metrics.csv", _METRICS_COLUMNS)
    groups = _read_table(folder / "groups.csv", _GROUPS_COLUMNS)
    if not len(metrics):
        raise StoreError(f"{folder / 'metrics.csv'} has no rows; expected one per detector, indicator, set and seed")
    spec = folder / "bench.yaml"
    if not spec.is_file():
        raise StoreError(f"{spec} is missing; the folder is incomplete or is not that of a benchmark")
    provenance = store.read_json(folder / "provenance.json")
    detector_scores = []
    for detector, seed in metrics.groupby("detector", sort=False)["seed"].min().items():
        folders = read_scored_folders(folder / "evaluations" / f"{detector}-{seed}" / "scores")
        detector_scores.append(DetectorScores(str(detector), int(seed), {each.source: each for each in folders}))
    return BenchmarkResults(metrics, groups, spec.read_text(encoding="utf-8"), provenance, tuple(detector_scores))


def _read_table(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """A table in which empty cells of text columns are empty strings."""
    if not path.is_file():
        raise StoreError(f"{path} is missing; the folder is incomplete or is not that of a benchmark")
    table = read_csv(path, texts=_TEXT_COLUMNS)
    missing = [name for name in required if name not in table]
    if missing:
        raise StoreError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return table if "bench" in table else table.assign(bench="benchmark")


def read_scored_folders(folder: Path) -> list[ScoredFolder]:
    """The score folders in a folder, sorted by name; empty if the folder does not exist."""
    scored = []
    for path in sorted(folder.glob("*/manifest.json")):
        manifest = read_manifest(path.parent)
        scored.append(ScoredFolder(path.parent, str(manifest["source"]), manifest["policy"], read_scores(path.parent)))
    return scored
