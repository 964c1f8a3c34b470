"""HTML page of scored images: histogram against calibration, flagged images, and the images with the highest scores."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from farout.core import store
from farout.core.config import flatten_config
from farout.core.profiling import timed
from farout.data.batching import iterate_batches
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.calibration import flag_outliers, score_threshold
from farout.detectors.score_summary import HighestScores, ScoreSummary
from farout.report.charts import score_histogram
from farout.report.heat_colors import colorize, normalize_map
from farout.report.reference_images import has_embedding, highest_calibration_images, nearest_normal_images
from farout.report.rendering import png_data_url, render_template
from farout.report.thumbnails import SourceImages

__all__ = ["LISTED_ROWS", "write_score_page"]

LISTED_ROWS = 500
"""Maximum number of rows in the tables of flagged and selected, and of unreadable images."""


@timed("page")
def write_score_page(
    detector: Detector,
    source: ImageSource,
    summary: ScoreSummary,
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
        summary: summary of the scores, which keeps at least `LISTED_ROWS` and `top_images` rows; their measurements are
            read from `measurements.parquet` in `out`, if it exists, where the summary contains none.
        manifest: counts and settings of the run.
        out: folder of the page.
        top_images: number of images shown, those with the highest scores.

    Returns:
        Path of the page.
    """
    calibration, threshold = summary.calibration, score_threshold(summary.calibration, detector.alpha)
    false_discovery_rate = manifest["fdr"]
    largest_selected = 0.0 if false_discovery_rate is None else summary.benjamini_hochberg(false_discovery_rate)
    is_flagged = flag_outliers(summary.p_values, detector.alpha)
    is_selected = summary.p_values <= largest_selected
    highest, shown = summary.top(LISTED_ROWS), summary.top(top_images)
    images = SourceImages(hub=False, reading=detector.reading_of_fit)
    html = render_template(
        "score_page.html",
        manifest=manifest,
        detector_folder=detector.loaded_from,
        settings=_format_settings({**manifest["about"], "versions": manifest["environments"][0]["versions"]}),
        score_name=detector.score_name,
        scored=summary.scored,
        threshold=threshold if np.isfinite(threshold) else None,
        expected_flags=detector.alpha * summary.scored,
        smallest_p=1 / (len(calibration) + 1),
        chart=score_histogram(
            {
                f"{len(calibration)} calibration images": calibration,
                f"{summary.scored} scored images": summary.histogram,
            },
            threshold,
            "Histogram of the scores of calibration and scored images",
        ),
        heat_maps=detector.heat_maps,
        false_discovery_rate=false_discovery_rate,
        listed_count=int(summary.p_value_counts[is_flagged | is_selected].sum()),
        selected_count=int(summary.p_value_counts[is_selected].sum()),
        # the flagged and the selected images are those with the highest scores
        listed=[row for row in _rows(highest, calibration, largest_selected) if row["is_ood"] or row["selected"]],
        shown=_rows(shown, calibration, largest_selected),
        pictures=_pictures(detector, source.subset(shown.indices)),
        neighbors=nearest_normal_images(detector, _measurements_of(detector, shown, out), images),
        calibration_images=highest_calibration_images(detector, images),
        unreadable=dict(islice(manifest["unreadable"].items(), LISTED_ROWS)),
    )
    with store.atomic_file(out / "page.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "page.html"


def _rows(highest: HighestScores, calibration: np.ndarray, largest_selected: float) -> list[dict[str, Any]]:
    """What the page shows of each image."""
    scores = highest.scores
    columns = {
        "key": scores.keys,
        "score": scores.score.tolist(),
        "p_value": scores.p_value.tolist(),
        "is_ood": scores.is_ood.tolist(),
        "selected": (scores.p_value <= largest_selected).tolist(),
        "calibration_below": np.searchsorted(calibration, scores.score).tolist(),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _measurements_of(detector: Detector, highest: HighestScores, out: Path) -> Measurements:
    """The measurements of the images, in their order, without those that are not known; empty if not needed."""
    keys = highest.scores.keys
    if not keys or not has_embedding(detector):
        return Measurements(())
    if highest.scores.measurements is not None:
        return highest.scores.measurements
    if not (out / "measurements.parquet").is_file():
        return Measurements(())
    measurements = Measurements.read_parquet(out / "measurements.parquet", keys)
    rows = {key: row for row, key in enumerate(measurements.keys)}
    return measurements.select([rows[key] for key in keys if key in rows])


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


def _pictures(detector: Detector, images: ImageSource) -> dict[str, dict[str, str]]:
    """By key, data URLs by caption: the image, the pictures of its measurements that are shown, and its map."""
    heat_maps = detector.heat_maps
    pictures: dict[str, dict[str, str]] = {}
    for batch in iterate_batches(images, detector.preprocessing, detector.batch_size):
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
