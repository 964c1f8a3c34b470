"""HTML page of a folder of synthetic outliers: samples next to images of their classes, distances, and quality."""

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
from farout.report.rendering import data_url, png_data_url, render_template
from farout.synthesis.base import OutlierFolder
from farout.synthesis.dream_ood.alignment import has_aligned_images, read_aligned_images
from farout.synthesis.dream_ood.boundary import read_samples
from farout.synthesis.editing.base import REGIONS
from farout.synthesis.ncis.inversion import read_embeddings
from farout.synthesis.ncis.manifold import Manifold
from farout.synthesis.quality import has_source_images, summarize_quality

__all__ = ["write_outlier_page"]

_CLASSES, _IMAGES_PER_CLASS, _OUTLIERS_PER_CLASS, _PAIRS = 20, 4, 8, 24


def write_outlier_page(outliers: OutlierFolder, source: ImageSource, quality: pd.DataFrame | None = None) -> Path:
    """Write `page.html` into a folder of outliers, one file without requests to other hosts.

    Args:
        outliers: the folder, after any stage; the page shows what the finished stages have written.
        source: the in-distribution images.
        quality: result of `measure_quality`; None: no section on quality.

    Returns:
        Path of the page.
    """
    settings = outliers.settings()
    text = render_template(
        "outlier_page.html",
        settings=settings,
        config=settings["config"],
        images=outliers.images,
        embedding=_embedding_losses(outliers.folder / "embeddings"),
        alignment=_alignment_accuracy(outliers.folder / "align"),
        distances=_distances(outliers.folder),
        quality=None if quality is None else summarize_quality(quality),
        pairs=_source_outlier_pairs(outliers, source) if has_source_images(outliers) else [],
        classes=_samples_by_class(outliers, source) if outliers.images else [],
        versions=store.versions(),
    )
    path = outliers.folder / "page.html"
    with store.atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _samples_by_class(outliers: OutlierFolder, source: ImageSource) -> list[dict[str, Any]]:
    """Name, images and outliers of the first classes that have outliers."""
    image_indices: dict[str, list[int]] = {}
    for index, label in enumerate(source.labels or ()):
        image_indices.setdefault(class_name(source, label), []).append(index)
    outlier_images = outliers.source()
    index_of = {key: index for index, key in enumerate(outlier_images.keys)}
    return [
        {
            "name": str(name),
            "images": _first_pictures(source, image_indices[str(name)], _IMAGES_PER_CLASS),
            "outliers": _first_pictures(outlier_images, [index_of[key] for key in keys], _OUTLIERS_PER_CLASS),
        }
        for name, keys in list(outliers.manifest().groupby("class_name")["key"])[:_CLASSES]
    ]


def _source_outlier_pairs(outliers: OutlierFolder, source: ImageSource) -> list[dict[str, Any]]:
    """Manifest row and data URLs of the source image, the outlier and the edited regions of the first outliers."""
    outlier_images = outliers.source()
    source_index = {key: index for index, key in enumerate(source.keys)}
    outlier_index = {key: index for index, key in enumerate(outlier_images.keys)}
    pairs = []
    for row in outliers.manifest().head(_PAIRS).to_dict("records"):
        regions = outliers.folder / REGIONS / f"{row['index']:06d}.png"
        pairs.append(
            {
                "row": row,
                "image": _first_pictures(source, [source_index[str(row["source"])]], 1)[0],
                "outlier": _first_pictures(outlier_images, [outlier_index[str(row["key"])]], 1)[0],
                "regions": data_url(regions.read_bytes()) if regions.is_file() else None,
            }
        )
    return pairs


def _first_pictures(source: ImageSource, indices: list[int], count: int) -> list[str]:
    """Data URLs of the first `count` readable images."""
    urls: list[str] = []
    for index in indices:
        if len(urls) == count:
            break
        with suppress(UnreadableImageError):
            urls.append(png_data_url(source[index]))
    return urls


def _embedding_losses(folder: Path) -> dict[str, Any] | None:
    """Mean loss over the embedded images before the first and before the last step."""
    if not folder.is_dir():
        return None
    embeddings = read_embeddings(folder)
    if not len(embeddings):
        return None
    losses = embeddings.losses.mean(0)
    return {"count": len(embeddings), "first": float(losses[0]), "last": float(losses[-1]), "steps": len(losses)}


def _alignment_accuracy(folder: Path) -> dict[str, Any] | None:
    """Number of aligned images, and the share whose nearest class vector is that of their own class."""
    if not has_aligned_images(folder):
        return None
    correct = read_aligned_images(folder).is_correct
    return {"count": len(correct), "accuracy": float(correct.float().mean())}


def _distances(folder: Path) -> dict[str, Any] | None:
    """Medians and histogram of the distances of known vectors and of vectors sampled as outliers."""
    if (folder / "manifold").is_dir():  # NCIS
        axis = "squared distance from the class, per dimension"
        known = Manifold.load(folder / "manifold").reference_distances
        distances = {name.replace("_", " "): values.numpy() for name, values in known.items() if len(values)}
        if (folder / "samples.safetensors").is_file():
            distances["sampled"] = store.load_tensors(folder / "samples.safetensors")["distance"].numpy()
    elif (folder / "samples").is_dir():  # Dream-OOD
        axis = "distance to the k-th nearest image of the class"
        classes = list(read_samples(folder / "samples").values())
        distances = {
            name: np.concatenate([tensors[column].numpy() for tensors in classes])
            for name, column in (("training", "class_distances"), ("sampled", "distance"))
        }
    else:
        return None
    return {
        "medians": {name: float(np.median(values)) for name, values in distances.items()},
        "chart": distance_histogram(distances, axis, "Histogram of the distances of known and sampled vectors"),
    }
