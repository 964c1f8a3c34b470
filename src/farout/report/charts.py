"""Charts of the HTML pages: matplotlib figures as inline SVG that follows the page's colors, light or dark.

The same data give the same bytes. matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from farout.detectors.plots import IN_DISTRIBUTION, OUT_OF_DISTRIBUTION, draw_score_histogram
from farout.detectors.score_histogram import ScoreHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "cost_scatter",
    "distance_histogram",
    "draw_auroc_intervals",
    "evidence_chart",
    "pareto_front",
    "rate_chart",
    "roc_curves",
    "roc_points",
    "score_histogram",
]

_TEXT, _GRID = "#333333", "#cccccc"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _TEXT,
    "axes.grid": True,
    "axes.labelcolor": _TEXT,
    "axes.labelsize": 12,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "farout",  # otherwise element ids are random
    "text.color": _TEXT,
    "text.parse_math": False,  # a file or detector name may contain dollar signs
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}
_CHART_POINTS = 800
"""Maximum number of points of a line over time."""
_CSS_COLORS = {
    _TEXT: "currentColor",
    _GRID: "var(--line)",
    IN_DISTRIBUTION: "var(--in)",
    OUT_OF_DISTRIBUTION: "var(--out)",
}
"""Colors of the figures and the CSS values that replace them in a page; `base.html` defines the variables."""
_SERIES = ("#4477aa", "#ee6677", "#228833", "#b8860b", "#66aacc", "#aa3377", "#888888")
"""Colors that readers with color-blindness distinguish, on white and on black (Paul Tol's "bright", adapted)."""


def score_histogram(samples: Mapping[str, np.ndarray | ScoreHistogram], threshold: float | None, label: str) -> Markup:
    """Histogram of scores, one outline per sample, with the threshold above which images are flagged."""
    return _draw(lambda axes: draw_score_histogram(axes, samples, threshold), label)


def distance_histogram(samples: Mapping[str, np.ndarray], xlabel: str, label: str) -> Markup:
    """Histogram of positive numbers on a logarithmic axis, one outline per sample."""

    def draw(axes: Axes) -> None:
        pooled = np.concatenate(list(samples.values()))
        edges = np.geomspace(max(pooled.min(), 1e-3), max(pooled.max(), 2e-3), 41).tolist()
        for (name, values), color in zip(samples.items(), _SERIES):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=weights, histtype="step", linewidth=1.6, color=color, label=name)
        axes.set(xscale="log", xlabel=xlabel, ylabel="share of images")
        _label_log_axis(axes.xaxis)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.legend()

    return _draw(draw, label)


def roc_points(id_scores: np.ndarray, ood_scores: np.ndarray, points: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of finite scores, out-of-distribution images being the positives.

    At most twice `points` vertices, evenly spaced along the curve, so that a page stays small.
    """
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    from sklearn.metrics import roc_curve  # not needed for the page of `farout score`

    false_positive_rate, true_positive_rate, _ = roc_curve(is_ood, np.concatenate([id_scores, ood_scores]))
    nearest = np.searchsorted(false_positive_rate + true_positive_rate, np.linspace(0, 2, points) - 1e-9)
    # with the vertex before each: many images of one score make one long straight segment
    kept = np.unique(np.clip(np.concatenate([nearest, nearest - 1]), 0, len(true_positive_rate) - 1))
    return false_positive_rate[kept], true_positive_rate[kept]


def roc_curves(scores: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str) -> Markup:
    """ROC curves of several detectors on one out-of-distribution set.

    Args:
        scores: (in-distribution scores, out-of-distribution scores), finite, by name in the order of the legend.
        label: description of the chart for screen readers.
    """

    def draw(axes: Axes) -> None:
        for number, (name, (id_scores, ood_scores)) in enumerate(scores.items()):
            color, dashes = _line_style(number)
            axes.plot(*roc_points(id_scores, ood_scores), color=color, linestyle=dashes, label=name)
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="false positive rate", ylabel="true positive rate")
        axes.set_aspect("equal")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)

    return _draw(draw, label, height=max(3.6, 0.6 + 0.24 * len(scores)))


def pareto_front(cost: np.ndarray, auroc: np.ndarray, *, higher_is_cheaper: bool = False) -> np.ndarray:
    """Whether no other detector is at least as good and at least as cheap, and better in one of both; bool (n,)."""
    cheapness = cost if higher_is_cheaper else -cost
    as_good = (cheapness[None] >= cheapness[:, None]) & (auroc[None] >= auroc[:, None])
    better = (cheapness[None] > cheapness[:, None]) | (auroc[None] > auroc[:, None])
    return np.asarray(~np.any(as_good & better, axis=1))


def cost_scatter(table: pd.DataFrame, xlabel: str, label: str, *, higher_is_cheaper: bool = False) -> Markup:
    """AUROC against cost on a logarithmic axis; a step line joins the detectors on the Pareto front.

    Args:
        table: rows are detectors; columns `cost` (0 or more), `auroc`, and `is_baseline` (drawn hollow).
        xlabel: name and unit of the cost.
        label: description of the chart for screen readers.
        higher_is_cheaper: whether a higher number is better, as for images per second.
    """
    known = table[np.isfinite(table["cost"]) & np.isfinite(table["auroc"])]

    def draw(axes: Axes) -> None:
        cost, auroc = known["cost"].to_numpy(dtype=float), known["auroc"].to_numpy(dtype=float)
        for number, (name, row) in enumerate(known.iterrows()):
            color, _ = _line_style(number)
            axes.plot(
                row["cost"], row["auroc"], linestyle="none", color=color, marker="osD^vP"[number % 6],
                fillstyle="none" if row["is_baseline"] else "full", markersize=8, label=str(name), clip_on=False,
            )  # fmt: skip
        if (cost > 0).any():
            lowest = 10 ** math.floor(math.log10(cost[cost > 0].min()))
            # zero cost, such as that of a baseline without a network, has a place left of the logarithmic part
            axes.set_xscale("symlog", linthresh=lowest, linscale=0.4) if (cost == 0).any() else axes.set_xscale("log")
            _label_log_axis(axes.xaxis)
        front = pareto_front(cost, auroc, higher_is_cheaper=higher_is_cheaper)
        order = np.argsort(cost[front])
        where: Literal["pre", "post"] = "pre" if higher_is_cheaper else "post"
        axes.step(cost[front][order], auroc[front][order], where=where, color=_TEXT, linewidth=1, zorder=1)
        axes.set(xlabel=xlabel, ylabel="AUROC")
        axes.set_ylim(top=1.005)
        if len(known):
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)

    return _draw(draw, label, height=max(3.0, 0.6 + 0.24 * len(known)))


def draw_auroc_intervals(axes: Axes, table: pd.DataFrame) -> None:
    """Draw one dot per detector and out-of-distribution set, with its 95 % interval.

    Args:
        axes: matplotlib axes to draw on.
        table: columns `detector`, `ood`, `auroc`, `auroc_low` and `auroc_high`.
    """
    detectors, sets = list(dict.fromkeys(table["detector"])), list(dict.fromkeys(table["ood"]))
    for number, name in enumerate(detectors):
        part = table[table["detector"] == name]
        offset = 0.7 * ((number + 0.5) / len(detectors) - 0.5)
        rows = np.array([sets.index(ood) for ood in part["ood"]]) + offset
        errors = np.abs(part[["auroc_low", "auroc_high"]].to_numpy(dtype=float).T - part["auroc"].to_numpy(dtype=float))
        axes.errorbar(
            part["auroc"], rows, xerr=errors, fmt="osD^vP"[number % 6], markersize=5, linewidth=1.2, label=str(name),
            color=_line_style(number)[0],
        )  # fmt: skip
    axes.axvline(0.5, color=_GRID, linewidth=1, zorder=0)
    axes.set_yticks(range(len(sets)), [str(name) for name in sets])
    axes.invert_yaxis()
    axes.set(xlabel="AUROC with 95 % interval")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)


def evidence_chart(
    images: np.ndarray, log10_values: np.ndarray, log10_threshold: float, alarms: np.ndarray, name: str, label: str
) -> Markup:
    """A statistic over time on a logarithmic axis, with its threshold and the images at which there was an alarm.

    Args:
        images: number of each image, ascending.
        log10_values: decimal logarithms of the statistic.
        log10_threshold: decimal logarithm of the threshold.
        alarms: numbers of the images with an alarm.
        name: name of the statistic.
        label: description of the chart for screen readers.
    """

    def draw(axes: Axes) -> None:
        kept = _thin_peaks(log10_values)
        axes.plot(images[kept], log10_values[kept], color=IN_DISTRIBUTION, label=name)
        axes.axhline(log10_threshold, color=_TEXT, linestyle="--", linewidth=1.2, label="threshold")
        # the first of alarms that are so close that their lines coincide: after a change there may be thousands
        _, shown = np.unique(np.searchsorted(images, alarms) * _CHART_POINTS // len(images), return_index=True)
        for number, image in enumerate(alarms[shown]):
            axes.axvline(image, color=OUT_OF_DISTRIBUTION, linewidth=1.2, label="" if number else "alarm")
        from matplotlib.ticker import MaxNLocator  # takes long to import, see the top of this module

        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{10.0**value:g}" if abs(value) < 5 else f"1e{value:+.0f}")
        axes.set(xlabel="image", ylabel=name)
        axes.margins(x=0.01)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.4)

    return _draw(draw, label)


def rate_chart(images: np.ndarray, windows: pd.DataFrame, alpha: float, label: str) -> Markup:
    """The rate of flagged images in a moving window with its interval, next to the range expected without a change.

    Args:
        images: number of each image, ascending.
        windows: columns `window_rate`, `window_low`, `window_high`, `expected_low` and `expected_high`, in order.
        alpha: the false-alarm rate of the calibration.
        label: description of the chart for screen readers.
    """

    def draw(axes: Axes) -> None:
        kept = np.unique(np.linspace(0, len(images) - 1, _CHART_POINTS).round().astype(int))
        x = images[kept]
        columns = {name: 100 * windows[name].to_numpy(dtype=float)[kept] for name in windows.columns}
        axes.fill_between(
            x, columns["expected_low"], columns["expected_high"], color=_GRID, alpha=0.6, linewidth=0,
            label="expected range (95 %)",
        )  # fmt: skip
        axes.fill_between(
            x, columns["window_low"], columns["window_high"], color=IN_DISTRIBUTION, alpha=0.25, linewidth=0,
            label="interval (95 %)",
        )  # fmt: skip
        axes.plot(x, columns["window_rate"], color=IN_DISTRIBUTION, label="flagged")
        axes.axhline(100 * alpha, color=_TEXT, linestyle="--", linewidth=1.2, label="alpha")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set(xlabel="image", ylabel="flagged images")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)

    return _draw(draw, label)


def _thin_peaks(values: np.ndarray) -> np.ndarray:
    """Indices of the highest and of the last value of each of few parts, so that no peak disappears."""
    if len(values) <= _CHART_POINTS:
        return np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), _CHART_POINTS // 2)
    return np.unique([index for part in parts for index in (part[np.argmax(values[part])], part[-1])])


def _label_log_axis(axis: Axis) -> None:
    """Label powers of ten, and 2 and 5 on a short axis, as plain numbers; matplotlib writes formulas by default."""
    low, high = axis.get_view_interval()
    minor_digits = "25" if low > 0 and high < 100 * low else ""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in minor_digits else "")


def _line_style(number: int) -> tuple[str, str]:
    """Color and dash pattern of a series; colors repeat with the next pattern."""
    dashes = ("-", "--", ":", "-.")[number // len(_SERIES) % 4]
    return _SERIES[number % len(_SERIES)], dashes


def _draw(draw: Callable[[Axes], None], label: str, width: float = 6.4, height: float = 2.7) -> Markup:
    """A figure in the pages' style, drawn by `draw` on its axes, as inline SVG with `label` for screen readers."""
    from matplotlib import rc_context  # takes long to import, see the top of this module
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        return _inline_svg(figure, label)


def _inline_svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    found = re.search(r'<svg [^>]*(viewBox="[^"]*")[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert found is not None
    view_box, body = found.groups()
    # comments repeat the texts, and the style element would apply to the whole page
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    # the font family is that of the page
    body = re.sub(r"font: ([\d.]+px) [^;]*;", r"font-size: \1;", body)
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for color, css in _CSS_COLORS.items():
        body = body.replace(color, css)
    body = re.sub(r"\s*\n\s*", " ", body)
    # charts on one page must not share the ids of clip paths and markers
    prefix = "c" + hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    return Markup(f'<svg class="chart" {view_box} role="img" aria-label="{escape(label)}">{body}</svg>')
