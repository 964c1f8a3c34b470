"""Reconstruction error of features by a bottleneck network; the semantic paper's baseline without diffusion."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements

__all__ = ["AutoEncoder"]

logger = logging.getLogger(__name__)
_BATCH = 128
_VALIDATION_FROM = 500
"""Number of images from which on a tenth of them decides when training stops."""


class AutoEncoder(VectorDetector):
    """Reconstruction error of an image's features by a bottleneck network.

    With z the features (d), each layer of each image standardized as in the `semantic` detector, and f a network with
    the hidden widths `hidden`, `bottleneck`, `hidden` (ReLU) that is trained to reconstruct those of normal images,

        mse   = ||z - f(z)||^2 / d,
        mfsim = -mean over layers l of cos(z_l, f(z)_l).

    The baseline "AE on features" of Yang et al. (NeurIPS 2024, arXiv 2411.10701), whose network has no bottleneck but
    16 residual blocks. From 500 images on, a tenth of them decides when training stops; with fewer, all are trained on
    for the maximum number of updates.

    Args:
        hidden: width of the outer hidden layers.
        bottleneck: width of the middle layer.
        updates: maximum number of updates, 128 images each.
        score: indicator used as score: `mfsim` (negative mean cosine similarity of the layers) or `mse`.
    """

    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"score"})
    test_arguments: ClassVar[Mapping[str, Any]] = {"size": 32, "hidden": 32, "bottleneck": 8, "updates": 100}

    def __init__(
        self,
        *,
        hidden: int = 256,
        bottleneck: int = 64,
        updates: int = 2500,
        score: Literal["mfsim", "mse"] = "mfsim",
        **features: Any,
    ) -> None:
        super().__init__(**features)
        if min(hidden, bottleneck, updates) < 1:
            raise FaroutError(
                f"hidden, bottleneck and updates must be at least 1, got {hidden}, {bottleneck} and {updates}"
            )
        self.weights: list[np.ndarray] = []
        self.biases: list[np.ndarray] = []

    def reset_statistics(self) -> None:
        """Discard the network."""
        self.weights, self.biases = [], []

    def fit_statistics(self, measurements: Measurements) -> None:
        """Train the network, unless it is trained: no scoring argument changes it."""
        if self.weights:
            return
        z = self.vectors(measurements).astype(np.float32)
        batch = min(_BATCH, len(z))
        epochs = max(1, self.config["updates"] // math.ceil(len(z) / batch))
        network = MLPRegressor(
            hidden_layer_sizes=(self.config["hidden"], self.config["bottleneck"], self.config["hidden"]),
            batch_size=batch,
            max_iter=epochs,
            random_state=self.seed,
            early_stopping=len(z) >= _VALIDATION_FROM,
            n_iter_no_change=10,
        )
        # On matrices this small, several threads mostly wait for each other.
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            # The number of epochs is limited on purpose; the log says whether they sufficed.
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.fit(z, z)
        state = "still improving: allow more updates" if network.n_iter_ == epochs else "no longer improving"
        logger.info("autoencoder trained for %d of at most %d epochs, %s", network.n_iter_, epochs, state)
        self.weights, self.biases = list(network.coefs_), list(network.intercepts_)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`mfsim` and `mse`."""
        z = self.vectors(measurements)
        # f(z)
        reconstruction = z
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            reconstruction = np.maximum(reconstruction @ weight + bias, 0)
        reconstruction = reconstruction @ self.weights[-1] + self.biases[-1]
        return {
            "mfsim": torch.from_numpy(-self._mean_cosine(z, reconstruction)),
            "mse": torch.from_numpy(np.square(z - reconstruction).mean(1)),
        }

    def _mean_cosine(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Mean over layers of the cosine similarity, (n,); 0 for a layer that is all zero."""
        cosines = []
        for a, b in zip(self.split_layers(one), self.split_layers(other), strict=True):
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosines.append((a * b).sum(1) / np.maximum(lengths, 1e-12))
        return np.stack(cosines).mean(0)

    def build_vector_score(self) -> nn.Module:
        """`mfsim` or `mse`, as configured."""
        return _ReconstructionError(self)

    def get_state(self) -> dict[str, np.ndarray]:
        """The network's weights and biases."""
        weights = {f"weight{number}": array for number, array in enumerate(self.weights)}
        return {**weights, **{f"bias{number}": array for number, array in enumerate(self.biases)}}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the network's weights and biases."""
        layers = range(len(state) // 2)
        self.weights = [state[f"weight{number}"] for number in layers]
        self.biases = [state[f"bias{number}"] for number in layers]


class _ReconstructionError(nn.Module):
    """`AutoEncoder.compute_scores` as a module."""

    def __init__(self, detector: AutoEncoder) -> None:
        super().__init__()
        self.count, self.score, self.channels = len(detector.weights), detector.score_name, list(detector.channels)
        for name, array in detector.get_state().items():
            self.register_buffer(name, torch.from_numpy(np.array(array, dtype=np.float64)))

    def forward(self, x: Tensor) -> Tensor:
        z = x.double()
        reconstruction = z
        for number in range(self.count):
            reconstruction = torch.mm(reconstruction, self.get_buffer(f"weight{number}"))
            reconstruction = reconstruction + self.get_buffer(f"bias{number}")
            if number < self.count - 1:
                reconstruction = reconstruction.clamp(min=0)
        if self.score == "mse":
            return (z - reconstruction).square().mean(1)
        cosines = []
        parts = zip(
            torch.split(z, self.channels, dim=1), torch.split(reconstruction, self.channels, dim=1), strict=True
        )
        for a, b in parts:
            lengths = (a.square().sum(1) * b.square().sum(1)).sqrt()
            cosines.append((a * b).sum(1) / lengths.clamp(min=1e-12))
        return -torch.stack(cosines).mean(0)
