"""Density of a Gaussian mixture on the principal components of good images' features."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features.densities import GaussianMixture, Principal, pack_arrays, unpack_arrays

__all__ = ["GMM"]


class GMM(VectorDetector):
    """Negative log density of an image's features under a Gaussian mixture of normal images.

    Good images often lie in several clumps, and between two clumps one Gaussian sees nothing amiss. With z the
    features, each channel standardised, P z their leading principal components and r = z - P z: inside = -log sum_c w_c
    N(P z; m_c, S), one covariance S for all; density = inside + ||r||^2 / (2 s), s the variance per dimension of what
    is left: the components left out count as noise of one size, as in probabilistic PCA (Tipping and Bishop 1999,
    "Mixtures of probabilistic principal component analysers"). Both up to a constant. Few images get fewer
    dimensions (one for every 10) and components (one for every 20), so that any number from 2 on will do.

    Args:
        dimensions: maximum number of principal components.
        components: maximum number of Gaussians; 1, 2, 4, … are tried and the Bayesian information criterion chooses.
        score: indicator used as score: `density` (all dimensions) or `inside` (principal components only).
    """

    choices: ClassVar[frozenset[str]] = frozenset({"dimensions", "components", "score"})

    def __init__(
        self,
        *,
        dimensions: int = 64,
        components: int = 16,
        score: Literal["density", "inside"] = "density",
        **features: Any,
    ) -> None:
        super().__init__(**features)
        if dimensions < 1 or components < 1:
            raise FaroutError(f"dimensions and components must be at least 1, got {dimensions} and {components}")
        self.reduced: Principal | None = None
        self.mixture: GaussianMixture | None = None
        self.noise = 1.0

    def fit_statistics(self, measurements: Measurements) -> None:
        """Principal components, the mixture on them, and the variance of what they leave."""
        table = self.table(measurements)
        most = min(int(self.config["dimensions"]), max(1, len(table) // 10))
        self.reduced = Principal.fit(table, most=most)
        inside, outside = self.reduced.project(table)
        self.mixture = GaussianMixture.fit(inside, seed=self.seed, most=self.config["components"], shared=True)
        left = max(1, outside.shape[1] - inside.shape[1])
        # columns have variance 1: below a millionth, nothing is left
        self.noise = max(1e-6, float(np.square(outside).sum(1).mean()) / left)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`density` and `inside`."""
        assert self.reduced is not None
        assert self.mixture is not None
        inside, outside = self.reduced.project(self.table(measurements))
        score = self.mixture.score(inside)
        found = {"density": score + np.square(outside).sum(1) / (2 * self.noise), "inside": score}
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        if self.reduced is None or self.mixture is None:
            return {}
        return {"noise": np.array(self.noise), **pack_arrays({"reduced": self.reduced, "mixture": self.mixture})}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.noise = float(state["noise"])
        self.reduced = Principal.from_arrays(unpack_arrays(state, "reduced"))
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "mixture"))
