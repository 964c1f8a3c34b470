"""Readers of what Python callers hold: PIL images and torch Datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import SourceError, UnreadableImageError
from farout.data.decoding import from_pil, to_uint8, unreadable_errors
from farout.data.file_listing import Listing, encode_labels, index_keys

__all__ = ["list_dataset", "list_pil_images"]


class _Pictures:
    """Converts PIL images by position."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self._pictures = tuple(pictures)

    def __call__(self, index: int) -> Tensor:
        return _convert(self._pictures[index], str(index))


def list_pil_images(pictures: Sequence[object]) -> Listing:
    """Lists PIL images; raises SourceError when the sequence is empty or holds anything else."""
    if not pictures:
        raise SourceError("the list of images is empty; give at least one PIL image")
    wrong = next((i for i, picture in enumerate(pictures) if not isinstance(picture, Image.Image)), None)
    if wrong is not None:
        kind = type(pictures[wrong]).__name__
        raise SourceError(f"item {wrong} of the list is a {kind}, expected PIL images; stack tensors to (B, C, H, W)")
    return Listing(index_keys(len(pictures)), _Pictures([p for p in pictures if isinstance(p, Image.Image)]))


def _convert(image: object, key: str) -> Tensor:
    """One item as uint8 `(C, H, W)`; a wrong type or range is the caller's mistake, not an unreadable image."""
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


class _Items:
    """Reads the images of a torch Dataset by position."""

    def __init__(self, dataset: Dataset[Any], labelled: bool) -> None:
        self._dataset, self._labelled = dataset, labelled

    def __call__(self, index: int) -> Tensor:
        key = str(index)
        try:
            item = self._dataset[index]
        except (OSError, SyntaxError) as error:
            raise UnreadableImageError(f"{key}: {error} ({type(error).__name__})") from error
        return _convert(item[0] if self._labelled else item, key)


def list_dataset(dataset: Dataset[Any]) -> Listing:
    """Lists a torch Dataset of images, or of (image, label); its items must be the same at every access.

    Labels are taken from `targets` where the Dataset has it, otherwise all items are read once; numbers are called as
    its `classes` say, texts are names themselves. Raises SourceError for a Dataset without length or items, and for
    items of another kind.
    """
    if not hasattr(dataset, "__len__"):
        raise SourceError(f"{type(dataset).__name__} has no length; expected a Dataset with __len__ and __getitem__")
    count = len(dataset)
    if not count:
        raise SourceError(f"{type(dataset).__name__} is empty; give at least one image")
    labelled = isinstance(dataset[0], tuple | list)
    reader = _Items(dataset, labelled)
    reader(0)
    if not labelled:
        return Listing(index_keys(count), reader)
    labels, names = encode_labels(_targets(dataset, count), type(dataset).__name__)
    classes = getattr(dataset, "classes", None)
    if names is None and isinstance(classes, list | tuple):
        names = tuple(map(str, classes))
    return Listing(index_keys(count), reader, labels, names)


def _targets(dataset: Dataset[Any], count: int) -> list[object]:
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != count:
        targets = [dataset[i][1] for i in range(count)]
    return [value.item() if isinstance(value, Tensor | np.generic) else value for value in targets]
