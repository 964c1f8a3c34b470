"""Histogram of scores, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from farout.detectors.score_histogram import ScoreHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IN_DISTRIBUTION", "OUT_OF_DISTRIBUTION", "draw_score_histogram"]

IN_DISTRIBUTION, OUT_OF_DISTRIBUTION = "#3f6f9f", "#c93a4e"
"""Colors of in-distribution (or calibration) and of out-of-distribution (or new) images in every chart."""


def draw_score_histogram(
    axes: Axes, samples: Mapping[str, np.ndarray | ScoreHistogram], threshold: float | None = None, bins: int = 48
) -> None:
    """Draw the share of images in each score interval, one filled outline per sample.

    The axis ends at the highest score if that makes it at most 1.5 times as long, otherwise at the 98th percentile of
    all scores, or later where it would cut off the threshold or more than 0.5 % of the first sample; higher scores are
    then counted in the last bar, which the axis label says.

    Args:
        axes: matplotlib axes to draw on.
        samples: scores (n,) by label, or their counts; scores that are not finite are left out.
        threshold: score above which images are flagged, drawn as a dashed line; None or not finite: no line.
        bins: number of bars.
    """
    counted = {label: _count_scores(sample) for label, sample in samples.items()}
    known = {label: (scores, counts) for label, (scores, counts) in counted.items() if len(scores)}
    axes.set(xlabel="score", ylabel="share of images")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    if not known:
        axes.text(0.5, 0.5, "no scores", ha="center", va="center", transform=axes.transAxes)
        return
    pooled, counts = (np.concatenate(parts) for parts in zip(*known.values()))
    ends = [threshold] if threshold is not None and np.isfinite(threshold) else []
    low = min([float(pooled.min()), *ends])
    high = max([_quantile(pooled, counts, 0.98), _quantile(*next(iter(known.values())), 0.995), *ends])
    if pooled.max() - low <= 1.5 * (high - low):  # nothing is gained by a shorter axis
        high = max(high, float(pooled.max()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for (label, (scores, counts)), color in zip(known.items(), (IN_DISTRIBUTION, OUT_OF_DISTRIBUTION, "#7a7a7a")):
        axes.hist(
            np.clip(scores, None, edges[-1]), edges.tolist(), weights=counts / counts.sum(), color=color, alpha=0.55,
            label=label, histtype="stepfilled",
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


def _count_scores(sample: np.ndarray | ScoreHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Finite scores and how often each occurs."""
    if isinstance(sample, ScoreHistogram):
        return sample.values()
    scores = sample[np.isfinite(sample)]
    return scores, np.ones(len(scores), dtype=np.int64)


def _quantile(scores: np.ndarray, counts: np.ndarray, q: float) -> float:
    """As `numpy.quantile` of the scores, each repeated `counts` times."""
    order = np.argsort(scores, kind="stable")
    last = np.cumsum(counts[order]) - 1  # rank of the last of equal scores
    rank = q * last[-1]
    low, high = scores[order][np.searchsorted(last, [np.floor(rank), np.ceil(rank)])]
    return float(low + (high - low) * (rank % 1))
