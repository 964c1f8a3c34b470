"""Mahalanobis distance of pooled features; class-conditional and relative with labels (Lee et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features import densities

__all__ = ["Mahalanobis"]


class Mahalanobis(VectorDetector):
    """Mahalanobis distance of pooled features to the normal images.

    distance = (x - m)^T C^-1 (x - m) / d. layers = mean over the backbone's layers l of z(log distance_l), z by the
    statistics images: a layer of few channels counts as much as one of many. With labels, conditional = min over
    classes c of (x - m_c)^T S^-1 (x - m_c) / d, S the covariance within classes (Lee, Lee, Lee and Shin 2018, "A simple
    unified framework for detecting out-of-distribution samples and adversarial attacks", section 2.1), and relative =
    conditional - distance (Ren et al. 2021, "A simple fix to Mahalanobis distance for improving near-OOD detection"),
    which is meant for new classes and ranks blurred or noisy images below good ones. Columns are standardised first
    and covariances shrunk (Ledoit and Wolf 2004), so that they exist for fewer images than features. A class may have
    one image, if some class has two.

    Args:
        classes: also fit class-conditional statistics; requires labels for the fit, not for scoring.
        score: indicator used as score: `distance`, `layers` (mean over layers), `conditional` or `relative` (both with
            classes only); default: `conditional` with classes, else `distance`.
    """

    choices: ClassVar[frozenset[str]] = frozenset({"classes", "score"})

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
        self.whole: densities.Mahalanobis | None = None
        self.layers: list[densities.Mahalanobis] = []
        self.scale: densities.ZScore | None = None
        self.classes: densities.ClassMahalanobis | None = None

    @property
    def score_name(self) -> str:
        """As configured, else `conditional` with classes, `distance` without."""
        return self.config["score"] or ("conditional" if self.config["classes"] else "distance")

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `features` (B, width) and, where there are labels, `label` (B, 1)."""
        measured = super().measure(batch, maps)
        labels = {} if batch.labels is None else {"label": batch.labels.float()[:, None]}
        return Measurements(batch.keys, vectors={**measured.vectors, **labels})

    def watch(self, measurements: Measurements) -> None:
        """Raises FaroutError where labels are wanted and there are none, before all images are measured."""
        if self.config["classes"]:
            self._labels(measurements)

    @staticmethod
    def _labels(measurements: Measurements) -> np.ndarray:
        if "label" not in measurements.vectors:
            hint = "give a tree of one folder per class or a table with a column label, or leave classes out"
            raise FaroutError(f"class-conditional distances require images with labels, and these have none; {hint}")
        return measurements.vectors["label"][:, 0].numpy()

    def fit_statistics(self, measurements: Measurements) -> None:
        """Means and covariances of the features: all together, layer by layer, and within classes."""
        table = self.table(measurements)
        self.whole = densities.Mahalanobis.fit(table)
        self.layers = [densities.Mahalanobis.fit(part) for part in self.by_layer(table)]
        self.scale = densities.ZScore.fit(self._logs(table))
        if self.config["classes"]:
            self.classes = densities.ClassMahalanobis.fit(table, self._labels(measurements))

    def _logs(self, table: np.ndarray) -> np.ndarray:
        """Logarithms of the distances in each layer, (n, layers)."""
        distances = [layer.score(part) for layer, part in zip(self.layers, self.by_layer(table), strict=True)]
        return np.log(np.maximum(np.stack(distances, axis=1), 1e-12))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance` and `layers`, with classes `conditional` and `relative`."""
        assert self.whole is not None
        assert self.scale is not None
        table = self.table(measurements)
        found = {"distance": self.whole.score(table), "layers": self.scale.score(self._logs(table))}
        if self.classes is not None:
            found["conditional"] = self.classes.score(table)
            found["relative"] = found["conditional"] - found["distance"]
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        parts = {"whole": self.whole, "scale": self.scale, "classes": self.classes}
        layers = {f"layer{number}": layer for number, layer in enumerate(self.layers)}
        return densities.pack_arrays({name: part for name, part in {**parts, **layers}.items() if part is not None})

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        names = [f"layer{number}" for number in range(len(self.channels))]
        self.whole = densities.Mahalanobis.from_arrays(densities.unpack_arrays(state, "whole"))
        self.layers = [densities.Mahalanobis.from_arrays(densities.unpack_arrays(state, name)) for name in names]
        self.scale = densities.ZScore.from_arrays(densities.unpack_arrays(state, "scale"))
        if self.config["classes"] and (within := densities.unpack_arrays(state, "classes")):
            self.classes = densities.ClassMahalanobis.from_arrays(within)
