"""Charts of a benchmark's page: ROC curves, score histograms, and AUROC against cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from farout.benchmark.results_folder import BenchmarkResults, DetectorScores, SourcePair
from farout.evaluation.metrics import auroc, fpr95
from farout.evaluation.scored_datasets import METHOD_SCORE
from farout.report.charts import cost_scatter, roc_curves, score_histogram

__all__ = ["Chart", "draw_cost_charts", "draw_histograms", "draw_roc_charts", "mean_costs"]

_PLOTTED_COSTS = {"gmacs": ("GMACs per image", False), "images_per_s": ("images per second", True)}
"""Columns that are plotted: title of the axis, and whether a higher value is better."""
_COST_COLUMNS = ("nfe", "gmacs", "images_per_s", "peak_mib", "fit_s", "false_alarm")


@dataclass(frozen=True)
class Chart:
    """A chart with its caption."""

    caption: str
    svg: Markup


def draw_roc_charts(results: BenchmarkResults) -> list[Chart]:
    """For every set the ROC curves of all detectors that have scores, each with its first seed."""
    charts = []
    for pair in results.pairs:
        scores = {each.detector: _finite_scores(each, pair) for each in results.detector_scores}
        known = {name: both for name, both in scores.items() if both is not None}
        if known:
            charts.append(Chart(pair.title, roc_curves(known, f"ROC curves on {pair.title}")))
    return charts


def draw_histograms(results: BenchmarkResults, scores: DetectorScores) -> list[Chart]:
    """For every set the histogram of a detector's scores, with AUROC and FPR95 in the caption."""
    charts = []
    for pair in results.pairs:
        both = _finite_scores(scores, pair)
        if both is None:
            continue
        id_scores, ood_scores = both
        samples = {
            f"{len(id_scores)} in-distribution images": id_scores,
            f"{len(ood_scores)} out-of-distribution images": ood_scores,
        }
        values = f"AUROC {auroc(id_scores, ood_scores):.3f}, FPR95 {fpr95(id_scores, ood_scores):.3f}"
        label = f"Histogram of the scores of {scores.detector} on {pair.title}"
        charts.append(Chart(f"{pair.title}: {values}", score_histogram(samples, scores.threshold(), label)))
    return charts


def _finite_scores(scores: DetectorScores, pair: SourcePair) -> tuple[np.ndarray, np.ndarray] | None:
    """In-distribution and out-of-distribution scores; None if either has none."""
    if pair.id not in scores.scored or pair.ood not in scores.scored:
        return None
    id_scores, ood_scores = (
        table.score[np.isfinite(table.score)] for table in (scores.scored[name].scores for name in (pair.id, pair.ood))
    )
    return (id_scores, ood_scores) if len(id_scores) and len(ood_scores) else None


def mean_costs(results: BenchmarkResults) -> pd.DataFrame:
    """Means over sets and seeds of every column of cost, per detector."""
    own = results.metrics[results.metrics["indicator"] == METHOD_SCORE]
    columns = [name for name in _COST_COLUMNS if name in own and own[name].notna().any()]
    return own.groupby("detector", sort=False)[columns].mean()


def draw_cost_charts(results: BenchmarkResults) -> list[Chart]:
    """The mean AUROC on every group of sets against every cost."""
    own, costs = results.groups[results.groups["indicator"] == METHOD_SCORE], mean_costs(results)
    charts = []
    for group, part in own.groupby("ood_group", sort=False):
        mean_auroc = part.groupby("detector", sort=False)["auroc"].mean()
        for column, (title, higher_is_cheaper) in _PLOTTED_COSTS.items():
            if column not in costs or not costs[column].notna().any():
                continue
            table = pd.DataFrame({"auroc": mean_auroc, "cost": costs[column].reindex(mean_auroc.index)})
            table["is_baseline"] = [results.is_baseline(str(name)) for name in table.index]
            caption = f"AUROC on {str(group) or 'other'} sets against {title}"
            unknown = [str(name) for name in table.index[table.isna().any(axis=1)]]
            if unknown:
                caption += f" (unknown for {', '.join(unknown)})"
            charts.append(Chart(caption, cost_scatter(table, title, caption, higher_is_cheaper=higher_is_cheaper)))
    return charts
