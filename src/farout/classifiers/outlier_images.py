"""Synthetic outliers and reconstructions as training data, next to the images that a classifier learns."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core import progress, store
from farout.core.errors import FaroutError, MisleadingResultWarning, SourceError
from farout.core.names import find_path
from farout.data.classes import encode_classes
from farout.data.image_source import ImageSource
from farout.data.indices import require_readable_indices
from farout.data.preprocessing import Kernel, Preprocessing
from farout.data.sources import open_source, parse_source
from farout.training.data_order import DataOrder, num_items, seed_of

__all__ = [
    "ExposedImages",
    "OutlierImages",
    "Reconstructions",
    "Resize",
    "check_outliers",
    "find_paired_outliers",
    "open_outliers",
    "read_source_hashes",
    "read_source_keys",
]

Resize = Literal["both", "bilinear", "nearest", "bicubic"]
"""Interpolation of outliers that are larger than the images; `both` draws nearest or bilinear for each sample."""

Kind = Literal["outliers", "reconstructions"]
"""Kind of a folder of synthetic images, as in its `config.json`."""

_MEMORY_LIMIT = 2 * 2**30
"""Bytes of prepared outliers that are kept in memory; larger sets are prepared on access."""


def open_outliers(
    images: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    policy: Literal["raise", "skip"] = "raise",
    kind: Kind = "outliers",
) -> ImageSource:
    """Open any image source; for a folder written by a synthesizer or by `reconstruct`, its images.

    Under the policy `skip`, unreadable images are left out.

    Raises:
        SourceError: if there is no image, and for a folder of the other kind.
    """
    if isinstance(images, str | Path):
        folder = _synthetic_folder(images)
        found = None if folder is None else store.kind_of(folder)
        if found not in (None, kind):
            raise SourceError(f"{images} contains {found}, but {kind} are expected; have the two been exchanged?")
        if folder is not None and not (folder / "images").is_dir():
            raise SourceError(f"{images} contains no image yet; run the same command with --resume to generate them")
    # Decoded pixels are not cached: OutlierImages keeps the prepared ones, which are smaller.
    source = open_source(images, limit=limit, seed=seed, policy=policy, memory_mib=0)
    readable = require_readable_indices(source)
    return source if len(readable) == len(source) else source.subset(readable)


def _synthetic_folder(images: Any) -> Path | None:
    """The folder written by farout that a source names, directly or by its subfolder `images`; None for others."""
    if not isinstance(images, str | Path):
        return None
    spec = parse_source(images)
    path = find_path(spec.location)
    folders = (path, path.parent) if path.name == "images" else (path,)
    return next((each for each in folders if spec.kind == "path" and store.kind_of(each) in get_args(Kind)), None)


def _read_manifests(images: Any) -> list[dict[str, str]]:
    """The manifest of a folder of synthetic images; an interrupted run of several processes left one of each."""
    folder = _synthetic_folder(images)
    rows: list[dict[str, str]] = []
    for manifest in [] if folder is None else sorted(folder.glob("manifest*.csv")):
        with manifest.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def read_source_hashes(images: Any, source: ImageSource) -> tuple[str | None, ...]:
    """For each synthetic image, the content hash of the image that it was generated from, or None if unknown.

    Args:
        images: the folder of synthetic images.
        source: the images that `open_outliers` opened from it.
    """
    hashes = {row["key"]: row.get("source_hash") for row in _read_manifests(images)}
    return tuple(hashes.get(key) or None for key in source.keys)


def read_source_keys(images: Any) -> dict[str, str]:
    """The key of each outlier -> the key of the image that it was edited from.

    Raises:
        SourceError: for a folder without manifest, and for outliers that were not edited from images.
    """
    rows = _read_manifests(images)
    if not rows:
        raise SourceError(
            f"{images} does not say which image an outlier was edited from; give a folder that `farout synthesize` "
            "wrote, or leave the pairing out"
        )
    source_keys = {row["key"]: row["source"] for row in rows}
    if not all(source_keys.values()):
        raise SourceError(
            f"the outliers of {images} were not edited from single images (see its manifest); leave the pairing out"
        )
    return source_keys


def find_paired_outliers(keys: Sequence[str], outliers: ImageSource, source_keys: Mapping[str, str]) -> list[list[int]]:
    """For each image, given by its key, the indices of the outliers that were edited from it.

    Raises:
        FaroutError: if an image has no outlier.
    """
    indices: dict[str, list[int]] = {key: [] for key in keys}
    for index, outlier_key in enumerate(outliers.keys):
        if source_keys.get(outlier_key) in indices:
            indices[source_keys[outlier_key]].append(index)
    without_outlier = [key for key in indices if not indices[key]]
    if without_outlier:
        raise FaroutError(
            f"no outlier of {outliers.name} was edited from {len(without_outlier)} of the {len(keys)} images, such as "
            f"{without_outlier[0]}; generate more from the same source (--count, --resume), or leave the pairing out"
        )
    return [indices[key] for key in keys]


def check_outliers(outliers: ImageSource, hashes: Collection[str], preprocessing: Preprocessing) -> None:
    """Check outliers against the training images, given by their content hashes (as this preprocessing decodes them).

    Warns if the presence of color alone distinguishes outliers from images.

    Raises:
        FaroutError: if outliers are among the training images.
    """
    outliers = outliers.with_reduced_decoding(preprocessing.reduced_decoding)
    shared = frozenset(hashes).intersection(outliers.content_hashes())
    if shared:
        raise FaroutError(
            f"{len(shared)} images of {outliers.name} are among the training images, which cannot be in and out of "
            "the distribution; give other outliers"
        )
    shapes = outliers.shapes()
    gray = sum(count for (channels, _, _), count in shapes.items() if channels == 1)
    if preprocessing.channels == 1 and gray < shapes.total():
        warnings.warn(
            f"{shapes.total() - gray} of {shapes.total()} sampled outliers of {outliers.name} have color and become "
            "gray: they may differ in more than what they show",
            MisleadingResultWarning,
            stacklevel=3,
        )
    if preprocessing.channels == 3 and gray:
        warnings.warn(
            f"{gray} of {shapes.total()} sampled outliers of {outliers.name} are gray and become RGB: where the images "
            "have color, that alone distinguishes them",
            MisleadingResultWarning,
            stacklevel=3,
        )


class OutlierImages(Dataset[Tensor]):
    """Outliers for training: items are float32 (C, H, W) in [0, 1], with an interpolation drawn from torch's generator.

    The interpolation that brings outliers to the size of the images strongly affects what a classifier learns from them
    (nearest leaves aliasing, bilinear blurs), so the authors of NCIS draw one for each sample. It applies to outliers
    that are larger than the images; others are prepared like images. Sets that fit into memory are prepared once, with
    each interpolation.

    Args:
        source: the outliers.
        preprocessing: the classifier's preprocessing.
        resize: the interpolation, see `Resize`.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing, resize: Resize = "both") -> None:
        self.source, self.preprocessing = source, preprocessing
        self.kernels: tuple[Kernel, ...] = ("nearest", "bilinear") if resize == "both" else (resize,)
        self._prepared: Tensor | None = None
        shape = (len(source), len(self.kernels), preprocessing.channels, *preprocessing.size)
        if torch.Size(shape).numel() <= _MEMORY_LIMIT and preprocessing.scaling == "fixed":
            self._prepared = torch.empty(shape, dtype=torch.uint8)
            with progress.task(f"preparing {source.name}", len(source)) as bar:
                for index in range(len(source)):
                    image = source[index]
                    for number, kernel in enumerate(self.kernels):
                        self._prepared[index, number] = (preprocessing(image, kernel) * 255).round()
                    bar.advance()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        number = int(torch.randint(len(self.kernels), ()))
        if self._prepared is not None:
            return self._prepared[index, number].float() / 255
        return self.preprocessing(self.source[index], self.kernels[number])


class Reconstructions(Dataset[tuple[Tensor, Tensor]]):
    """Reconstructed images of the classes for training: items (image, label), the images prepared like outliers.

    Raises:
        SourceError: for images without labels, or of other classes.
    """

    def __init__(
        self, source: ImageSource, class_names: Sequence[str], preprocessing: Preprocessing, resize: Resize = "both"
    ) -> None:
        self.labels = encode_classes(source, class_names)
        self.images = OutlierImages(source, preprocessing, resize)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class ExposedImages(Dataset[tuple[Tensor, ...]]):
    """Labelled images, each with an outlier.

    The outliers come in random permutations, one after the other, so that each is seen as often as any other, however
    many there are. So do the reconstructions.

    Args:
        images: items (image, label).
        seed: seed of the permutations.
        outliers: the outliers; None: items remain (image, label).
        reconstructions: items (image, label) that replace images.
        reconstruction_fraction: the share of positions at which they do, drawn from torch's generator.
        paired_outliers: for each image, the indices of the outliers that it is paired with, in turn; None: with any.
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, Tensor]],
        seed: int,
        outliers: OutlierImages | None = None,
        reconstructions: Reconstructions | None = None,
        reconstruction_fraction: float = 0.0,
        paired_outliers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.images, self.outliers, self.reconstructions = images, outliers, reconstructions
        self.reconstruction_fraction, self.paired_outliers = reconstruction_fraction, paired_outliers
        self._outlier_order = None if outliers is None else DataOrder(len(outliers), seed_of(seed, "outliers"))
        self._reconstruction_order = (
            None if reconstructions is None else DataOrder(len(reconstructions), seed_of(seed, "reconstructions"))
        )

    def __len__(self) -> int:
        return num_items(self.images)

    def item_at(self, position: int, index: int) -> tuple[Tensor, ...]:
        """Image (C, H, W), label and, if there are outliers, outlier (C, H, W) at a position of the stream of items."""
        reconstructions, order = self.reconstructions, self._reconstruction_order
        if reconstructions is not None and order is not None and float(torch.rand(())) < self.reconstruction_fraction:
            item = reconstructions[order[position]]
        else:
            item = self.images[index]
        if self.outliers is None or self._outlier_order is None:
            return item
        if self.paired_outliers is None:
            return (*item, self.outliers[self._outlier_order[position]])
        epoch, paired_outliers = position // len(self), self.paired_outliers[index]
        return (*item, self.outliers[paired_outliers[epoch % len(paired_outliers)]])
