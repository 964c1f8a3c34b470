"""Readers of Python objects: arrays, lists of PIL images and torch Datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.names import encode_name
from farout.data.decoding import DecodedImage, from_pil, to_uint8, unreadable_errors
from farout.data.file_listing import Listing, encode_labels, index_keys

__all__ = ["list_array", "list_dataset", "list_pil_images"]


class _PILReader:
    """Converts PIL images by index."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self._pictures = tuple(pictures)

    def __call__(self, index: int) -> DecodedImage:
        return DecodedImage(_to_pixels(self._pictures[index], str(index)))


def list_pil_images(pictures: Sequence[object]) -> Listing:
    """List PIL images; raises SourceError if the sequence is empty or contains anything else."""
    if not pictures:
        raise SourceError("the list of images is empty; give at least one PIL image")
    wrong = next((i for i, picture in enumerate(pictures) if not isinstance(picture, Image.Image)), None)
    if wrong is not None:
        kind = type(pictures[wrong]).__name__
        raise SourceError(f"item {wrong} of the list is a {kind}, expected PIL images; stack tensors to (B, C, H, W)")
    return Listing(index_keys(len(pictures)), _PILReader([p for p in pictures if isinstance(p, Image.Image)]))


def _to_pixels(image: object, key: str) -> Tensor:
    """Convert one item to uint8 (C, H, W); a wrong type or range is a SourceError, not an unreadable image."""
    if isinstance(image, Image.Image):
        with unreadable_errors(key):
            return from_pil(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
    if not isinstance(image, Tensor):
        raise SourceError(f"item {key} is a {type(image).__name__}, expected a tensor or PIL image, or (image, label)")
    if image.ndim != 3:
        raise SourceError(f"item {key} has shape {tuple(image.shape)}, expected (C, H, W)")
    return to_uint8(image.detach().cpu(), f"item {key}")


class _DatasetReader:
    """Reads the images of a torch Dataset by index."""

    def __init__(self, dataset: Dataset[Any], labelled: bool) -> None:
        self._dataset, self._labelled = dataset, labelled

    def __call__(self, index: int) -> DecodedImage:
        key = str(index)
        try:
            item = self._dataset[index]
        except (OSError, SyntaxError) as error:
            raise UnreadableImageError(f"{key}: {error} ({type(error).__name__})") from error
        return DecodedImage(_to_pixels(item[0] if self._labelled else item, key))


def list_dataset(dataset: Dataset[Any]) -> Listing:
    """List a torch Dataset of images, or of pairs (image, label). Its items must be the same at every access.

    Labels come from the attribute `targets` of the Dataset if it has one; otherwise all items are read once. The names
    of integer labels come from its attribute `classes`; texts are class names themselves. Raises SourceError for a
    Dataset without length or items, and for items of another type.
    """
    if not hasattr(dataset, "__len__"):
        raise SourceError(f"{type(dataset).__name__} has no length; expected a Dataset with __len__ and __getitem__")
    count = len(dataset)
    if not count:
        raise SourceError(f"{type(dataset).__name__} is empty; give at least one image")
    labelled = isinstance(dataset[0], tuple | list)
    reader = _DatasetReader(dataset, labelled)
    reader(0)
    if not labelled:
        return Listing(index_keys(count), reader)
    labels, names = encode_labels(_read_targets(dataset, count), type(dataset).__name__)
    classes = getattr(dataset, "classes", None)
    if names is None and isinstance(classes, list | tuple):
        names = tuple(encode_name(str(name)) for name in classes)
    return Listing(index_keys(count), reader, labels, names)


def _read_targets(dataset: Dataset[Any], count: int) -> list[object]:
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != count:
        targets = [dataset[i][1] for i in range(count)]
    return [value.item() if isinstance(value, Tensor | np.generic) else value for value in targets]


def list_array(images: np.ndarray | Tensor, labels: Sequence[object] | None = None, where: str = "images") -> Listing:
    """List pixels (B, C, H, W) in memory: uint8, or floats in [0, 1], which are rounded to 8 bits."""
    tensor = images.detach().cpu() if isinstance(images, Tensor) else _from_numpy(images, where)
    if tensor.ndim != 4:
        hint = "; add the channel: images[:, None]" if tensor.ndim == 3 else ""
        raise SourceError(f"{where} have shape {tuple(tensor.shape)}, expected (B, C, H, W){hint}")
    if not len(tensor):
        raise SourceError(f"{where} are empty: shape {tuple(tensor.shape)}; give at least one image")
    pixels = to_uint8(tensor, where)
    if labels is not None and len(labels) != len(pixels):
        raise SourceError(
            f"{where} contain {len(pixels)} images and {len(labels)} labels; expected one label per image"
        )
    codes, names = (None, None) if labels is None else encode_labels(labels, where)
    return Listing(index_keys(len(pixels)), _ArrayReader(pixels), codes, names, in_memory=True)


class _ArrayReader:
    """Returns images of a batch in memory by index."""

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels

    def __call__(self, index: int) -> DecodedImage:
        return DecodedImage(self._pixels[index])


def _from_numpy(images: np.ndarray, where: str) -> Tensor:
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise SourceError(f"{where} have type {images.dtype}, expected uint8 or floats in [0, 1]; convert them first")
    return torch.from_numpy(np.ascontiguousarray(images))
