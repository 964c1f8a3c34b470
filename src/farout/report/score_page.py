"""The page of a scored folder: the scores against calibration, what is flagged, and the furthest images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from farout.core import store
from farout.data.batching import Batch, batches
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector
from farout.detectors.calibration import benjamini_hochberg, threshold
from farout.report.charts import score_histogram
from farout.report.heat_colors import MapScale, colorize
from farout.report.neighbors import highest_good, nearest_good
from farout.report.rendering import png_address, render
from farout.report.thumbnails import SourceImages

__all__ = ["write_page"]

_LISTED = 500
"""Flagged images in the page's table."""


def write_page(
    detector: Detector, source: ImageSource, frame: pd.DataFrame, manifest: dict[str, Any], out: Path
) -> Path:
    """Writes `page.html`: one file, no outside request. Returns its path.

    Good images stand beside the scored ones where the sources that the detector was fitted and calibrated with can be
    opened again.

    Args:
        detector: what the images were scored with.
        source: the scored images.
        frame: the table of `scores.csv`.
        manifest: counts and settings; `furthest` images are shown.
        out: folder of the page, which holds `measurements.parquet`.
    """
    ranked = frame[frame["status"] == "ok"].sort_values(["score", "key"], ascending=[False, True])
    calibration = detector.calibration_scores[detector.score_name]
    limit = threshold(calibration, detector.alpha)
    rate = detector.alpha if manifest["fdr"] is None else manifest["fdr"]
    ranked = ranked.assign(
        selected=benjamini_hochberg(ranked["p_value"], rate),
        beyond=np.searchsorted(calibration, ranked["score"].to_numpy(dtype=float)) / len(calibration),
    )
    images, shown = SourceImages(hub=False), ranked.head(manifest["furthest"])
    html = render(
        "page.html",
        manifest=manifest,
        about={**manifest["about"], "versions": manifest["versions"]},
        score_name=detector.score_name,
        scored=len(ranked),
        threshold=limit if np.isfinite(limit) else None,
        smallest=1 / (len(calibration) + 1),
        chart=score_histogram(
            {
                f"{len(calibration)} calibration images": calibration,
                f"{len(ranked)} scored images": ranked["score"].to_numpy(dtype=float),
            },
            limit,
            "Histogram of the scores of calibration and scored images",
        ),
        maps=MapScale.of(detector) if detector.makes_maps else None,
        flagged=_flagged(ranked, rate),
        cards=_cards(detector, source, shown),
        nearest=nearest_good(detector, out / "measurements.parquet", shown["key"].tolist(), images),
        good=highest_good(detector, images),
    )
    with store.atomic_file(out / "page.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "page.html"


def _flagged(ranked: pd.DataFrame, rate: float) -> dict[str, Any]:
    """Images that are flagged or selected: their count, how many are selected at which false discovery rate, and the
    rows of the first.
    """
    rows = ranked[ranked["is_ood"].eq(True) | ranked["selected"]]
    return {
        "count": len(rows),
        "selected": int(rows["selected"].sum()),
        "rate": rate,
        "rows": rows.head(_LISTED).to_dict("records"),
    }


def _cards(detector: Detector, source: ImageSource, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per image: its numbers and pictures."""
    if rows.empty:
        return []
    places = {key: place for place, key in enumerate(source.keys)}
    some = source.subset([places[key] for key in rows["key"]])
    pictures: dict[str, dict[str, str]] = {}
    for batch in batches(some, detector.preprocessing, detector.batch_size):
        pictures |= dict(zip(batch.keys, _pictures(detector, batch), strict=True))
    return [{**row, "pictures": pictures[str(row["key"])]} for row in rows.to_dict("records")]


def _pictures(detector: Detector, batch: Batch) -> list[dict[str, str]]:
    """Data addresses by caption, of each image: the image, all pictures of its measurements that are to be shown, and
    the map.
    """
    found = [{"image": png_address(image)} for image in batch.images]
    if not detector.makes_maps:
        return found
    measured, scale = detector.measure(batch, maps=True), MapScale.of(detector)
    for name, pictures in measured.pictures.items():
        if not name.startswith("_"):
            for entry, picture in zip(found, pictures, strict=True):
                entry[name] = png_address(_heat(picture[0], scale) if name in detector.map_pictures else picture)
    if measured.maps is not None:
        for entry, values in zip(found, measured.maps, strict=True):
            entry["map"] = png_address(_heat(values, scale))
    return found


def _heat(values: Tensor, scale: MapScale) -> Tensor:
    """(H, W) -> (3, H, W)."""
    return torch.from_numpy(colorize(scale.share(values).numpy(), "magma")).permute(2, 0, 1)
