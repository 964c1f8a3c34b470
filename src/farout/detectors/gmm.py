"""Density of a Gaussian mixture on the principal components of normal images' features."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features.densities import GaussianMixture, PrincipalComponents, pack_arrays, unpack_arrays

__all__ = ["GMM"]


class GMM(VectorDetector):
    """Negative log density of an image's features under a Gaussian mixture of normal images.

    A mixture fits normal images of several kinds, between which a single Gaussian has a high density too. With z the
    features, each channel standardized, P z their projection on the leading principal components and r = z - P z,

        inside  = -log sum_c w_c N(P z; m_c, S),   one covariance S for all components c,
        density = inside + ||r||^2 / (2 s),        s the variance per dimension of r on normal images,

    both up to a constant: the other dimensions count as isotropic noise, as in probabilistic PCA (Tipping and Bishop
    1999, "Mixtures of probabilistic principal component analysers"). Few images get fewer dimensions (one for every
    10) and components (one for every 20), so that two images suffice.

    Args:
        dimensions: maximum number of principal components.
        components: maximum number of Gaussians; 1, 2, 4, … are tried and the Bayesian information criterion chooses.
        score: indicator used as score: `density` (all dimensions) or `inside` (principal components only).
    """

    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"dimensions", "components", "score"})

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
        self.principal: PrincipalComponents | None = None
        self.mixture: GaussianMixture | None = None
        self.residual_variance = 1.0

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit principal components, the mixture on them, and the variance of the residual."""
        z = self.vectors(measurements)
        dimensions = min(int(self.config["dimensions"]), max(1, len(z) // 10))
        self.principal = PrincipalComponents.fit(z, max_components=dimensions)
        projection, residual = self.principal.project(z)
        self.mixture = GaussianMixture.fit(
            projection, seed=self.seed, max_components=self.config["components"], shared=True
        )
        other_dimensions = max(1, residual.shape[1] - projection.shape[1])
        # The columns have variance 1; a residual below a millionth of that is rounding.
        self.residual_variance = max(1e-6, float(np.square(residual).sum(1).mean()) / other_dimensions)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`density` and `inside`."""
        assert self.principal is not None
        assert self.mixture is not None
        projection, residual = self.principal.project(self.vectors(measurements))
        inside = self.mixture.score(projection)
        density = inside + np.square(residual).sum(1) / (2 * self.residual_variance)
        return {"density": torch.from_numpy(density), "inside": torch.from_numpy(inside)}

    def build_vector_score(self) -> nn.Module:
        """`density` or `inside`, as configured."""
        return _Density(self)

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        if self.principal is None or self.mixture is None:
            return {}
        fitted = pack_arrays({"principal": self.principal, "mixture": self.mixture})
        return {"residual_variance": np.array(self.residual_variance), **fitted}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted arrays."""
        self.residual_variance = float(state["residual_variance"])
        self.principal = PrincipalComponents.from_arrays(unpack_arrays(state, "principal"))
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "mixture"))


class _Density(nn.Module):
    """`GMM.compute_scores` as a module."""

    def __init__(self, detector: GMM) -> None:
        from farout.features.density_modules import GaussianMixtureModule, PrincipalComponentsModule

        super().__init__()
        assert detector.principal is not None
        assert detector.mixture is not None
        self.principal = PrincipalComponentsModule(detector.principal)
        self.mixture = GaussianMixtureModule(detector.mixture)
        self.residual_variance, self.score = detector.residual_variance, detector.score_name

    def forward(self, x: Tensor) -> Tensor:
        projection, residual = self.principal(x)
        inside = self.mixture(projection)
        return inside if self.score == "inside" else inside + residual.square().sum(1) / (2 * self.residual_variance)
