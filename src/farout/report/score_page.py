"""HTML page of scored images: histogram against calibration, flagged images, and the images with the highest scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from farout.core import store
from farout.core.config import flatten_config
from farout.data.batching import iterate_batches
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector
from farout.detectors.calibration import benjamini_hochberg, score_threshold
from farout.report.charts import score_histogram
from farout.report.heat_colors import colorize, normalize_map
from farout.report.reference_images import highest_calibration_images, nearest_normal_images
from farout.report.rendering import png_data_url, render_template
from farout.report.thumbnails import SourceImages

__all__ = ["write_score_page"]

_LISTED_ROWS = 500
"""Maximum number of rows in the table of flagged and selected images."""


def write_score_page(
    detector: Detector,
    source: ImageSource,
    frame: pd.DataFrame,
    manifest: dict[str, Any],
    out: Path,
    *,
    top_images: int,
) -> Path:
    """Write `page.html`, one file without requests to other hosts.

    Normal images are shown for comparison if the sources that the detector was fitted and calibrated with can still
    be opened.

    Args:
        detector: detector that computed the scores.
        source: the scored images.
        frame: table of `scores.csv`.
        manifest: counts and settings of the run.
        out: folder of the page; contains `measurements.parquet`.
        top_images: number of images shown, those with the highest scores.

    Returns:
        Path of the page.
    """
    ranked = frame[frame["status"] == "ok"].sort_values(["score", "key"], ascending=[False, True])
    scores = ranked["score"].to_numpy(dtype=float)
    calibration = detector.calibration_scores[detector.score_name]
    threshold = score_threshold(calibration, detector.alpha)
    false_discovery_rate = manifest["fdr"]
    is_selected = np.zeros(len(ranked), dtype=bool)
    if false_discovery_rate is not None:
        is_selected = benjamini_hochberg(ranked["p_value"], false_discovery_rate)
    ranked = ranked.assign(selected=is_selected, calibration_below=np.searchsorted(calibration, scores))
    listed = ranked[ranked["is_ood"].eq(True) | ranked["selected"]]
    images, shown = SourceImages(hub=False, reading=detector.reading_of_fit), ranked.head(top_images)
    html = render_template(
        "score_page.html",
        manifest=manifest,
        detector_folder=detector.loaded_from,
        settings=_format_settings({**manifest["about"], "versions": manifest["versions"]}),
        score_name=detector.score_name,
        scored=len(ranked),
        threshold=threshold if np.isfinite(threshold) else None,
        expected_flags=detector.alpha * len(ranked),
        smallest_p=1 / (len(calibration) + 1),
        chart=score_histogram(
            {f"{len(calibration)} calibration images": calibration, f"{len(ranked)} scored images": scores},
            threshold,
            "Histogram of the scores of calibration and scored images",
        ),
        heat_maps=detector.heat_maps,
        false_discovery_rate=false_discovery_rate,
        listed_count=len(listed),
        selected_count=int(is_selected.sum()),
        listed=listed.head(_LISTED_ROWS).to_dict("records"),
        shown=shown.to_dict("records"),
        pictures=_pictures(detector, source, shown["key"].tolist()),
        neighbors=nearest_normal_images(detector, out / "measurements.parquet", shown["key"].tolist(), images),
        calibration_images=highest_calibration_images(detector, images),
    )
    with store.atomic_file(out / "page.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "page.html"


def _format_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Each setting in YAML; None and empty values are left out. The same for a manifest that was read from JSON."""

    def drop_empty(value: Any) -> Any:
        if isinstance(value, dict):
            parts = {name: drop_empty(part) for name, part in flatten_config(value).items()}
            return {name: part for name, part in parts.items() if part not in (None, "", {}, [])}
        return [drop_empty(part) for part in value] if isinstance(value, list | tuple) else value

    def format_value(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
        return text.removesuffix("...\n").strip()  # YAML ends a document that is one number with dots

    return {
        name: "\n".join(f"{key}: {format_value(part)}" for key, part in value.items())
        if isinstance(value, dict)
        else format_value(value)
        for name, value in drop_empty(settings).items()
    }


def _pictures(detector: Detector, source: ImageSource, keys: list[str]) -> dict[str, dict[str, str]]:
    """By key, data URLs by caption: the image, the pictures of its measurements that are shown, and its map."""
    if not keys:
        return {}
    index_of, heat_maps = {key: index for index, key in enumerate(source.keys)}, detector.heat_maps
    selected = source.subset([index_of[key] for key in keys])
    pictures: dict[str, dict[str, str]] = {}
    for batch in iterate_batches(selected, detector.preprocessing, detector.batch_size):
        shown = {"image": batch.images}
        if heat_maps is not None:
            measured = detector.measure(batch, maps=True)
            for name, values in measured.pictures.items():
                is_map = name in heat_maps.pictures
                shown[name] = _color_map(values[:, 0], heat_maps.maximum) if is_map else values
            if measured.maps is not None:
                shown["map"] = _color_map(measured.maps, heat_maps.maximum)
        for row, key in enumerate(batch.keys):
            pictures[key] = {caption: png_data_url(values[row]) for caption, values in shown.items()}
    return pictures


def _color_map(values: torch.Tensor, maximum: float) -> torch.Tensor:
    """Maps (B, H, W) as colors (B, 3, H, W)."""
    return torch.from_numpy(colorize(normalize_map(values, maximum).numpy(), "magma")).movedim(-1, 1)
