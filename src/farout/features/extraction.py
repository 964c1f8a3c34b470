"""Features of images through the cache, for detectors and for `farout features extract`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from farout.core import progress
from farout.core.backends import Backend
from farout.core.chunking import BatchSize
from farout.core.devices import Precision, PrecisionChoice
from farout.core.errors import FaroutError, StoreError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.sources import Images, open_source
from farout.features.cache import FeatureCache
from farout.features.extractor import FeatureExtractor

__all__ = ["CachedFeatures", "Extraction", "extract_features"]

_CPU_CHUNK, _ACCELERATOR_CHUNK = 16, 128
"""Number of images prepared and computed at a time; calls of the backbone may be smaller."""


class CachedFeatures:
    """Pooled features of images by one backbone, one preprocessing and one precision, computed once.

    Args:
        extractor: the backbone, on its device.
        preprocessing: preprocessing of its images.
        batch_size: the most rows of one call of the backbone; `auto`: by memory.
        precision: precision of the backbone.
        root: folder of the cache; None: `cache_folder()`.
        backend: the library that evaluates the backbone.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        preprocessing: Preprocessing,
        batch_size: BatchSize,
        precision: Precision,
        root: Path | None = None,
        backend: Backend = "eager",
    ) -> None:
        self.extractor, self.preprocessing = extractor, preprocessing
        self.batch_size, self.precision, self.backend = batch_size, precision, backend
        self.cache = FeatureCache(extractor.width, self._settings(), root, extractor.describe())

    def _settings(self) -> dict[str, Any]:
        """All that decides the features except the image and the library versions, which the cache adds."""
        return {
            "content_hash": self.extractor.content_hash,
            "preprocessing": _used_settings(self.preprocessing),
            "precision": self.precision,
            "device": self.extractor.device.type,
            # in fp32 all backends agree up to rounding, as different processors do
            **({} if self.precision == "fp32" or self.backend == "eager" else {"backend": self.backend}),
        }

    def batches(self, source: ImageSource, size: int, workers: int) -> Iterator[Batch]:
        """Batches of `size` images of the source with features instead of pixels; see `FeatureCache.batches`."""
        return self.cache.batches(source, self.preprocessing, size, workers, self._compute, self._chunk)

    def look_up(self, identity: str, pixels: Tensor) -> np.ndarray | Tensor:
        """Stored features of a decoded image, or the preprocessed image if there are none; for any thread."""
        stored = self.cache.read(identity)
        return self.preprocessing(pixels) if stored is None else stored

    def complete(self, identities: Sequence[str], found: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Features (B, width) of images from the results of `look_up`."""
        return self.cache.complete(identities, found, self._compute, self._chunk)

    @property
    def _chunk(self) -> int:
        return _CPU_CHUNK if self.extractor.device.type == "cpu" else _ACCELERATOR_CHUNK

    def _compute(self, images: Tensor) -> Tensor:
        return self.extractor.pooled_features(images, self.batch_size, self.precision, self.backend)


def _used_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Settings of the preprocessing without those that its protocol does not use."""
    values = preprocessing.to_dict()
    unused = {"direct": {"native", "jpeg_quality"}, "native": {"jpeg_quality"}, "common": set[str]()}
    return {name: value for name, value in values.items() if name not in unused[preprocessing.protocol]}


@dataclass(frozen=True)
class Extraction:
    """Result of `extract_features`.

    Attributes:
        source: name of the source.
        folder: folder of the features in the cache.
        computed: number of images whose features were computed.
        found: number of images whose features were in the cache.
        unreadable: unreadable images and the reasons.
        seconds: duration without loading the backbone.
    """

    source: str
    folder: Path
    computed: int
    found: int
    unreadable: dict[str, str]
    seconds: float


def extract_features(
    source: Images,
    *,
    backbone: str = "lite0",
    weights: str | None = None,
    layers: tuple[int, ...] | None = None,
    size: int | None = None,
    protocol: Protocol = "native",
    native: tuple[int, int] | None = None,
    reduced_decoding: bool = True,
    limit: int | None = None,
    seed: int = 0,
    policy: Literal["raise", "skip"] = "skip",
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    batch_size: BatchSize = "auto",
    workers: int = 2,
    backend: Backend = "eager",
) -> Extraction:
    """Compute features of images once, for all later fits and scores.

    Args:
        source: images: a named set, folder, glob, file, or hf://owner/name:split.
        backbone: feature network: `lite0`, `b4`, `resnet50`, `dinov2`, or the name of a timm model.
        weights: file of backbone weights, or `random`; default: pretrained weights.
        layers: feature levels, numbered as in timm; default: those of the backbone's preset, or all.
        size: side of the backbone's input in pixels; default: that of the backbone's preset.
        protocol: how images are resized: `native` (to the native size, then to the network's), `direct` (straight to
            the network's size) or `common` (native size, then one JPEG encoding).
        native: height and width of the images that the detector was fitted on, in pixels; default: those of this
            source.
        reduced_decoding: decode images of more than 512 x 512 pixels in a smaller size where the network's size is at
            most half of theirs, as the detector does.
        limit: use a seeded random sample of this many images; default: all.
        seed: seed of the sample.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        device: device of the backbone: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of the backbone: `fp32`, `bf16`, `fp16`, or `auto` (bf16 if the device supports it
            natively, else fp32).
        batch_size: maximum number of images per network call; `auto`: set by memory.
        workers: number of threads that decode images.
        backend: library that evaluates the backbone: `eager` (torch), `compile` (torch.compile), `openvino` or
            `onnxruntime`. In bf16, only fits and scores with the same backend find these features.

    Raises:
        FaroutError: for incompatible settings, sources or weights.
        StoreError: if the cache cannot be written, or its size limit is too small for these features.
    """
    runtime = Runtime(device, precision, batch_size, workers, backend=backend).resolve_auto()
    if native is not None and (len(native) != 2 or min(native) < 1):
        raise FaroutError(f"native is {native}; expected a height and a width in pixels")
    images = open_source(source, limit=limit, seed=seed, policy=policy).with_reduced_decoding(reduced_decoding)
    extractor = FeatureExtractor.create(backbone, weights, layers, size).to(runtime.device)
    preprocessing = Preprocessing.for_source(images, size=extractor.size, channels=3, protocol=protocol)
    if native is not None:
        preprocessing = replace(preprocessing, native=(native[0], native[1]))
    resolved: Any = runtime.precision  # so not `auto`
    reader = CachedFeatures(extractor, preprocessing, batch_size, resolved, backend=backend)
    reader.cache.create_folder()
    reader.cache.check_limit(len(images))
    started, count = time.perf_counter(), 0
    with progress.task(f"features of {images.name}", len(images)) as bar:
        for batch in reader.batches(images, runtime.images_per_batch((1,)), workers):
            count += len(batch.keys)
            bar.advance(len(batch.keys))
            if reader.cache.failure:
                break
    reader.cache.flush()
    if reader.cache.failure:
        raise StoreError(reader.cache.failure)
    found, seconds = reader.cache.hits, time.perf_counter() - started
    return Extraction(images.name, reader.cache.folder, count - found, found, images.unreadable, seconds)
