"""How far outliers are from the images that they were made of: what a classifier takes them for, and their colours."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core import store
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import batches
from farout.data.classes import class_name
from farout.data.image_source import ImageSource
from farout.synthesis.base import OutlierFolder
from farout.synthesis.generator_check import class_places

__all__ = ["colour_similarity", "is_made_of_images", "rate_outliers", "summed_up", "write_quality"]

_BINS, _PARTS = 16, 4


def is_made_of_images(outliers: OutlierFolder) -> bool:
    """Whether the manifest names the image of every outlier."""
    return outliers.images > 0 and bool((outliers.manifest()["source"] != "").all())


def colour_similarity(one: Tensor, two: Tensor) -> Tensor:
    """The share of two images' pixels that fall into the same of 16 steps of value, wherever they are: the intersection
    of their histograms, a mean over channels. 1 for the same colours, 0 for none in common.

    one, two: (B, C, H, W) in [0, 1], of the same size -> (B,).
    """
    counts = []
    for images in (one, two):
        bins = (images.flatten(2) * _BINS).long().clamp(0, _BINS - 1)
        counts.append(torch.zeros(*bins.shape[:2], _BINS).scatter_add_(2, bins, torch.ones(bins.shape)))
    return torch.minimum(*counts).sum(2).mean(1) / one[0, 0].numel()


def rate_outliers(
    outliers: OutlierFolder, source: ImageSource, classifier: Classifier, runtime: Runtime | None = None
) -> pd.DataFrame:
    """A row per outlier: key, source, class_name, `level` where the manifest tells it, source_probability (that it is
    of its image's class, as the classifier sees it), is_source (that this class is the most probable one) and
    colour_similarity.

    Good outliers have left their class and kept their colours: with more noise the first should fall soon, the second
    late.

    Args:
        outliers: a folder whose manifest names the image of each.
        source: these images.
        classifier: of their classes.
        runtime: how it is run; None: `Runtime()`.

    Raises FaroutError for a classifier that lacks a class.
    """
    runtime = (runtime or Runtime()).resolved()
    manifest = outliers.manifest().set_index("key")
    there = {class_name(source, label) for label in set(source.labels or ())}
    names = [name for name in outliers.settings()["class_names"] if name in there]
    columns = dict(zip(names, class_places(classifier, names), strict=True))
    places, prepare = {key: place for place, key in enumerate(source.keys)}, classifier.preprocessing
    rows: list[dict[str, Any]] = []
    with task("evaluating outliers", outliers.images) as bar:
        size = runtime.images_per_batch((prepare.channels, *prepare.size))
        for batch in batches(outliers.source(), prepare, size, workers=runtime.workers):
            found = manifest.loc[list(batch.keys)]
            chances = classifier.outputs(batch.images, runtime.batch_size).logits.softmax(1).cpu()
            own = torch.tensor([columns[name] for name in found["class_name"]])
            originals = torch.stack([prepare(source[places[key]]) for key in found["source"]])
            told = {
                "key": batch.keys,
                "source": found["source"],
                "class_name": found["class_name"],
                **({"level": found["level"]} if "level" in found else {}),
                "source_probability": chances.gather(1, own[:, None])[:, 0].tolist(),
                "is_source": (chances.argmax(1) == own).tolist(),
                "colour_similarity": colour_similarity(batch.images, originals).tolist(),
            }
            rows += [dict(zip(told, values, strict=True)) for values in zip(*told.values(), strict=True)]
            bar.advance(len(batch.keys))
    return pd.DataFrame(rows)


def write_quality(rated: pd.DataFrame | None, outliers: OutlierFolder) -> None:
    """Writes `quality.csv` into the folder; None: there is none, and that of an earlier run goes."""
    path = outliers.folder / "quality.csv"
    if rated is None:
        path.unlink(missing_ok=True)
        return
    with store.atomic_file(path) as temporary:
        rated.to_csv(temporary, index=False)


def summed_up(rated: pd.DataFrame) -> list[dict[str, Any]]:
    """Of all outliers and, where their levels are known, of each quarter of the levels: levels (text), outliers, the
    share still of their image's class (`is_source`), the mean `colour_similarity`.
    """
    parts = [("all", rated)]
    if "level" in rated:
        quarter = (rated["level"].astype(float) * _PARTS).clip(upper=_PARTS - 1e-9).astype(int)
        parts += [(f"{n / _PARTS:g} to {(n + 1) / _PARTS:g}", rated[quarter == n]) for n in range(_PARTS)]
    return [
        {
            "levels": levels,
            "outliers": len(some),
            "is_source": float(some["is_source"].mean()),
            "colour_similarity": float(some["colour_similarity"].mean()),
        }
        for levels, some in parts
        if len(some)
    ]
