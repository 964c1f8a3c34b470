"""Result of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from farout.core.notebook import render_table
from farout.evaluation.scored_datasets import METHOD_SCORE
from farout.report.charts import draw_auroc_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Evaluation"]

_SUMMARY_COLUMNS = ["detector", "ood", "auroc", "auroc_low", "auroc_high"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one or more detectors on one or more out-of-distribution sets.

    Attributes:
        metrics: one row per detector, indicator and out-of-distribution set, with the columns of
            `farout.evaluation.evaluate.COLUMNS`; fractions, not percent.
        differences: AUROC of the detector minus that of each baseline with its 95 % interval, one row per baseline
            and set; empty without baselines.
        subsets: metrics averaged over random subsets of the out-of-distribution images; None if not requested.
        paths: files that were written.
    """

    metrics: pd.DataFrame
    differences: pd.DataFrame = field(default_factory=pd.DataFrame)
    subsets: pd.DataFrame | None = None
    paths: tuple[str, ...] = ()

    @property
    def method_scores(self) -> pd.DataFrame:
        """The rows of `metrics` for the scores of the methods, without their other indicators."""
        return self.metrics[self.metrics["indicator"] == METHOD_SCORE]

    def __repr__(self) -> str:
        rows = self.method_scores
        lines = [
            f"{detector} on {ood}: AUROC {auroc:.3f} ({low:.3f} to {high:.3f})"
            for detector, ood, auroc, low, high in zip(*(rows[column].head(10) for column in _SUMMARY_COLUMNS))
        ]
        more = [f"… {len(rows) - 10} more rows"] if len(rows) > 10 else []
        return "\n".join(["Evaluation", *lines, *more])

    def _repr_html_(self) -> str:
        """HTML for notebooks: AUROC with its interval, FPR95, and the rates of flagged images."""
        rows = self.method_scores
        intervals = [f"{low:.3f} to {high:.3f}" for low, high in zip(rows["auroc_low"], rows["auroc_high"])]
        table = pd.DataFrame(
            {
                "detector": rows["detector"],
                "out-of-distribution": rows["ood"],
                "AUROC": rows["auroc"],
                "95 % interval": intervals,
                "FPR95": rows["fpr95"],
                "detected": rows["detection"],
                "false alarms": rows["false_alarm"],
            }
        )
        return render_table(table, ".3f")

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the AUROC of every detector and set with its 95 % interval.

        Args:
            axes: matplotlib axes to draw on; None: a new figure.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots(layout="constrained")[1]
        draw_auroc_intervals(axes, self.method_scores)
        return axes
