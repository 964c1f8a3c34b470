"""Metrics of a benchmark: all rows with markers, means over groups, and paired differences between detectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from farout.benchmark.benchmark_plan import BenchmarkJob, BenchmarkPlan
from farout.core.csv_files import read_csv
from farout.core.errors import FaroutError
from farout.data.image_source import ImageSource
from farout.detectors.interface import DetectorInterface
from farout.evaluation.evaluate import COLUMNS, TEXT_COLUMNS
from farout.evaluation.scored_datasets import (
    DIFFERENCE_COLUMNS,
    METHOD_SCORE,
    ScoredDataset,
    compare_detectors,
    folder_name,
    scores_by_indicator,
)
from farout.evaluation.trivial_baselines import NAME as TRIVIAL
from farout.scoring.folder import read_scores

__all__ = [
    "GROUP_COLUMNS",
    "MARKERS",
    "collect_metrics",
    "mean_by_group",
    "paired_differences",
    "read_scored_datasets",
    "significantly_lower",
    "split_markers",
]

MARKERS = {
    "baseline": "a trivial or random-weights baseline",
    "size": "the set's native size differs from that of the in-distribution images: resizing alone may distinguish it",
    "overlap": "images or classes of the set are also in the in-distribution set",
    "pretrained": "a network of the detector was pretrained on other images, which may resemble the OOD images",
    "constant": "all scores are equal",
    "below half": "the AUROC is below one half: the OOD images have lower scores than the in-distribution images",
    "best": "no other method has a significantly higher AUROC (paired 95 % interval) in any seed",
}
"""Words of the column `marker` with their meaning; sets that are not available have no rows."""
GROUP_COLUMNS = [
    "bench", "detector", "indicator", "ood_group", "auroc", "auroc_std", "aupr_in", "aupr_out", "fpr95", "fpr95_std",
    "false_alarm", "detection", "sets", "untested", "seeds", "marker",
]  # fmt: skip
"""Columns of `groups.csv`: means over seeds of the means over sets. `_std`: standard deviation over seeds (n - 1).
`sets`: number of sets with metrics; a set without a readable image has none."""
_AVERAGED_COLUMNS = ["auroc", "aupr_in", "aupr_out", "fpr95", "false_alarm", "detection"]

ScoredJob = tuple[BenchmarkJob, Sequence[ScoredDataset]]
"""An evaluation with its scored datasets, the in-distribution one first."""


def read_scored_datasets(job: BenchmarkJob, sources: Sequence[ImageSource]) -> list[ScoredDataset]:
    """Read the scores of an evaluation on these sources."""
    return [ScoredDataset(source, read_scores(job.output / "scores" / folder_name(source))) for source in sources]


def collect_metrics(
    plan: BenchmarkPlan,
    scored: Iterable[ScoredJob],
    facts: Mapping[str, Mapping[str, Any]],
    differences: pd.DataFrame,
) -> pd.DataFrame:
    """All rows of the finished evaluations, with the benchmark's name, its groups and markers.

    Args:
        plan: the benchmark.
        scored: the evaluations with their scored datasets.
        facts: facts about every source; their `markers` are added to the rows of the source.
        differences: see `paired_differences`.
    """
    lower = significantly_lower(plan, differences)
    tables = []
    for job, datasets in scored:
        table = read_csv(job.output / "metrics.csv", texts=TEXT_COLUMNS)
        table = table[table["ood"].isin(plan.scored_ood_sources)]
        constant = _constant_indicators(datasets)
        detector_markers = _markers_of_detector(plan, job)
        markers = []
        for row in table.to_dict("records"):
            found = {*detector_markers, *facts[row["ood"]]["markers"]}
            if (row["ood"], row["indicator"]) in constant:
                found.add("constant")
            if row["auroc"] < 0.5:
                found.add("below half")
            is_method = job.entry in plan.spec.detectors and row["indicator"] == METHOD_SCORE
            if is_method and row["n_ood"] and (row["detector"], row["ood"]) not in lower:
                found.add("best")
            markers.append(_join_markers(found))
        groups = table["ood"].map(plan.spec.group_of)
        tables.append(table.assign(ood_group=groups, bench=plan.spec.name, marker=markers))
    if not tables:
        raise FaroutError(f"nothing of the benchmark {plan.spec.name} is evaluated yet")
    return pd.concat(tables, ignore_index=True)[[*COLUMNS, "bench", "marker"]]


def split_markers(marker: str) -> list[str]:
    """The words of a cell of the column `marker`, which are separated by semicolons."""
    return [word for word in marker.split(";") if word]


def _join_markers(words: Iterable[str]) -> str:
    """In the order of `MARKERS`."""
    found = set(words)
    return ";".join(word for word in MARKERS if word in found)


def _constant_indicators(datasets: Sequence[ScoredDataset]) -> set[tuple[str, str]]:
    """Out-of-distribution sets and indicators for which all scores, the in-distribution ones included, are equal."""
    id_dataset, *ood_datasets = datasets
    constant = set()
    for ood_dataset in ood_datasets:
        ood_scores = scores_by_indicator(ood_dataset.scores)
        for indicator, id_scores in scores_by_indicator(id_dataset.scores).items():
            values = np.concatenate([id_scores, ood_scores[indicator]])
            values = values[np.isfinite(values)]
            if len(values) and np.ptp(values) == 0:
                constant.add((ood_dataset.source.name, indicator))
    return constant


def _markers_of_detector(plan: BenchmarkPlan, job: BenchmarkJob) -> set[str]:
    if job.entry == TRIVIAL:
        return {"baseline"}
    baseline_of = plan.job("detectors", job.entry, job.seed).baseline_of
    has_random_weights = baseline_of is not None
    entry = plan.spec.detectors[baseline_of or job.entry]

    # a frozen backbone, a perceptual distance or a given network was trained on other images
    detector = entry.build_detector()
    networks = [plan.spec.networks[name] for name in (entry.diffusion, entry.classifier) if name is not None]
    is_given = any(network.folder is not None for network in networks) and not has_random_weights
    is_pretrained = is_given or any(
        _uses_pretrained_network(each, has_random_weights) for each in detector.parts.values() or [detector]
    )
    return {word for word, holds in {"baseline": has_random_weights, "pretrained": is_pretrained}.items() if holds}


def _uses_pretrained_network(detector: DetectorInterface, has_random_weights: bool) -> bool:
    """Whether a backbone or a perceptual distance decides the scores."""
    requirements, settings = detector.requirements, detector.config
    random_backbone = settings.get("weights") == "random" or (has_random_weights and requirements.diffusion is None)
    metrics = {*settings.get("metrics", ()), *settings.get("density_metrics", ())}
    return (requirements.backbone and not random_backbone) or "perceptual" in metrics


def mean_by_group(plan: BenchmarkPlan, metrics: pd.DataFrame) -> pd.DataFrame:
    """Means over the sets of a group and over seeds, see `GROUP_COLUMNS`."""
    rows = []
    for (detector, indicator, group), part in metrics.groupby(["detector", "indicator", "ood_group"], sort=False):
        by_seed = part.groupby("seed")[_AVERAGED_COLUMNS].mean()
        deviation = by_seed.std(ddof=1)
        means: dict[Any, float] = by_seed.mean().to_dict()
        markers = {word for cell in part["marker"] for word in split_markers(cell)} - {"best"}
        rows.append(
            {
                "bench": plan.spec.name,
                "detector": detector,
                "indicator": indicator,
                "ood_group": group,
                **means,
                **{f"{name}_std": deviation[name] for name in ("auroc", "fpr95")},
                "sets": part.loc[part["auroc"].notna(), "ood"].nunique(),
                "untested": sum(source in plan.missing for source in plan.spec.ood[str(group)]),
                "seeds": len(by_seed),
                "marker": _join_markers(markers),
            }
        )
    return pd.DataFrame(rows, columns=GROUP_COLUMNS)


def paired_differences(scored: Sequence[ScoredJob]) -> pd.DataFrame:
    """AUROC of each detector's score minus that of each other detector with the same seed, on the same images.

    Returns:
        Table with the columns of `DIFFERENCE_COLUMNS` and seed; each pair of detectors is listed in both orders.
    """
    rows = []
    for (first, first_datasets), (second, second_datasets) in combinations(scored, 2):
        if first.seed != second.seed:
            continue
        for row in compare_detectors((first.entry, first_datasets), (second.entry, second_datasets), first.seed):
            reverse = {
                **row,
                **{"first": row["second"], "second": row["first"]},
                **{"difference": -row["difference"], "low": -row["high"], "high": -row["low"]},
            }
            rows += [{**each, "seed": first.seed} for each in (row, reverse)]
    return pd.DataFrame(rows, columns=[*DIFFERENCE_COLUMNS, "seed"])


def significantly_lower(plan: BenchmarkPlan, differences: pd.DataFrame) -> set[tuple[str, str]]:
    """Detectors and sets on which another method has a significantly higher AUROC in some seed; baselines do not count.

    Args:
        plan: the benchmark.
        differences: see `paired_differences`.
    """
    lower = differences[(differences["high"] < 0) & differences["second"].isin(list(plan.spec.detectors))]
    return set(zip(lower["first"], lower["ood"]))
