"""What a detector's AUROC costs: scatter plots on a logarithmic axis, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from farout.benchmark.page_data import Bench
from farout.evaluation.scored_datasets import OWN

__all__ = ["AREA", "Plot", "cost_table", "front", "plots"]

_COSTS = {"gmacs": ("GMACs per image", False), "images_per_s": ("images per second", True)}
"""Columns that are plotted: how they are called, and whether more is better."""
_FIGURES = ("nfe", "gmacs", "images_per_s", "peak_mib", "fit_s", "false_alarm")
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 24, 14, 42
AREA = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "foot": _HEIGHT - _BOTTOM}
"""Of a plot in pixels: its sides, and where its axes lie."""
_LETTER, _LINE = 6.4, 13.0
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Plot:
    """One scatter plot, in pixels of `AREA`.

    points: name, x, y, whether a control and whether on the front, the figures as text, and where its name stands
    (`label`: x, y and anchor; None where there is no room); front: a path; ticks of the axes: place and text; missing:
    names without a figure.
    """

    title: str
    axis: str
    points: list[dict[str, Any]]
    front: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    missing: list[str]


def cost_table(bench: Bench) -> pd.DataFrame:
    """Per detector, by its own score: means over sets and seeds of the figures of cost."""
    own = bench.metrics[bench.metrics["indicator"] == OWN]
    have = [name for name in _FIGURES if name in own and own[name].notna().any()]
    return own.groupby("detector", sort=False)[have].mean()


def plots(bench: Bench) -> list[Plot]:
    """AUROC of each group of sets against each cost."""
    own = bench.groups[bench.groups["indicator"] == OWN]
    costs = cost_table(bench)
    found = []
    for group, part in own.groupby("group", sort=False):
        area = part.groupby("detector", sort=False)["auroc"].mean()
        for column, (axis, more) in _COSTS.items():
            if column in costs and costs[column].notna().any():
                found.append(_plot(bench, f"{group or 'other'} sets", area, costs[column], axis, more))
    return found


def front(costs: np.ndarray, areas: np.ndarray, more: bool) -> np.ndarray:
    """Which points no other one beats: at least as good in both, better in one; bool, shape of both."""
    gain = costs if more else -costs
    as_good = (gain[None] >= gain[:, None]) & (areas[None] >= areas[:, None])
    better = (gain[None] > gain[:, None]) | (areas[None] > areas[:, None])
    return np.asarray(~np.any(as_good & better, axis=1))


def _plot(bench: Bench, title: str, area: pd.Series, cost: pd.Series, axis: str, more: bool) -> Plot:
    table = pd.DataFrame({"area": area, "cost": cost.reindex(area.index)})
    good = table[table["area"].notna() & table["cost"].notna() & (table["cost"] >= 0)]
    costs, areas = good["cost"].to_numpy(dtype=float), good["area"].to_numpy(dtype=float)
    x_of, x_ticks = _cost_axis(costs)
    y_of, y_ticks = _area_axis(areas)
    best = front(costs, areas, more) if len(good) else np.zeros(0, dtype=bool)
    points = [
        {
            "name": str(name),
            "x": round(x_of(one), 1),
            "y": round(y_of(other), 1),
            "control": bench.is_control(str(name)),
            "front": bool(kept),
            "text": f"{name}: AUROC {other:.3f}, {one:.3g} {axis}",
        }
        for name, one, other, kept in zip(good.index, costs, areas, best)
    ]
    line = _front_line(points, more)
    _label(points, line)
    missing = [str(name) for name in table.index.difference(good.index, sort=False)]
    return Plot(title, axis, points, "M" + "L".join(f"{x:g} {y:g}" for x, y in line), x_ticks, y_ticks, missing)


def _cost_axis(costs: np.ndarray) -> tuple[Any, list[tuple[float, str]]]:
    """Powers of ten from left to right; what costs nothing stands apart on the left."""
    some = costs[costs > 0]
    low, high = (math.floor(math.log10(some.min())), math.ceil(math.log10(some.max()) + 1e-9)) if len(some) else (0, 1)
    high = max(high, low + 1)
    start = _LEFT + (34 if (costs == 0).any() else 8)
    unit = (_WIDTH - _RIGHT - start) / (high - low)
    step = max(1, math.ceil((high - low) / 6))
    ticks = [(round(start + unit * (power - low), 1), _power(power)) for power in range(low, high + 1, step)]
    zero = [(_LEFT + 10.0, "0")] if (costs == 0).any() else []
    return lambda value: start + unit * (math.log10(value) - low) if value > 0 else _LEFT + 10.0, zero + ticks


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -4 < power < 6 else f"1e{power}"


def _area_axis(areas: np.ndarray) -> tuple[Any, list[tuple[float, str]]]:
    """From a round figure below the smallest area to 1."""
    low = max(0.0, math.floor(10 * (areas.min() - 0.02)) / 10) if len(areas) else 0.0
    low = min(low, 0.9)
    unit = (_HEIGHT - _TOP - _BOTTOM) / (1 - low)
    step = 0.02 if 1 - low < 0.15 else 0.1 if 1 - low < 0.65 else 0.2
    values = [low + step * number for number in range(round((1 - low) / step) + 1)]
    ticks = [(round(_TOP + unit * (1 - value), 1), f"{value:.2g}") for value in values if value <= 1 + 1e-9]
    return lambda area: _TOP + unit * (1 - area), ticks


def _front_line(points: Sequence[dict[str, Any]], more: bool) -> list[tuple[float, float]]:
    """Corners of the steps through the points of the front: what one gets for at most (at least) so much."""
    chosen = sorted((point["x"], point["y"]) for point in points if point["front"])
    line = chosen[:1]
    for x, y in chosen[1:]:
        line += [(line[-1][0], y) if more else (x, line[-1][1]), (x, y)]
    return line


def _line_boxes(line: Sequence[tuple[float, float]]) -> list[Box]:
    """What the pieces of a line of steps cover."""
    pairs = pairwise(line)
    return [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairs]


def _label(points: list[dict[str, Any]], line: Sequence[tuple[float, float]]) -> None:
    """Gives every point a place for its name where there is room; those on the front choose first."""
    taken: list[Box] = [(p["x"] - 5, p["y"] - 5, p["x"] + 5, p["y"] + 5) for p in points] + _line_boxes(line)
    for point in sorted(points, key=lambda point: (not point["front"], point["control"])):
        point["label"] = None
        for x, y, anchor in _places(point["x"], point["y"]):
            box = _box(x, y, anchor, len(point["name"]) * _LETTER)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                point["label"] = (round(x, 1), round(y, 1), anchor)
                taken.append(box)
                break


def _places(x: float, y: float) -> list[tuple[float, float, str]]:
    """Right, left, above, below, and further off in the same directions: baselines and anchors."""
    near = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle")]
    slant = [(x + s * 8, y + 4 + d, "start" if s > 0 else "end") for d in (-10, 10, -18, 18) for s in (1, -1)]
    return near + slant


def _box(x: float, y: float, anchor: str, width: float) -> Box:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - _LINE + 3, left + width, y + 3


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
