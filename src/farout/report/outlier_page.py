"""A page of outliers: beside images of their classes, beside those that they were made of, and how far out they lie."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from farout.core import store
from farout.core.errors import UnreadableImageError
from farout.data.classes import class_name
from farout.data.image_source import ImageSource
from farout.report.charts import distance_histogram
from farout.report.rendering import data_address, png_address, render
from farout.synthesis.base import OutlierFolder
from farout.synthesis.dream_ood.alignment import has_aligned, read_aligned
from farout.synthesis.dream_ood.boundary_folder import read_drawn
from farout.synthesis.editing.base import REGIONS
from farout.synthesis.ncis.inversion import read_embeddings
from farout.synthesis.ncis.manifold import Manifold
from farout.synthesis.quality import has_source_images, summarize_quality

__all__ = ["write_outlier_page"]

_CLASSES, _IMAGES, _OUTLIERS, _PAIRS = 20, 4, 8, 24


def write_outlier_page(outliers: OutlierFolder, source: ImageSource, rated: pd.DataFrame | None = None) -> Path:
    """Writes `page.html` into a folder of outliers, one file without outside requests, of what its stages have left.

    Args:
        outliers: the folder, after any stage.
        source: the images that the outliers were made of.
        rated: see `measure_quality`.
    """
    settings = outliers.settings()
    text = render(
        "outliers.html",
        settings=settings,
        config=settings["config"],
        images=outliers.images,
        embedding=_embedding(outliers.folder / "embeddings"),
        alignment=_alignment(outliers.folder / "align"),
        distances=_distances(outliers.folder),
        quality=None if rated is None else summarize_quality(rated),
        pairs=_pairs(outliers, source) if has_source_images(outliers) else [],
        classes=_classes(outliers, source) if outliers.images else [],
        versions=store.versions(),
    )
    path = outliers.folder / "page.html"
    with store.atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _classes(outliers: OutlierFolder, source: ImageSource) -> list[dict[str, Any]]:
    """Of the first classes that have outliers: name, some images and some outliers."""
    made, known = outliers.source(), dict[str, list[int]]()
    for place, label in enumerate(source.labels or ()):
        known.setdefault(class_name(source, label), []).append(place)
    places = {key: place for place, key in enumerate(made.keys)}
    rows = outliers.manifest().groupby("class_name")["key"]
    return [
        {"name": name, "images": _some(source, known[name], _IMAGES), "outliers": _some(made, found, _OUTLIERS)}
        for name, found in [(str(name), [places[key] for key in keys]) for name, keys in rows][:_CLASSES]
    ]


def _pairs(outliers: OutlierFolder, source: ImageSource) -> list[dict[str, Any]]:
    """Of the first outliers: the row of the manifest, and addresses of the image, the outlier and the regions."""
    made, rows = outliers.source(), outliers.manifest().head(_PAIRS)
    places = {key: place for place, key in enumerate(source.keys)}
    outs = {key: place for place, key in enumerate(made.keys)}
    return [
        {
            "row": row,
            "image": _some(source, [places[str(row["source"])]], 1)[0],
            "outlier": _some(made, [outs[str(row["key"])]], 1)[0],
            "regions": _file_address(outliers.folder / REGIONS / f"{row['index']:06d}.png"),
        }
        for row in rows.to_dict("records")
    ]


def _file_address(path: Path) -> str | None:
    """The data address of a PNG file, where there is one."""
    return data_address(path.read_bytes()) if path.is_file() else None


def _some(source: ImageSource, places: list[int], count: int) -> list[str]:
    """Addresses of the first images that can be read."""
    found: list[str] = []
    for place in places:
        if len(found) == count:
            break
        with suppress(UnreadableImageError):
            found.append(png_address(source[place]))
    return found


def _embedding(folder: Path) -> dict[str, Any] | None:
    """How the loss went down, the mean over images before the first and the last step."""
    if not folder.is_dir():
        return None
    found = read_embeddings(folder)
    if not len(found):
        return None
    mean = found.losses.mean(0)
    return {"count": len(found), "first": float(mean[0]), "last": float(mean[-1]), "steps": len(mean)}


def _alignment(folder: Path) -> dict[str, Any] | None:
    """How many images became directions, and the share of them that lie nearest to their own class's vector."""
    if not has_aligned(folder):
        return None
    found = read_aligned(folder)
    return {"count": len(found.told), "told": float(found.told.float().mean())}


def _distances(folder: Path) -> dict[str, Any] | None:
    """Medians of the distances of drawn and known vectors, and a picture of all."""
    if (folder / "manifold").is_dir():
        sets, axis = _on_manifold(folder), "squared distance from the class, per dimension"
    elif (folder / "drawn").is_dir():
        sets, axis = _beyond_boundaries(folder), "distance to the k-th nearest image of the class"
    else:
        return None
    sets = {name.replace("_", " "): values for name, values in sets.items()}
    return {
        "medians": {name: float(np.median(values)) for name, values in sets.items()},
        "chart": distance_histogram(sets, axis, "Histogram of the distances of known and sampled vectors"),
        "drawn": "drawn" in sets,
    }


def _on_manifold(folder: Path) -> dict[str, np.ndarray]:
    sets = {name: values.numpy() for name, values in Manifold.load(folder / "manifold").known.items() if len(values)}
    drawn = folder / "drawn.safetensors"
    return {**sets, "drawn": store.load_tensors(drawn)["distance"].numpy()} if drawn.is_file() else sets


def _beyond_boundaries(folder: Path) -> dict[str, np.ndarray]:
    classes = list(read_drawn(folder / "drawn").values())
    sides = {"training": "known", "drawn": "distance"}
    return {side: np.concatenate([each[name].numpy() for each in classes]) for side, name in sides.items()}
