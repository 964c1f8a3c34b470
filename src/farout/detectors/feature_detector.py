"""What detectors on pooled features share: the frozen backbone, and features that are computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.splits import calibration_size
from farout.detectors.base import Detector
from farout.detectors.calibration import calibrate, check_alpha
from farout.detectors.results import Measurements, Scores
from farout.detectors.settings import check_words
from farout.features.encoding import FeatureEncoding
from farout.features.extraction import CachedFeatures
from farout.features.extractor import FeatureExtractor

__all__ = ["FeatureDetector", "VectorDetector"]


class FeatureDetector(Detector):
    """A detector that sees images through a frozen backbone.

    Args:
        backbone: feature network: `lite0` (weights installed with farout), `b4` (the semantic paper's), `resnet50`,
            `dinov2`, or the name of a timm model.
        weights: file of backbone weights, or `random` (untrained, as a baseline); default: pretrained weights.
        layers: feature levels, numbered as in timm; default: those of the backbone's preset, or all.
        size: side of the backbone's input in pixels; default: that of the backbone's preset.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(
        self,
        *,
        backbone: str = "lite0",
        weights: str | None = None,
        layers: tuple[int, ...] | None = None,
        size: int | None = None,
    ) -> None:
        check_words(self)
        if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            raise FaroutError(f"layers must be different numbers from 0, got {list(layers)}")

    def build_features(self) -> FeatureExtractor:
        """The backbone that the configuration names."""
        names = ("backbone", "weights", "layers", "size")
        return FeatureExtractor.create(**{name: self.config[name] for name in names})

    def build_preprocessing(self, source: ImageSource, protocol: Protocol | None) -> Preprocessing:
        """RGB at the backbone's size."""
        return Preprocessing.for_source(source, size=self.backbone.size, channels=3, protocol=protocol or "native")

    def companion(self, kind: type[Any]) -> Any:
        """Another method on the same backbone, which is shared."""
        seen: dict[str, Any] = {name: self.config[name] for name in ("backbone", "weights", "size")}
        twin = kind(**{**seen, "layers": self.backbone.layers})
        twin.features = self.features
        return twin

    @property
    def backbone(self) -> FeatureExtractor:
        """The backbone, once it is there."""
        assert self.features is not None
        return self.features

    def check_backbone(self, content_hash: str) -> None:
        """Raises FaroutError if a diffusion model was trained on features of another backbone.

        Args:
            content_hash: content hash of the backbone that the model was trained with.
        """
        if content_hash != self.backbone.content_hash:
            own = f"{self.backbone.name} (hash {self.backbone.content_hash[:8]}, the model requires {content_hash[:8]})"
            raise FaroutError(f"this model was trained on features of another backbone than {own}; fit again")

    @property
    def batch_size(self) -> int:
        """As set, else 64, on an accelerator 256: vectors need little memory, and the backbone's calls are split."""
        return self.runtime.images_per_batch((1,))

    def batches(self, source: ImageSource) -> Iterator[Batch]:
        """Features in place of the images, from the cache where it has them; the images where there is no cache."""
        if not self.runtime.cache:
            yield from super().batches(source)
            return
        reader = CachedFeatures(self.backbone, self.preprocessing, self.runtime.batch_size, self.precision)
        yield from reader.batches(source, self.batch_size, self.runtime.workers)
        self.cache_hits += reader.cache.hits

    def _compute(self, images: Tensor) -> Tensor:
        return self.backbone.pooled_features(images, self.runtime.batch_size, self.precision)

    def features_of(self, batch: Batch) -> Tensor:
        """Features (B, width) float32 on the CPU."""
        if batch.features is not None:
            return batch.features
        return self._compute(batch.images).cpu() if batch.keys else torch.empty(0, self.backbone.width)

    def all_features(self, source: ImageSource) -> Tensor:
        """Features (n, width) of all readable images of a source."""
        parts = []
        with task("features of training images", len(source)) as bar:
            for batch in self.batches(source):
                parts.append(self.features_of(batch))
                bar.advance(len(batch.keys))
        return torch.cat(parts)


class VectorDetector(FeatureDetector):
    """A detector whose measurements are the features themselves: a statistic on them is all that it learns.

    Args:
        standardize: `image`: scale the features of each layer of each image to mean 0 and standard deviation 1 (higher
            AUROC on dev sources); `none`: do not scale.
    """

    _width = 0

    def __init__(self, *, standardize: Literal["image", "none"] = "image", **features: Any) -> None:
        super().__init__(**features)

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `features` (B, width)."""
        return Measurements(batch.keys, vectors={"features": self.features_of(batch)})

    def table(self, measurements: Measurements) -> np.ndarray:
        """The features (n, width) in float64, standardised as configured."""
        features = measurements.vectors["features"]
        if self.config["standardize"] == "image":
            features = FeatureEncoding(self.channels)(features)
        return features.double().numpy()

    def embedding(self, measurements: Measurements) -> np.ndarray | None:
        """The features, as `table` gives them."""
        return self.table(measurements)

    def by_layer(self, table: np.ndarray) -> list[np.ndarray]:
        """Features (n, width) as one table (n, channels) per layer of the backbone."""
        return np.split(table, np.cumsum(self.channels)[:-1], axis=1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Features of each layer of the backbone; of plain arrays one layer with all of them."""
        return self.backbone.channels if self.features is not None else (self._width,)

    # -- plain arrays of features --------------------------------------------------------------------------------

    def fit_features(self, features: np.ndarray | Tensor, *, alpha: float = 0.05, seed: int = 0) -> Self:
        """Fits to features of normal images that were computed elsewhere; no backbone is used.

        A seeded sample of max(20 %, ceil(1/alpha) - 1) rows is the calibration, the rest are the statistics.

        Args:
            features: (n, d), one row per image.
            alpha: false-alarm rate of `is_ood`.
            seed: of the sample.

        Raises:
            FaroutError: for another shape, values that are not finite, or too few rows.
        """
        table = self._checked(features)
        check_alpha(alpha)
        held_out = calibration_size(len(table), alpha)
        if len(table) - held_out < 2:
            raise FaroutError(f"{len(table)} rows are too few at alpha {alpha}: the calibration takes {held_out}")
        self.begin()
        self.features, self._width = None, table.shape[1]
        self.alpha, self.seed = alpha, seed
        order = np.random.default_rng(seed).permutation(len(table))
        self.statistics = self._measured(table, np.sort(order[held_out:]))
        self.fit_statistics(self.statistics)
        calibrate(self, self._measured(table, np.sort(order[:held_out])))
        return self

    def score_features(self, features: np.ndarray | Tensor) -> Scores:
        """Scores of features (n, d), with the row numbers as keys; see `fit_features`."""
        self.check_fitted()
        table = self._checked(features)
        if table.shape[1] != sum(self.channels):
            raise FaroutError(f"expected features (n, {sum(self.channels)}), got {tuple(table.shape)}")
        return self.rescore(self._measured(table, np.arange(len(table))))

    @staticmethod
    def _checked(features: np.ndarray | Tensor) -> Tensor:
        table = torch.as_tensor(features).detach().cpu().float()
        if table.ndim != 2 or not len(table):
            raise FaroutError(f"expected finite features (n, d) with n >= 1, got shape {tuple(table.shape)}")
        bad = int((~torch.isfinite(table)).any(1).sum())
        if bad:
            raise FaroutError(f"expected finite features (n, d), got {bad} of {len(table)} rows with NaN or infinity")
        return table

    @staticmethod
    def _measured(table: Tensor, rows: np.ndarray) -> Measurements:
        return Measurements(tuple(map(str, rows.tolist())), vectors={"features": table[torch.from_numpy(rows)]})

    @classmethod
    def tiny(cls, resources: Any) -> VectorDetector:
        """Small images through the built-in backbone."""
        return cls(size=32)
