"""Quality of outliers that were edited from images: do they still show their class, and do they keep its colors?"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core.csv_files import write_csv
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import PreparedImages, iterate_batches
from farout.data.classes import class_name
from farout.data.image_source import ImageSource
from farout.synthesis.generated_folder import OutlierFolder
from farout.synthesis.generator_check import classifier_indices

__all__ = ["color_similarity", "has_source_images", "measure_quality", "summarize_quality", "write_quality"]

_BINS, _LEVEL_RANGES = 16, 4


def has_source_images(outliers: OutlierFolder) -> bool:
    """Whether the manifest names the source image of every outlier."""
    return outliers.images > 0 and bool((outliers.manifest()["source"] != "").all())


def color_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Intersection of the two images' histograms of 16 bins per channel, averaged over the channels.

    1 for images with the same values in any arrangement, 0 for images without a common bin.

    first, second: (B, C, H, W) in [0, 1], of the same size -> (B,).
    """
    histograms = []
    for images in (first, second):
        bins = (images.flatten(2) * _BINS).long().clamp(0, _BINS - 1)
        histograms.append(torch.zeros(*bins.shape[:2], _BINS).scatter_add_(2, bins, torch.ones(bins.shape)))
    return torch.minimum(*histograms).sum(2).mean(1) / first[0, 0].numel()


def measure_quality(
    outliers: OutlierFolder, source: ImageSource, classifier: Classifier, runtime: Runtime | None = None
) -> pd.DataFrame:
    """Compare every outlier with its source image.

    The table has the columns key, source, class_name, `level` if the manifest has it, source_class_probability (the
    classifier's probability of the class of the source image), is_source_class (whether this class is the most
    probable one) and color_similarity. A good outlier no longer shows the class and keeps the colors: as the noise
    level increases, the first should decrease soon, the second late.

    Args:
        outliers: a folder whose manifest names the source image of each outlier.
        source: the source images.
        classifier: a classifier of their classes.
        runtime: device, precision and batch size; None: `Runtime()`.

    Raises FaroutError if the classifier lacks a class.
    """
    runtime = (runtime or Runtime()).resolve_auto()
    manifest = outliers.manifest().set_index("key")
    present = {class_name(source, label) for label in set(source.labels or ())}
    names = [name for name in outliers.settings()["class_names"] if name in present]
    class_indices = dict(zip(names, classifier_indices(classifier, names), strict=True))
    source_indices = {key: index for index, key in enumerate(source.keys)}
    preprocessing = classifier.preprocessing
    prepared = PreparedImages(source, preprocessing)
    parts: list[pd.DataFrame] = []
    with task("evaluating outliers", outliers.images) as bar:
        size = runtime.images_per_batch((preprocessing.channels, *preprocessing.size))
        for batch in iterate_batches(outliers.source(), preprocessing, size, workers=runtime.workers):
            rows = manifest.loc[list(batch.keys)]
            probabilities = classifier.outputs(batch.images, runtime.batch_size).logits.softmax(1).cpu()
            own_class = torch.tensor([class_indices[name] for name in rows["class_name"]])
            originals = torch.stack([prepared[source_indices[key]] for key in rows["source"]])
            columns: dict[str, Any] = {
                "key": list(batch.keys),
                "source": rows["source"].tolist(),
                "class_name": rows["class_name"].tolist(),
                **({"level": rows["level"].tolist()} if "level" in rows else {}),
                "source_class_probability": probabilities.gather(1, own_class[:, None])[:, 0].tolist(),
                "is_source_class": (probabilities.argmax(1) == own_class).tolist(),
                "color_similarity": color_similarity(batch.images, originals).tolist(),
            }
            parts.append(pd.DataFrame(columns))
            bar.advance(len(batch.keys))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def write_quality(quality: pd.DataFrame | None, outliers: OutlierFolder) -> None:
    """Write `quality.csv` into the folder; None: remove that of an earlier run."""
    path = outliers.folder / "quality.csv"
    if quality is None:
        path.unlink(missing_ok=True)
        return
    write_csv(quality, path)


def summarize_quality(quality: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over all outliers and, if the levels are known, over each quarter of the noise levels.

    Each entry has `levels` (text), `outliers` (their number), and the means of `is_source_class` and
    `color_similarity`.
    """
    groups = [("all", quality)]
    if "level" in quality:
        quarter = (quality["level"].astype(float) * _LEVEL_RANGES).clip(upper=_LEVEL_RANGES - 1e-9).astype(int)
        groups += [
            (f"{n / _LEVEL_RANGES:g} to {(n + 1) / _LEVEL_RANGES:g}", quality[quarter == n])
            for n in range(_LEVEL_RANGES)
        ]
    return [
        {
            "levels": levels,
            "outliers": len(rows),
            "is_source_class": float(rows["is_source_class"].mean()),
            "color_similarity": float(rows["color_similarity"].mean()),
        }
        for levels, rows in groups
        if len(rows)
    ]
