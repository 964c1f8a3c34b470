"""Mahalanobis distance of pooled features; class-conditional and relative with labels (Lee et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features import densities

__all__ = ["Mahalanobis"]


class Mahalanobis(VectorDetector):
    """Mahalanobis distance of pooled features to the normal images.

    With x the features (d), m and C mean and covariance of normal images, m_c the mean of class c, S the covariance
    within classes, and z(.) standardized by the statistics images,

        distance    = (x - m)^T C^-1 (x - m) / d
        layers      = mean over the backbone's layers l of z(log distance_l)
        conditional = min_c (x - m_c)^T S^-1 (x - m_c) / d        (Lee, Lee, Lee and Shin 2018, section 2.1, eq. 2)
        relative    = conditional - distance                      (Ren et al. 2021)

    In `layers`, a layer of few channels counts as much as one of many. Lee et al.: "A simple unified framework for
    detecting out-of-distribution samples and adversarial attacks". Ren et al.: "A simple fix to Mahalanobis distance
    for improving near-OOD detection"; it is meant for new classes and ranks blurred or noisy images below normal ones.
    Columns are standardized first and covariances shrunk (Ledoit and Wolf 2004), so that they exist for fewer images
    than features. A class may have one image, if some class has two.

    Args:
        classes: also fit class-conditional statistics; requires labels for the fit, not for scoring.
        score: indicator used as score: `distance`, `layers` (mean over layers), `conditional` or `relative` (both with
            classes only); default: `conditional` with classes, else `distance`.
    """

    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"classes", "score"})

    def __init__(
        self,
        *,
        classes: bool = False,
        score: Literal["distance", "layers", "conditional", "relative"] | None = None,
        **features: Any,
    ) -> None:
        super().__init__(**features)
        if score in ("conditional", "relative") and not classes:
            raise FaroutError(f"the score {score!r} requires classes=True and images with labels")
        self.all_images: densities.Mahalanobis | None = None
        self.layers: list[densities.Mahalanobis] = []
        self.layer_scale: densities.ZScore | None = None
        self.classes: densities.ClassMahalanobis | None = None

    @property
    def score_name(self) -> str:
        """As configured, else `conditional` with classes, `distance` without."""
        return self.config["score"] or ("conditional" if self.config["classes"] else "distance")

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `features` (B, width) and, where there are labels, `label` (B, 1)."""
        vectors = {"features": self.pooled_features(batch)}
        if batch.labels is not None:
            vectors["label"] = batch.labels.float()[:, None]
        return Measurements(batch.keys, vectors=vectors)

    def prepare_statistics(self, images: ImageSource) -> None:
        """Raise FaroutError where labels are required and missing, before all images are measured."""
        if self.config["classes"] and images.labels is None:
            raise FaroutError(_NO_LABELS)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit means and covariances: of all images, of each layer, and within classes."""
        x = self.vectors(measurements)
        self.all_images = densities.Mahalanobis.fit(x)
        self.layers = [densities.Mahalanobis.fit(part) for part in self.split_layers(x)]
        self.layer_scale = densities.ZScore.fit(self._log_layer_distances(x))
        if self.config["classes"]:
            if "label" not in measurements.vectors:
                raise FaroutError(_NO_LABELS)
            self.classes = densities.ClassMahalanobis.fit(x, measurements.vectors["label"][:, 0].numpy())

    def _log_layer_distances(self, x: np.ndarray) -> np.ndarray:
        distances = [layer.score(part) for layer, part in zip(self.layers, self.split_layers(x), strict=True)]
        return np.log(np.maximum(np.stack(distances, axis=1), 1e-12))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance` and `layers`, with classes `conditional` and `relative`."""
        assert self.all_images is not None
        assert self.layer_scale is not None
        x = self.vectors(measurements)
        scores = {"distance": self.all_images.score(x), "layers": self.layer_scale.score(self._log_layer_distances(x))}
        if self.classes is not None:
            scores["conditional"] = self.classes.score(x)
            scores["relative"] = scores["conditional"] - scores["distance"]
        return {name: torch.from_numpy(score) for name, score in scores.items()}

    def build_vector_score(self) -> nn.Module:
        """The configured score."""
        return _Distances(self)

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        fitted = {"all_images": self.all_images, "layer_scale": self.layer_scale, "classes": self.classes}
        fitted |= {f"layer{number}": layer for number, layer in enumerate(self.layers)}
        return densities.pack_arrays({name: part for name, part in fitted.items() if part is not None})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted arrays."""
        names = [f"layer{number}" for number in range(len(self.channels))]
        self.all_images = densities.Mahalanobis.from_arrays(densities.unpack_arrays(state, "all_images"))
        self.layers = [densities.Mahalanobis.from_arrays(densities.unpack_arrays(state, name)) for name in names]
        self.layer_scale = densities.ZScore.from_arrays(densities.unpack_arrays(state, "layer_scale"))
        if self.config["classes"] and (classes := densities.unpack_arrays(state, "classes")):
            self.classes = densities.ClassMahalanobis.from_arrays(classes)


class _Distances(nn.Module):
    """`Mahalanobis.compute_scores` as a module, for the configured score."""

    def __init__(self, detector: Mahalanobis) -> None:
        from farout.features.density_modules import ClassMahalanobisModule, MahalanobisModule, ZScoreModule

        super().__init__()
        self.score, self.channels = detector.score_name, list(detector.channels)
        if self.score in ("distance", "relative"):
            assert detector.all_images is not None
            self.all_images = MahalanobisModule(detector.all_images)
        if self.score in ("conditional", "relative"):
            assert detector.classes is not None
            self.classes = ClassMahalanobisModule(detector.classes)
        if self.score == "layers":
            assert detector.layer_scale is not None
            self.layers = nn.ModuleList(MahalanobisModule(layer) for layer in detector.layers)
            self.layer_scale = ZScoreModule(detector.layer_scale.mean, detector.layer_scale.std)

    def forward(self, x: Tensor) -> Tensor:
        if self.score == "distance":
            return self.all_images(x)
        if self.score == "conditional":
            return self.classes(x)
        if self.score == "relative":
            return self.classes(x) - self.all_images(x)
        parts = torch.split(x, self.channels, dim=1)
        distances = torch.stack([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=1)
        return self.layer_scale(distances.clamp(min=1e-12).log()).mean(1)


_NO_LABELS = (
    "class-conditional distances require images with labels, and these have none; give a tree of one folder per class "
    "or a table with a column label, or leave classes out"
)
