"""Detectors on the features of a frozen backbone, which are computed once for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.splits import calibration_size
from farout.detectors.argument_checks import check_literals
from farout.detectors.base import Detector
from farout.detectors.calibration import check_alpha, check_fitted, check_seed, set_calibration
from farout.detectors.declarations import Requirements
from farout.detectors.results import Measurements, Scores
from farout.features.encoding import FeatureEncoding
from farout.features.extraction import CachedFeatures
from farout.features.extractor import FeatureExtractor

__all__ = ["FeatureDetector", "PooledFeatureDetector", "VectorDetector"]

F = TypeVar("F", bound="FeatureDetector")


class FeatureDetector(Detector):
    """A detector on the features of a frozen backbone.

    Args:
        backbone: feature network: `lite0` (weights installed with farout), `b4` (the semantic paper's), `resnet50`,
            `dinov2`, or the name of a timm model.
        weights: file of backbone weights, or `random` (untrained, as a baseline); default: pretrained weights.
        layers: feature levels, numbered as in timm; default: those of the backbone's preset, or all.
        size: side of the backbone's input in pixels; default: that of the backbone's preset.
    """

    requirements: ClassVar[Requirements] = Requirements(backbone=True)
    uses_pooled_features: ClassVar[bool] = True
    """Whether pooled features replace the images of a batch, so that they can be shared and cached."""

    def __init__(
        self,
        *,
        backbone: str = "lite0",
        weights: str | None = None,
        layers: tuple[int, ...] | None = None,
        size: int | None = None,
    ) -> None:
        check_literals(self)
        if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            raise FaroutError(f"layers must be different numbers from 0, got {list(layers)}")

    def build_features(self) -> FeatureExtractor:
        """Build the backbone that the configuration names."""
        names = ("backbone", "weights", "layers", "size")
        return FeatureExtractor.create(**{name: self.config[name] for name in names})

    def build_preprocessing(self, source: ImageSource, protocol: Protocol | None) -> Preprocessing:
        """RGB at the backbone's size."""
        return Preprocessing.for_source(source, size=self.backbone.size, channels=3, protocol=protocol or "native")

    def open_cache(self) -> CachedFeatures:
        """Open the cache of the backbone's features."""
        return CachedFeatures(
            self.backbone, self.preprocessing, self.runtime.batch_size, self.precision, backend=self.backend
        )

    def build_baseline(self, method: type[F]) -> F:
        """Build an unfitted detector of another method on the same backbone."""
        names = ("backbone", "weights", "size")
        baseline = method(**{name: self.config[name] for name in names}, layers=self.backbone.layers)
        baseline.features = self.features
        return baseline

    @property
    def backbone(self) -> FeatureExtractor:
        """The backbone, once it is built."""
        assert self.features is not None
        return self.features

    def check_backbone(self, content_hash: str) -> None:
        """Raise FaroutError unless a diffusion model of features was trained with this backbone.

        Args:
            content_hash: content hash of the backbone that the model was trained with.
        """
        if content_hash != self.backbone.content_hash:
            own = f"{self.backbone.name} (hash {self.backbone.content_hash[:8]}, the model requires {content_hash[:8]})"
            raise FaroutError(f"this model was trained on features of another backbone than {own}; fit again")

    @property
    def batch_size(self) -> int:
        """The runtime's; `auto`: 64 on a CPU, 256 on an accelerator, since features need little memory."""
        return self.runtime.images_per_batch((1,))

    def load_batches(self, source: ImageSource) -> Iterator[Batch]:
        """With the cache: batches of features, computed where they are missing. Without it: batches of images, whose
        features `pooled_features` computes.
        """
        if not self.runtime.cache:
            yield from super().load_batches(source)
            return
        reader = self.open_cache()
        yield from reader.batches(source, self.batch_size, self.runtime.workers)
        self.cache_hits += reader.cache.hits

    def pooled_features(self, batch: Batch) -> Tensor:
        """Pooled features (B, width) of a batch, float32 on the CPU."""
        if batch.features is not None:
            return batch.features
        return self._compute_features(batch.images)

    def _compute_features(self, images: Tensor) -> Tensor:
        size, precision = self.runtime.batch_size, self.precision
        return self.backbone.pooled_features(images, size, precision, self.backend).cpu()

    def run_networks(self, batch: Batch) -> None:
        """Run the backbone; a denoiser of features takes little time."""
        self._compute_features(batch.images)

    def pooled_features_of_source(self, source: ImageSource) -> Tensor:
        """Pooled features (n, width) of all readable images of a source."""
        parts = []
        with task("features of training images", len(source)) as bar:
            for batch in self.load_batches(source):
                if batch.keys:
                    parts.append(self.pooled_features(batch))
                bar.advance(len(batch.keys))
        return torch.cat(parts)


class PooledFeatureDetector(FeatureDetector):
    """A detector on the pooled features of images, which also works on arrays of features."""

    array_channels: tuple[int, ...] = ()  # features per layer of the arrays that `fit_features` was given

    @abstractmethod
    def measure_features(self, keys: tuple[str, ...], features: Tensor, identities: tuple[str, ...]) -> Measurements:
        """Measure pooled features (B, width); `identities` are those of `Batch.identities`."""

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Measure the pooled features; see `measure_features`."""
        return self.measure_features(batch.keys, self.pooled_features(batch), batch.identities)

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of features of each layer of the backbone, or of the arrays."""
        return self.backbone.channels if self.features is not None else self.array_channels

    def fit_features(
        self,
        features: np.ndarray | Tensor,
        *,
        channels: Sequence[int] | None = None,
        alpha: float = 0.05,
        seed: int = 0,
    ) -> Self:
        """Fit to features of normal images that were computed elsewhere; no backbone is used.

        A seeded sample of max(20 %, ceil(1/alpha) - 1) rows is the calibration. The others are the statistics, except
        those that a network is trained on.

        Args:
            features: (n, d), one row per image.
            channels: number of features per layer, with sum d; default: all are one layer.
            alpha: false-alarm rate of `is_ood`.
            seed: seed of the sample.

        Raises:
            FaroutError: for another shape, values that are not finite, or too few rows.
        """
        table = _check_array(features)
        check_alpha(alpha)
        check_seed(seed)
        layers = (table.shape[1],) if channels is None else tuple(map(int, channels))  # of numpy: no JSON values
        if sum(layers) != table.shape[1] or min(layers) < 1:
            raise FaroutError(f"channels are {list(layers)}; expected positive numbers with sum {table.shape[1]}")
        count, held_out = len(table), calibration_size(len(table), alpha)
        if count - held_out < 2:
            raise FaroutError(f"{count} rows are too few at alpha {alpha}: the calibration takes {held_out}")
        self.reset_statistics()
        self.features, self.array_channels = None, layers
        self.alpha, self.seed = alpha, seed
        order = np.random.default_rng(seed).permutation(count)
        statistics = self.prepare_arrays(table, np.sort(order[held_out:]))
        self.statistics = self._measure_rows(table, statistics)
        self.fit_statistics(self.statistics)
        set_calibration(self, self._measure_rows(table, np.sort(order[:held_out])))
        return self

    def prepare_arrays(self, table: Tensor, rows: np.ndarray) -> np.ndarray:
        """Train what requires it on some of these rows of features, and return the rows for the statistics."""
        return rows

    def score_features(self, features: np.ndarray | Tensor) -> Scores:
        """Score features (n, d), with the row numbers as keys; see `fit_features`."""
        check_fitted(self)
        table = _check_array(features)
        if table.shape[1] != sum(self.channels):
            raise FaroutError(f"expected features (n, {sum(self.channels)}), got {tuple(table.shape)}")
        return self.score_measurements(self._measure_rows(table, np.arange(len(table))))

    def _measure_rows(self, table: Tensor, rows: np.ndarray) -> Measurements:
        parts = []
        for start in range(0, len(rows), _ROWS_PER_CALL):
            part = rows[start : start + _ROWS_PER_CALL]
            keys = tuple(map(str, part.tolist()))
            parts.append(self.measure_features(keys, table[torch.from_numpy(part)], keys))
        return Measurements.join(parts)


class VectorDetector(PooledFeatureDetector):
    """A detector whose measurements are the pooled features.

    Args:
        standardize: `image`: scale the features of each layer of each image to mean 0 and standard deviation 1 (higher
            AUROC on changed training images); `none`: do not scale.
    """

    test_arguments: ClassVar[Mapping[str, Any]] = {"size": 32}

    def __init__(self, *, standardize: Literal["image", "none"] = "image", **features: Any) -> None:
        super().__init__(**features)

    def measure_features(self, keys: tuple[str, ...], features: Tensor, identities: tuple[str, ...]) -> Measurements:
        """Vectors `features` (B, width)."""
        return Measurements(keys, vectors={"features": features})

    def vectors(self, measurements: Measurements) -> np.ndarray:
        """The features (n, width) in float64, standardized as configured."""
        features = measurements.vectors["features"]
        if self.config["standardize"] == "image":
            features = FeatureEncoding(self.channels)(features)
        return features.double().numpy()

    def compute_embedding(self, measurements: Measurements) -> np.ndarray | None:
        """The standardized features."""
        return self.vectors(measurements)

    def build_score_module(self) -> nn.Module:
        """The backbone, the standardization and `build_vector_score`."""
        # scoring does not import what only an export uses
        from farout.features.feature_modules import EncodedFeatures, PooledFeatures

        standardization = EncodedFeatures(FeatureEncoding(self.channels))
        steps = [standardization] if self.config["standardize"] == "image" else []
        return nn.Sequential(PooledFeatures(self.backbone), *steps, self.build_vector_score())

    def build_vector_score(self) -> nn.Module:
        """Build a module from standardized features (B, width), float32, to the score, float64 (B,), for an export."""
        raise FaroutError(f"{type(self).__name__} cannot be exported: it does not implement build_vector_score")

    def split_layers(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Split features (n, width) into one table (n, channels) per layer of the backbone."""
        return np.split(vectors, np.cumsum(self.channels)[:-1], axis=1)


_ROWS_PER_CALL = 1024
"""Rows of an array of features that are measured at a time."""


def _check_array(features: np.ndarray | Tensor) -> Tensor:
    table = torch.as_tensor(features).detach().cpu().float()
    if table.ndim != 2 or not len(table):
        raise FaroutError(f"expected finite features (n, d) with n >= 1, got shape {tuple(table.shape)}")
    invalid = int((~torch.isfinite(table)).any(1).sum())
    if invalid:
        raise FaroutError(f"expected finite features (n, d), got {invalid} of {len(table)} rows with NaN or infinity")
    return table
