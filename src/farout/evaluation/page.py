"""The page of a scored folder: the scores against calibration, and the furthest images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from farout import store
from farout.calibration import threshold
from farout.detectors.base import Detector
from farout.evaluation.heat import MapScale
from farout.evaluation.rendering import render
from farout.images.sources import Batch, ImageSource, batches

__all__ = ["png_address", "write_page"]

_BINS = 48


def write_page(
    detector: Detector, source: ImageSource, frame: pd.DataFrame, manifest: dict[str, Any], out: Path
) -> Path:
    """Writes `page.html`: one file, no outside request. Returns its path.

    Args:
        detector: what the images were scored with.
        source: the scored images.
        frame: the table of `scores.csv`.
        manifest: counts and settings; `furthest` images are shown.
        out: folder of the page.
    """
    ranked = frame[frame["status"] == "ok"].sort_values(["score", "key"], ascending=[False, True])
    calibration = detector.calibration_scores[detector.score_name]
    limit = threshold(calibration, detector.alpha)
    html = render(
        "page.html",
        manifest=manifest,
        about={**manifest["about"], "versions": manifest["versions"]},
        score_name=detector.score_name,
        scored=len(ranked),
        histogram=_histogram(calibration, ranked["score"].to_numpy(dtype=float), limit),
        maps=MapScale.of(detector) if detector.makes_maps else None,
        cards=_cards(detector, source, ranked.head(manifest["furthest"])),
    )
    with store.atomic_file(out / "page.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "page.html"


def _histogram(calibration: np.ndarray, scores: np.ndarray, limit: float) -> dict[str, Any]:
    """Bars of two distributions over one axis, heights as percent of the tallest; one more bar gathers what is above.

    `mark`: where the score lies beyond which images are flagged, as percent of the axis; None where nothing can be.
    """
    everything = np.concatenate([calibration, scores])
    low = float(everything.min())
    high = float(max(np.quantile(everything, 0.98), calibration.max()))
    edges = np.linspace(low, high if high > low else low + 1, _BINS)
    edges[-1] += 1e-9 * (edges[-1] - low)  # the largest calibration score lies below the last bar
    edges = np.append(edges, 2 * edges[-1] - edges[-2])
    shares = {}
    for name, values in (("calibration", calibration), ("scored", scores)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        shares[name] = counts / max(1, len(values))
    tallest = max(share.max() for share in shares.values())
    bars = {name: [round(100 * float(share) / tallest, 2) for share in values] for name, values in shares.items()}
    place = 100 * (limit - edges[0]) / (edges[-1] - edges[0])
    return {
        "low": f"{edges[0]:.3g}",
        "high": f"{edges[-1]:.3g}",
        "above": bool(everything.max() > edges[-1]),
        "bars": bars,
        "width": round(100 / _BINS, 4),
        "mark": round(float(place), 2) if np.isfinite(place) else None,
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
    return torch.from_numpy(colormaps["magma"](scale.share(values).numpy())[..., :3]).permute(2, 0, 1)


def png_address(image: Tensor) -> str:
    """A data address of an image (C, H, W) in [0, 1]."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
