"""Labels of a source as numbers 0 to K - 1, and images together with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import FaroutError, SourceError
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
    """Names of the classes that occur in `source`, in the order of their labels; none where there are no labels."""
    return tuple(class_name(source, label) for label in sorted(set(source.labels or ())))


def class_names_of(source: ImageSource) -> tuple[str, ...]:
    """`names_of` for what learns to tell classes apart; raises SourceError where there are no labels, or one class."""
    _labels(source)
    names = present_class_names(source)
    if len(names) < 2:
        raise SourceError(
            f"all images of {source.name} are of one class ({', '.join(names)}); classes require two or more"
        )
    return names


def encode_classes(source: ImageSource, names: Sequence[str]) -> Tensor:
    """The class of each image of `source` as its position in `names`, int64 (N,).

    Raises SourceError where there are no labels, or a class that is not among the names.
    """
    place = {name: number for number, name in enumerate(names)}
    found = [class_name(source, label) for label in _labels(source)]
    strange = sorted({name for name in found if name not in place})
    if strange:
        raise SourceError(
            f"{source.name} has images of {', '.join(strange)}, but the classes are {', '.join(names)}; leave them out "
            "(@classes=…)"
        )
    return torch.tensor([place[name] for name in found], dtype=torch.int64)


def labelled_fingerprint(source: ImageSource, names: Sequence[str], numbers: Tensor) -> str:
    """The identity of images and of their labels, from `class_numbers`: a training resumes with the same only."""
    text = repr((source.fingerprint(), tuple(names), numbers.tolist()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_no_class_is_empty(numbers: Tensor, names: Sequence[str]) -> None:
    """Raises FaroutError where a class of `names` has none of the training images, whose `class_numbers` are given."""
    empty = [name for place, name in enumerate(names) if not bool((numbers == place).any())]
    if empty:
        raise FaroutError(f"no image is left to train the class {', '.join(empty)} on; give more images of it")


def _labels(source: ImageSource) -> tuple[int, ...]:
    if source.labels is None:
        stray = [key for key in source.keys if "/" not in key]
        if 0 < len(stray) < len(source.keys) and Path(source.name).is_dir():
            raise SourceError(
                f"{source.name} has class folders, and {len(stray)} images in none of them (first: {stray[0]}); move "
                "them into the folders of their classes"
            )
        raise SourceError(
            f"{source.name} has no labels, which training classes requires; give a class-per-folder tree or a table "
            "with labels (a diffusion model can also be trained without classes)"
        )
    return source.labels


def class_name(source: ImageSource, label: int) -> str:
    """The name of a label of `source`; one without a name is its own."""
    names = source.class_names or ()
    return str(names[label]) if 0 <= label < len(names) else str(label)


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Prepared images, each with the number of its class, for training."""

    def __init__(self, images: PreparedImages, numbers: Tensor) -> None:
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.numbers[index]
