"""Folders of outliers, and of reconstructed images, beside the images that a classifier learns."""

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
from farout.core.errors import FaroutError, SourceError, TrapWarning
from farout.data.classes import class_numbers
from farout.data.image_source import ImageSource
from farout.data.indices import some_readable
from farout.data.preprocessing import Kernel, Preprocessing
from farout.data.sources import open_source, spec_of
from farout.training.data_order import DataOrder, seed_of

__all__ = [
    "ExposedImages",
    "OutlierImages",
    "Reconstructions",
    "Resize",
    "check_outliers",
    "open_outliers",
    "originals",
    "partners_of",
    "read_made_of",
]

Resize = Literal["both", "bilinear", "nearest", "bicubic"]
"""Kernel of outliers that are larger than the images: `both` draws nearest or bilinear for each sample."""

Kind = Literal["outliers", "reconstructions"]
"""Of folders of made images, as `config.json` calls them."""

_BUDGET = 2 * 2**30
"""Bytes of prepared outliers that are kept in memory; of more, each is prepared when it is asked for."""


def open_outliers(
    images: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    policy: Literal["raise", "skip"] = "raise",
    kind: Kind = "outliers",
) -> ImageSource:
    """Opens any image source; of a folder as a synthesizer or `reconstruct` writes it the `images` are meant.

    Under the policy `skip` unreadable images are left out. Raises SourceError where there is no image, and for a folder
    that says to hold the other kind.
    """
    if isinstance(images, str | Path):
        _check_kind(images, kind)
    # decoded pixels are not kept: what is kept are the prepared ones, which are smaller
    source = open_source(images, limit=limit, seed=seed, policy=policy, memory_mib=0)
    places = some_readable(source)
    return source if len(places) == len(source) else source.subset(places)


def _made_folder(images: str | Path) -> Path | None:
    """The folder of made images that a source is, or is the `images` of, whatever filter or variant it has."""
    spec = spec_of(images)
    path = Path(spec.location).expanduser()
    folders = (path, path.parent) if path.name == "images" else (path,)
    return next((each for each in folders if spec.kind == "path" and store.kind_of(each) in get_args(Kind)), None)


def _check_kind(images: str | Path, kind: Kind) -> None:
    """Refuses a folder of outliers as reconstructions, the reverse, and one whose images have not been made yet."""
    folder = _made_folder(images)
    found = None if folder is None else store.kind_of(folder)
    if found not in (None, kind):
        raise SourceError(f"{images} holds {found}, and {kind} are wanted; have the two been exchanged?")
    if folder is not None and not (folder / "images").is_dir():
        raise SourceError(f"{images} holds no image yet; run the same command with --resume to generate them")


def _rows(folder: Path) -> list[dict[str, str]]:
    """Of a folder that several processes were filling when they were stopped, each has left a manifest."""
    rows = []
    for manifest in sorted(folder.glob("manifest*.csv")):
        with manifest.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def originals(images: str | Path, source: ImageSource) -> tuple[str | None, ...]:
    """The content hash of the image that each of `source` was made of, as the manifest of the folder says that
    `open_outliers` opened as `source`; None where it says nothing, or there is none.
    """
    folder = _made_folder(images)
    told = {row["key"]: row.get("source_hash") for row in (_rows(folder) if folder is not None else [])}
    return tuple(told.get(key) or None for key in source.keys)


def read_made_of(images: str | Path) -> dict[str, str]:
    """Key of each outlier -> key of the image that it was made of, of a folder as a synthesizer writes it.

    Raises SourceError for another folder, and for outliers that were made of no image.
    """
    folder = _made_folder(images)
    rows = _rows(folder) if folder is not None else []
    if not rows:
        raise SourceError(
            f"{images} does not say which image an outlier was edited from; give a folder that `farout synthesize` "
            "wrote, "
            "or leave the pairing out"
        )
    found = {row["key"]: row["source"] for row in rows}
    if not all(found.values()):
        raise SourceError(
            f"the outliers of {images} were not edited from single images (see its manifest); leave the pairing out"
        )
    return found


def partners_of(keys: Sequence[str], outliers: ImageSource, made_of: Mapping[str, str]) -> list[list[int]]:
    """Of each image, by key, the places of the outliers that were made of it.

    Raises FaroutError where there is none for some image.
    """
    found: dict[str, list[int]] = {key: [] for key in keys}
    for place, key in enumerate(outliers.keys):
        if made_of.get(key) in found:
            found[made_of[key]].append(place)
    alone = [key for key, places in found.items() if not places]
    if alone:
        raise FaroutError(
            f"no outlier of {outliers.name} was edited from {len(alone)} of the {len(keys)} images, such as "
            f"{alone[0]}; "
            "generate more from the same source (--count, --resume), or leave the pairing out"
        )
    return [found[key] for key in keys]


def check_outliers(outliers: ImageSource, hashes: Collection[str], preprocessing: Preprocessing) -> None:
    """Raises FaroutError where outliers are among the images with these content hashes; warns where colour alone tells
    them apart.
    """
    same = frozenset(hashes).intersection(outliers.content_hashes())
    if same:
        raise FaroutError(
            f"{len(same)} images of {outliers.name} are among the training images, which cannot be in and out of "
            "the distribution; give other outliers"
        )
    shapes = outliers.shapes()
    grey = sum(count for (channels, _, _), count in shapes.items() if channels == 1)
    if preprocessing.channels == 1 and grey < shapes.total():
        warnings.warn(
            f"{shapes.total() - grey} of {shapes.total()} sampled outliers of {outliers.name} have colour and become "
            "grey: they may differ in more than what they show",
            TrapWarning,
            stacklevel=3,
        )
    if preprocessing.channels == 3 and grey:
        warnings.warn(
            f"{grey} of {shapes.total()} sampled outliers of {outliers.name} are grey and become RGB: where the images "
            "have colour, that alone distinguishes them",
            TrapWarning,
            stacklevel=3,
        )


class OutlierImages(Dataset[Tensor]):
    """Outliers for training: item i is float32 (C, H, W) in [0, 1], its kernel drawn from torch's generator.

    The kernel that brings outliers to the size of the images decides much of what a classifier learns of them (nearest
    leaves aliasing, bilinear blurs), so the NCIS authors draw one for each sample. It is used where an outlier is
    larger; smaller ones, and those of one size with the images, are prepared as images are. What fits into memory is
    prepared once, with every kernel.

    Args:
        source: the outliers.
        preprocessing: the classifier's.
        resize: the kernel, see `Resize`.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing, resize: Resize = "both") -> None:
        self.source, self.preprocessing = source, preprocessing
        self.kernels: tuple[Kernel, ...] = ("nearest", "bilinear") if resize == "both" else (resize,)
        self._kept: Tensor | None = None
        shape = (len(source), len(self.kernels), preprocessing.channels, *preprocessing.size)
        if torch.Size(shape).numel() <= _BUDGET and preprocessing.value_range == "fixed":
            self._kept = self._all(shape)

    def _all(self, shape: tuple[int, ...]) -> Tensor:
        kept = torch.empty(shape, dtype=torch.uint8)
        with progress.task(f"preparing {self.source.name}", len(self.source)) as bar:
            for index in range(len(self.source)):
                image = self.source[index]
                for place, kernel in enumerate(self.kernels):
                    kept[index, place] = (self.preprocessing(image, kernel) * 255).round()
                bar.advance()
        return kept

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        place = int(torch.randint(len(self.kernels), ()))
        if self._kept is not None:
            return self._kept[index, place].float() / 255
        return self.preprocessing(self.source[index], self.kernels[place])


class Reconstructions(Dataset[tuple[Tensor, Tensor]]):
    """Images of the classes that a generator has made again: prepared as outliers are, each with its class's number.

    Raises SourceError for images without labels, or of other classes.
    """

    def __init__(
        self, source: ImageSource, names: Sequence[str], preprocessing: Preprocessing, resize: Resize = "both"
    ) -> None:
        self.numbers = class_numbers(source, names)
        self.images = OutlierImages(source, preprocessing, resize)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.numbers[index]


class ExposedImages(Dataset[tuple[Tensor, ...]]):
    """Labelled images, each with an outlier: at every position of the stream of images stands the next outlier.

    Outliers run in permutations laid end to end, however many there are: each is seen as often as any other. So do
    reconstructions.

    Args:
        images: items (image, class number).
        seed: of the orders.
        outliers: None: items stay pairs.
        reconstructions: items (image, class number) that take the place of images.
        reconstructed: at this share of the positions, drawn from torch's generator.
        partners: of each image, the places of the outliers that it is seen with, in turn; None: with any.
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, Tensor]],
        seed: int,
        outliers: OutlierImages | None = None,
        reconstructions: Reconstructions | None = None,
        reconstructed: float = 0.0,
        partners: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.images, self.partners = images, partners
        self.outliers = None if outliers is None else _Stream(outliers, seed_of(seed, "outliers"))
        again = None if reconstructions is None else _Stream(reconstructions, seed_of(seed, "reconstructions"))
        self.reconstructions, self.reconstructed = again, reconstructed

    def __len__(self) -> int:
        return len(self.images)

    def at(self, position: int, index: int) -> tuple[Tensor, ...]:
        """Image (C, H, W), class number and, where there are any, outlier (C, H, W) at a position of the stream."""
        again = self.reconstructions is not None and float(torch.rand(())) < self.reconstructed
        item = self.reconstructions[position] if again and self.reconstructions is not None else self.images[index]
        if self.outliers is None:
            return item
        if self.partners is None:
            return (*item, self.outliers[position])
        partners = self.partners[index]
        return (*item, self.outliers.data[partners[position // len(self) % len(partners)]])


class _Stream:
    """A data set over and over, each time in another order."""

    def __init__(self, data: OutlierImages | Reconstructions, seed: int) -> None:
        self.data, self.order = data, DataOrder(len(data), seed)

    def __getitem__(self, position: int) -> Any:
        return self.data[self.order[position]]
