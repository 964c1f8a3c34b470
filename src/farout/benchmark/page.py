"""The page of a benchmark: leaderboard, ROC curves, cost, and the images on which detectors disagree or are wrong."""

from __future__ import annotations

from pathlib import Path

from farout.benchmark.page_charts import draw_cost_charts, draw_roc_charts, mean_costs
from farout.benchmark.page_images import find_disagreements, make_galleries
from farout.benchmark.page_leaderboard import (
    METRIC_TITLES,
    explain_markers,
    list_columns,
    list_rows,
)
from farout.benchmark.results_folder import read_results
from farout.core import store
from farout.report.rendering import render_template
from farout.report.thumbnails import SourceImages, ThumbnailSet

__all__ = ["write_benchmark_page"]

_THUMBNAIL_BYTES = 2_000_000
"""Encoded size of all thumbnails together."""


def write_benchmark_page(folder: Path) -> Path:
    """Write `page.html` into the folder of a benchmark and return its path; the page loads nothing from outside.

    The folder contains `metrics.csv` (a row per detector, indicator, out-of-distribution source and seed, with `bench`
    and `marker`), `groups.csv` (means per detector, indicator and group), `bench.yaml`, `provenance.json`, and the
    score folders of each detector and seed, `evaluations/<detector>-<seed>/scores/<source>/`. Curves and images are
    those of each detector's first seed; a detector without score folders is in the tables only. Images are read again
    from the sources that the score folders name; if a source is not available, the keys of its images are shown.

    Raises:
        StoreError: if one of the four files is missing or incomplete.
    """
    results = read_results(folder)
    images, thumbnails = SourceImages(hub=True), ThumbnailSet(_THUMBNAIL_BYTES)
    columns = list_columns(results)
    rows = list_rows(results, columns)
    costs = mean_costs(results)
    html = render_template(
        "bench.html",
        results=results,
        columns=columns,
        rows=rows,
        metrics=METRIC_TITLES,
        marker_meanings=explain_markers(results),
        roc_charts=draw_roc_charts(results),
        cost_charts=draw_cost_charts(results),
        costs=[
            {
                "detector": row.detector,
                "is_baseline": row.is_baseline,
                "values": {name: float(costs[name][row.detector]) for name in costs.columns},
            }
            for row in rows
            if row.is_own_score
        ],
        disagreements=find_disagreements(results, images, thumbnails),
        galleries=make_galleries(results, images, thumbnails),
        thumbnails=thumbnails.urls,
        thumbnails_full=thumbnails.is_full,
        missing=images.missing,
    )
    path = folder / "page.html"
    with store.atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path
