"""HTML page of a monitoring: the statistic that raises alarms, and the rate of flagged images, over time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from farout.core import store
from farout.report.charts import evidence_chart, rate_chart
from farout.report.rendering import render_template

__all__ = ["write_monitor_page"]

_LISTED_WINDOWS, _LISTED_ALARMS = 200, 100
_RATES = ["window_rate", "window_low", "window_high", "expected_low", "expected_high"]


def write_monitor_page(decisions: pd.DataFrame, windows: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Write the page, one file without requests to other hosts.

    Args:
        decisions: table of `monitor.csv`.
        windows: one row per window, without overlap: `first`, `last`, `key`, `flagged`, `rate` with its interval `low`
            to `high`, `is_high` and `alarms`.
        summary: content of `monitor.json`.
        path: the file to write.
    """
    settings, alarms = summary["settings"], summary["alarms"]
    statistic = settings["statistic"]
    name = {"martingale": "martingale", "shiryaev-roberts": "Shiryaev-Roberts"}[statistic]
    scored = decisions[decisions["p_value"].notna()].reset_index(drop=True)
    images = np.arange(1, len(scored) + 1)
    evidence = evidence_chart(
        images,
        scored[f"log10_{statistic.replace('-', '_')}"].to_numpy(dtype=float),
        math.log10(settings["threshold"]),
        np.array([alarm["image"] for alarm in alarms]),
        name,
        f"{name} of {len(scored)} images over time",
    )
    # rates of few images at the beginning would determine the axis; a stream may be shorter than a window
    fewest = min(settings["window"], -(-len(scored) // 2))
    in_chart = (scored["window_images"] >= fewest).to_numpy(dtype=bool)
    label = f"rate of flagged images in windows of {settings['window']} images"
    html = render_template(
        "monitor_page.html",
        summary=summary,
        settings=settings,
        statistic=name,
        evidence=evidence,
        rates=rate_chart(images[in_chart], scored.loc[in_chart, _RATES], settings["alpha"], label),
        window_count=len(windows),
        windows=windows.tail(_LISTED_WINDOWS)[::-1].to_dict("records"),
        alarms=alarms[::-1][:_LISTED_ALARMS],
    )
    with store.atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
