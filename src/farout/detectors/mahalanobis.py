"""Mahalanobis distance of pooled features; class-conditional and relative with labels (Lee et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from farout import densities
from farout.detectors._features import VectorDetector
from farout.detectors.base import Measurements

__all__ = ["Mahalanobis"]


class Mahalanobis(VectorDetector):
    """Squared distance (x - m)^T C^-1 (x - m) / d of pooled features to good images, C shrunk (Ledoit and Wolf 2004) so
    that it exists for fewer images than features.
    """

    choices: ClassVar[frozenset[str]] = frozenset({"score"})

    def __init__(self, *, score: str = "distance", **features: Any) -> None:
        super().__init__(**features)
        self.density: densities.Mahalanobis | None = None

    def fit_statistics(self, measurements: Measurements) -> None:
        """Mean and covariance of the features."""
        self.density = densities.Mahalanobis.fit(self.table(measurements))

    def combine(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance`."""
        assert self.density is not None
        return {"distance": torch.from_numpy(self.density.score(self.table(measurements)))}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.density is None else self.density.to_arrays()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.density = densities.Mahalanobis.from_arrays(state)
