"""The settings of a classifier: its network, its preprocessing and its data augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farout.classifiers.augment import random_crop, random_flip, random_resized_crop
from farout.classifiers.losses import ClassifierLoss, CrossEntropy
from farout.classifiers.model import Classifier
from farout.classifiers.networks import NetworkSpec, Stem
from farout.core.errors import FaroutError
from farout.data.batching import PreparedImages
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol

__all__ = ["ClassifierConfig"]

_MOMENT_IMAGES = 2000


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier and its data augmentation.

    Args:
        network: `resnet18`, `resnet34`, `resnet50`, `wrn40_2`, `wrn16_2`, `wrn16_1` (for CPUs), or the name of a timm
            model.
        stem: first layers of a ResNet: `small` (3x3, stride 1, no max-pooling) or `imagenet`; default: `small`.
        crop_padding: augmentation: pad images by this many pixels of zeros and crop them at random; 0: off.
        flip: augmentation: flip images horizontally at random.
        resized_crop: augmentation: random resized crops, instead of padding and cropping.
        label_smoothing: share of the target that is distributed over all classes.
        size: side of the network's input in pixels; default: that of the training images, at most 64.
        channels: 1 (gray) or 3 (RGB); default: as the training images.
        crop: crop the central square of this many pixels first; default: no crop.
        protocol: how images are resized: `native` (to the native size, then to the network's), `direct` (straight to
            the network's size) or `common` (native size, then one JPEG encoding).
        reduced_decoding: decode images of more than 512 x 512 pixels in a smaller size where the network's size is at
            most half of theirs, which is many times faster for photographs, and identify them by the hash of their
            files.
        mean: mean of each channel for normalization, for images in [0, 1]; default: computed on the training images.
        std: standard deviation of each channel for normalization; default: computed on the training images.
    """

    network: str = "resnet18"
    stem: Stem | None = None
    crop_padding: int = 4
    flip: bool = True
    resized_crop: bool = False
    label_smoothing: float = 0.0
    size: int | None = None
    channels: int | None = None
    crop: int | None = None
    protocol: Protocol = "native"
    reduced_decoding: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise FaroutError(f"crop_padding is {self.crop_padding}; expected 0 or more pixels")
        if (self.mean is None) != (self.std is None):
            raise FaroutError("mean and std go together; give both, or neither for those of the training images")
        self.loss()

    def loss(self) -> ClassifierLoss:
        """The loss of labelled images."""
        return CrossEntropy(self.label_smoothing)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Randomly augmented images (B, C, H, W)."""
        if self.resized_crop:
            images = random_resized_crop(images, generator)
        else:
            images = random_crop(images, self.crop_padding, generator)
        return random_flip(images, generator) if self.flip else images

    def build(self, source: ImageSource, class_names: Sequence[str], directions: Tensor | None = None) -> Classifier:
        """A classifier with random weights.

        Args:
            source: its images determine size, channels and normalization.
            class_names: name of each class.
            directions: directions of the classes (classes, D), the fixed last layer of a `CosineNetwork`; None: the
                last layer is trained.

        Raises:
            FaroutError: if there is not one direction for each class.
        """
        if directions is not None and (directions.ndim != 2 or len(directions) != len(class_names)):
            raise FaroutError(
                f"directions must have the shape (classes, D), one for each of {len(class_names)} classes, got "
                f"{tuple(directions.shape)}"
            )
        preprocessing = Preprocessing.for_source(
            source, size=self.size, channels=self.channels, protocol=self.protocol, crop=self.crop
        )
        space = None if directions is None else directions.shape[1]
        spec = NetworkSpec(self.network, len(class_names), preprocessing.channels, preprocessing.size, self.stem, space)
        mean, std = (self.mean, self.std) if self.mean and self.std else _channel_moments(source, preprocessing)
        classifier = Classifier(spec.build(), mean, std, preprocessing, class_names=class_names, network=spec)
        if directions is not None:
            classifier.head.weight.data.copy_(directions)
        return classifier


def _channel_moments(source: ImageSource, preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over at most 2,000 images, evenly spaced."""
    images, count = PreparedImages(source, preprocessing), min(_MOMENT_IMAGES, len(source))
    sums = torch.zeros(2, preprocessing.channels, dtype=torch.float64)
    for number in range(count):
        image = images[number * len(source) // count].double()
        sums += torch.stack([image.mean((1, 2)), image.square().mean((1, 2))])
    mean, mean_square = sums / count
    # Images that are all black or white have no deviation; half a gray level does not affect others.
    std = (mean_square - mean**2).clamp(min=(0.5 / 255) ** 2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
