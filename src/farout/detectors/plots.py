"""Histogram of scores, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IN_DISTRIBUTION", "OUT_OF_DISTRIBUTION", "draw_score_histogram"]

IN_DISTRIBUTION, OUT_OF_DISTRIBUTION = "#3f6f9f", "#c93a4e"
"""Colors of in-distribution (or calibration) and of out-of-distribution (or new) images in every chart."""


def draw_score_histogram(
    axes: Axes, samples: Mapping[str, np.ndarray], threshold: float | None = None, bins: int = 48
) -> None:
    """Draw the share of images in each score interval, one filled outline per sample.

    The axis ends at the highest score if that makes it at most 1.5 times as long, otherwise at the 98th percentile of
    all scores, or later where it would cut off the threshold or more than 0.5 % of the first sample; higher scores are
    then counted in the last bar, which the axis label says.

    Args:
        axes: matplotlib axes to draw on.
        samples: scores (n,) by label; scores that are not finite are left out.
        threshold: score above which images are flagged, drawn as a dashed line; None or not finite: no line.
        bins: number of bars.
    """
    finite = {label: scores[np.isfinite(scores)] for label, scores in samples.items()}
    known = {label: scores for label, scores in finite.items() if len(scores)}
    axes.set(xlabel="score", ylabel="share of images")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    if not known:
        axes.text(0.5, 0.5, "no scores", ha="center", va="center", transform=axes.transAxes)
        return
    pooled, first = np.concatenate(list(known.values())), next(iter(known.values()))
    ends = [threshold] if threshold is not None and np.isfinite(threshold) else []
    low = min([float(pooled.min()), *ends])
    high = max([float(np.quantile(pooled, 0.98)), float(np.quantile(first, 0.995)), *ends])
    if pooled.max() - low <= 1.5 * (high - low):  # nothing is gained by a shorter axis
        high = max(high, float(pooled.max()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for (label, scores), color in zip(known.items(), (IN_DISTRIBUTION, OUT_OF_DISTRIBUTION, "#7a7a7a")):
        weights = np.full(len(scores), 1 / len(scores))
        axes.hist(
            np.clip(scores, None, edges[-1]), edges.tolist(), weights=weights, color=color, alpha=0.55, label=label,
            histtype="stepfilled",
        )  # fmt: skip
    for limit in ends:
        axes.axvline(limit, color="#333333", linestyle="--", linewidth=1.2, label=f"threshold {limit:.4g}")
    if pooled.max() > edges[-1]:
        limit_text = f"{edges[-1]:.3g}".replace("-", "\N{MINUS SIGN}")  # as on the axis
        axes.set_xlabel(f"score (the last bar includes all scores above {limit_text})")
    axes.margins(x=0)
    # above the bars, which leave no corner free in general
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2, handlelength=1.4,
        columnspacing=1.4,
    )  # fmt: skip
