"""Class names of a source, its labels as indices 0 to K - 1, and images with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import FaroutError, SourceError
from farout.core.names import find_path
from farout.data.batching import PreparedImages
from farout.data.image_source import ImageSource

__all__ = [
    "LabelledImages",
    "check_no_class_is_empty",
    "class_name",
    "class_names_of",
    "encode_classes",
    "labelled_fingerprint",
    "present_class_names",
]


def present_class_names(source: ImageSource) -> tuple[str, ...]:
    """Return the names of the classes that occur in `source`, ordered by label; empty if it has no labels."""
    return tuple(class_name(source, label) for label in sorted(set(source.labels or ())))


def class_names_of(source: ImageSource) -> tuple[str, ...]:
    """Return the class names for a network that is trained to distinguish classes.

    Raises SourceError if the source has no labels, or only one class.
    """
    _require_labels(source)
    names = present_class_names(source)
    if len(names) < 2:
        raise SourceError(
            f"all images of {source.name} are of one class ({', '.join(names)}); two or more are required"
        )
    return names


def encode_classes(source: ImageSource, names: Sequence[str]) -> Tensor:
    """Return the class of each image of `source` as an index into `names`, int64 (N,).

    Raises SourceError if the source has no labels, or a class that is not in `names`.
    """
    index_of = {name: index for index, name in enumerate(names)}
    classes = [class_name(source, label) for label in _require_labels(source)]
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise SourceError(
            f"{source.name} has images of {', '.join(unknown)}, but the classes are {', '.join(names)}; leave them out "
            "(@classes=…)"
        )
    return torch.tensor([index_of[name] for name in classes], dtype=torch.int64)


def labelled_fingerprint(source: ImageSource, names: Sequence[str], numbers: Tensor) -> str:
    """Return a hash of images and class indices (from `encode_classes`): a training resumes only with the same."""
    text = repr((source.fingerprint(), tuple(names), numbers.tolist()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_no_class_is_empty(numbers: Tensor, names: Sequence[str]) -> None:
    """Raise FaroutError if a class has no training image; `numbers` are the class indices of the training images."""
    empty = [name for index, name in enumerate(names) if not bool((numbers == index).any())]
    if empty:
        raise FaroutError(
            f"no image is left to train the class {', '.join(empty)} on; give more images of it, "
            "or hold out fewer (--statistics 20)"
        )


def _require_labels(source: ImageSource) -> tuple[int, ...]:
    if source.labels is None:
        outside = [key for key in source.keys if "/" not in key]
        if 0 < len(outside) < len(source.keys) and find_path(source.name).is_dir():
            raise SourceError(
                f"{source.name} has class folders, and {len(outside)} images in none of them (first: {outside[0]}); "
                "move them into the folders of their classes"
            )
        raise SourceError(
            f"{source.name} has no labels, which training classes requires; give a class-per-folder tree or a table "
            "with labels (a diffusion model can also be trained without classes)"
        )
    return source.labels


def class_name(source: ImageSource, label: int) -> str:
    """Return the name of a label of `source`; the label as a text if it has no name."""
    names = source.class_names or ()
    return str(names[label]) if 0 <= label < len(names) else str(label)


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Prepared images with class indices, for training."""

    def __init__(self, images: PreparedImages, numbers: Tensor) -> None:
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.numbers[index]
