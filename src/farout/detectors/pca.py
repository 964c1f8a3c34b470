"""What the leading principal components of good images' features leave over (Wang et al. 2022, residual)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements
from farout.features.densities import Principal

__all__ = ["PCA"]


class PCA(VectorDetector):
    """Norm of an image's features outside the leading principal components of normal images.

    With z the features, each channel standardised over good images, and P the projection on the leading components:
    residual = ||z - P z||^2 / d (the residual of Wang, Li, Feng and Zhang, "ViM: out-of-distribution with virtual-logit
    matching", CVPR 2022, without its logit), and fraction = ||z - P z||^2 / ||z||^2 (Guan, Liu, Zheng, Zhou
    and Wang, "Revisit PCA-based technique for out-of-distribution detection", ICCV 2023, square of their regularised
    error), which an image cannot raise by being extreme in the ways that good images vary. n images span n - 1
    components at most: with fewer images than features more of every new image is left over, good or not, which the
    calibration accounts for.

    Args:
        variance: share of the variance of normal images that the leading components explain.
        score: indicator used as score: `residual` (squared norm outside the components) or `fraction` (relative to the
            whole squared norm).
    """

    choices: ClassVar[frozenset[str]] = frozenset({"variance", "score"})

    def __init__(
        self, *, variance: float = 0.95, score: Literal["residual", "fraction"] = "residual", **features: Any
    ) -> None:
        super().__init__(**features)
        if not 0 < variance < 1:
            raise FaroutError(f"variance is a share between 0 and 1, got {variance}")
        self.components: Principal | None = None

    def fit_statistics(self, measurements: Measurements) -> None:
        """The components."""
        self.components = Principal.fit(self.table(measurements), share=self.config["variance"])

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`residual` and `fraction`."""
        assert self.components is not None
        inside, outside = self.components.project(self.table(measurements))
        rest, kept = np.square(outside).sum(1), np.square(inside).sum(1)
        found = {"residual": rest / outside.shape[1], "fraction": rest / np.maximum(rest + kept, 1e-12)}
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.components is None else self.components.to_arrays()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.components = Principal.from_arrays(state)
