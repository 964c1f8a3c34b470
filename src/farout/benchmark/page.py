"""The page of a benchmark: who leads, at what cost, and on which images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from farout.benchmark.page_costs import AREA, cost_table, plots
from farout.benchmark.page_curves import curves
from farout.benchmark.page_data import Bench, read_bench
from farout.benchmark.page_images import disagreements, galleries
from farout.benchmark.page_table import METRICS, Row, columns, indicators, marker_notes, rows
from farout.core import store
from farout.evaluation.scored_datasets import OWN
from farout.report.rendering import render_template
from farout.report.thumbnails import SourceImages, ThumbnailSet

__all__ = ["write_bench_page"]

_PICTURES = 2_000_000
"""Bytes of all thumbnails together, encoded."""


def write_bench_page(folder: Path) -> Path:
    """Writes `page.html` into the folder of a benchmark: one file that asks nothing of the outside. Returns its path.

    The folder holds `metrics.csv` (a row per detector, indicator, out-of-distribution source and seed, with `bench`
    and `marker`), `groups.csv` (means per detector, indicator and group), `bench.yaml`, `provenance.json`, and the
    score folders of each detector and seed as `rated/<detector>-<seed>/scores/<source>/`. Curves and images are of
    each detector's first seed; without its score folders a detector stands in the tables alone. Images are opened
    again from the sources that the score folders name; where these are not at hand, keys stand for them.

    Raises:
        StoreError: where one of the four files is missing or lacks what is wanted of it.
    """
    bench = read_bench(Path(folder))
    images, thumbnails = SourceImages(hub=True), ThumbnailSet(_PICTURES)
    wanted = columns(bench)
    board = rows(bench, wanted)
    html = render_template(
        "bench.html",
        bench=bench,
        columns=wanted,
        rows=board,
        indicators=indicators(bench),
        metrics=METRICS,
        notes=marker_notes(bench),
        names=[run.detector for run in bench.runs],
        plots=plots(bench),
        area=AREA,
        costs=_costs(cost_table(bench), board),
        disputes=disagreements(bench, images, thumbnails),
        galleries=galleries(bench, images, thumbnails),
        pictures=thumbnails.urls,
        full=thumbnails.is_full,
        missing=images.missing,
        **_curves(bench, board),
    )
    path = Path(folder) / "page.html"
    with store.atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _curves(bench: Bench, board: list[Row]) -> dict[str, Any]:
    """All curves, and which of them is shown at first: the leading detector that is no control, on the first set."""
    found = curves(bench)
    leaders = [row.detector for row in sorted(board, key=lambda row: row.control) if row.own]
    names = [run.detector for run in bench.runs]
    order = [names.index(name) for name in leaders]
    first = next(((run, pair) for run in order for pair, one in enumerate(found[run]) if one is not None), None)
    return {"curves": found, "first": first}


def _costs(table: pd.DataFrame, board: list[Row]) -> list[dict[str, Any]]:
    """Rows of the table of costs as text, in the order of the leaderboard."""
    leaders = [row for row in board if row.indicator == OWN]
    return [
        {
            "detector": row.detector,
            "control": row.control,
            "figures": {str(name): _text(value) for name, value in table.loc[row.detector].items()},
        }
        for row in leaders
    ]


def _text(value: float) -> str:
    """Three digits, or a whole number."""
    if pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
