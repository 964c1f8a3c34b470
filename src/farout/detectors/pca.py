"""Residual of features outside the leading principal components of normal images (Wang et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features.densities import PrincipalComponents

__all__ = ["PCA"]


class PCA(VectorDetector):
    """Norm of an image's features outside the leading principal components of normal images.

    With z the features (d), each channel standardized, and P z their projection on the leading components,

        residual = ||z - P z||^2 / d          (Wang, Li, Feng and Zhang, "ViM", CVPR 2022, without its logit)
        fraction = ||z - P z||^2 / ||z||^2    (Guan et al., "Revisit PCA-based technique", ICCV 2023, squared error)

    An image cannot raise `fraction` by being extreme in the directions in which normal images vary. n images span at
    most n - 1 components: with fewer images than features, the residual of every new image is larger, normal or not,
    which the calibration accounts for.

    Args:
        variance: share of the variance of normal images that the leading components explain.
        score: indicator used as score: `residual` (squared norm outside the components) or `fraction` (relative to the
            whole squared norm).
    """

    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"variance", "score"})

    def __init__(
        self, *, variance: float = 0.95, score: Literal["residual", "fraction"] = "residual", **features: Any
    ) -> None:
        super().__init__(**features)
        if not 0 < variance < 1:
            raise FaroutError(f"variance is a share between 0 and 1, got {variance}")
        self.principal: PrincipalComponents | None = None

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit the principal components."""
        self.principal = PrincipalComponents.fit(self.vectors(measurements), explained=self.config["variance"])

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`residual` and `fraction`."""
        assert self.principal is not None
        projection, residual = self.principal.project(self.vectors(measurements))
        outside, inside = np.square(residual).sum(1), np.square(projection).sum(1)
        return {
            "residual": torch.from_numpy(outside / residual.shape[1]),
            "fraction": torch.from_numpy(outside / np.maximum(outside + inside, 1e-12)),
        }

    def build_vector_score(self) -> nn.Module:
        """`residual` or `fraction`, as configured."""
        assert self.principal is not None
        return _Residual(self.principal, self.score_name)

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.principal is None else self.principal.to_arrays()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted arrays."""
        self.principal = PrincipalComponents.from_arrays(state)


class _Residual(nn.Module):
    """`PCA.compute_scores` as a module."""

    def __init__(self, principal: PrincipalComponents, score: str) -> None:
        from farout.features.density_modules import PrincipalComponentsModule

        super().__init__()
        self.principal, self.score = PrincipalComponentsModule(principal), score

    def forward(self, x: Tensor) -> Tensor:
        projection, residual = self.principal(x)
        outside, inside = residual.square().sum(1), projection.square().sum(1)
        return (
            outside / residual.shape[1] if self.score == "residual" else outside / (outside + inside).clamp(min=1e-12)
        )
