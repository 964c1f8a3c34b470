"""What the parts of an ensemble are given: each image is decoded once, and what several parts use is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farout.data.batching import Batch, LoadedImages, iterate_loaded
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.detectors.feature_detector import FeatureDetector
from farout.detectors.interface import DetectorInterface

__all__ = ["SharedBatch", "SharedInput", "find_inputs", "iterate_shared_batches"]


_Prepared = tuple[str, np.ndarray | Tensor]
"""The identity of an image, and its features or the preprocessed image."""


@dataclass(frozen=True)
class SharedBatch(Batch):
    """Images that were decoded once, as a batch for each input of an ensemble.

    Attributes:
        inputs: the batches; all have the same keys.
    """

    inputs: tuple[Batch, ...] = ()

    @classmethod
    def create(cls, inputs: list[Batch]) -> SharedBatch:
        """The batch of these inputs."""
        first = inputs[0]
        return cls(first.keys, first.images, None, first.indices, None, first.identities, tuple(inputs))


@dataclass(frozen=True)
class SharedInput:
    """Preprocessed images, or the features of a backbone, that one or more parts are measured on.

    Attributes:
        preprocessing: preprocessing of the images.
        feature_detector: a part that computes the pooled features for all parts with this input; None: the parts are
            measured on images.
        parts: names of the parts.
    """

    preprocessing: Preprocessing
    feature_detector: FeatureDetector | None
    parts: tuple[str, ...]

    def complete(self, batch: Batch) -> Batch:
        """The batch with features, if the parts use them; computed where the cache has not provided them."""
        if self.feature_detector is None or batch.features is not None:
            return batch
        return replace(batch, features=self.feature_detector.pooled_features(batch))

    def gray_image(self) -> Batch:
        """A batch of one gray image, to measure the cost of an image on."""
        image = torch.full((1, self.preprocessing.channels, *self.preprocessing.size), 0.5)
        return Batch(("gray",), image, None, (0,))


def find_inputs(parts: Mapping[str, DetectorInterface]) -> tuple[SharedInput, ...]:
    """The different inputs of fitted parts, in the order of the parts."""
    found: dict[Any, SharedInput] = {}
    for name, part in parts.items():
        detector = part if isinstance(part, FeatureDetector) and part.uses_pooled_features else None
        key = (part.preprocessing, None if detector is None else detector.backbone.content_hash)
        if key not in found:
            found[key] = SharedInput(part.preprocessing, detector, ())
        found[key] = replace(found[key], parts=(*found[key].parts, name))
    return tuple(found.values())


def iterate_shared_batches(
    source: ImageSource, inputs: tuple[SharedInput, ...], size: int, workers: int, use_cache: bool
) -> Iterator[SharedBatch]:
    """Yield batches of `size` images of a source; see `farout.data.batching.iterate_batches`.

    Args:
        source: the images.
        inputs: what is made of each image.
        size: number of images per batch.
        workers: number of threads that decode and preprocess.
        use_cache: read features from the cache, and store those that are computed.
    """
    if use_cache and len(inputs) == 1 and inputs[0].feature_detector is not None:
        # images whose features are stored need not be decoded
        cached = inputs[0].feature_detector.open_cache()
        for batch in cached.batches(source, size, workers):
            yield SharedBatch.create([batch])
        inputs[0].feature_detector.cache_hits += cached.cache.hits
        return
    detectors = [each.feature_detector if use_cache else None for each in inputs]
    readers = [None if detector is None else detector.open_cache() for detector in detectors]

    least_sizes = dict.fromkeys(each.preprocessing.least_size for each in inputs)  # usually one

    def prepare(index: int) -> tuple[str, list[_Prepared]]:
        images = {least_size: source.read(index, least_size) for least_size in least_sizes}
        own_images = [images[each.preprocessing.least_size] for each in inputs]
        prepared = [
            each.preprocessing(image.pixels) if reader is None else reader.look_up(image.identity, image.pixels)
            for each, reader, image in zip(inputs, readers, own_images, strict=True)
        ]
        identities = [image.identity for image in own_images]
        return identities[0], list(zip(identities, prepared, strict=True))

    def batch_of(loaded: LoadedImages[list[_Prepared]], number: int) -> Batch:
        own, prepared = readers[number], [each[number][1] for each in loaded.prepared]
        identities = tuple(each[number][0] for each in loaded.prepared)
        preprocessing = inputs[number].preprocessing
        images = torch.empty(0, preprocessing.channels, *preprocessing.size)
        features = None
        if own is not None:
            features = own.complete(identities, prepared)
        elif prepared:
            images = torch.stack([image for image in prepared if isinstance(image, Tensor)])
        return Batch(loaded.keys, images, None, loaded.indices, features, identities)

    with ExitStack() as stack:
        for reader in readers:
            if reader is not None:
                stack.enter_context(reader.cache.in_use())
        for loaded in iterate_loaded(source, prepare, size, workers=workers):
            yield SharedBatch.create([batch_of(loaded, number) for number in range(len(inputs))])
    for detector, reader in zip(detectors, readers, strict=True):
        if detector is not None and reader is not None:
            detector.cache_hits += reader.cache.hits
