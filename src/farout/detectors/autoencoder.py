"""What a bottleneck network makes of good images' features: the semantic paper's baseline without diffusion."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements

__all__ = ["AutoEncoder"]

_log = logging.getLogger(__name__)
_BATCH, _VALIDATION = 128, 500


class AutoEncoder(VectorDetector):
    """Reconstruction error of an image's features by a bottleneck network.

    With z the features, each layer of each image standardised as in the `semantic` detector: a network f with the
    widths hidden, bottleneck, hidden (ReLU) learns to give back those of good images. mse = ||z - f(z)||^2 / c, mfsim =
    -mean over layers of the cosine of z and f(z). The baseline "AE on features" of Yang et al. (NeurIPS 2024, arXiv
    2411.10701), whose network has no bottleneck but 16 residual blocks. With 500 images or more a tenth of them tells
    when to stop; with fewer all are learnt from, for as many updates as are allowed.

    Args:
        hidden: width of the outer hidden layers.
        bottleneck: width of the middle layer.
        updates: maximum number of updates, 128 images each.
        score: indicator used as score: `mfsim` (negative mean cosine similarity of the layers) or `mse`.
    """

    choices: ClassVar[frozenset[str]] = frozenset({"score"})

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

    @classmethod
    def tiny(cls, resources: Any) -> AutoEncoder:
        """A small network on small images."""
        return cls(size=32, hidden=32, bottleneck=8, updates=100)

    def begin(self) -> None:
        """Forgets the network."""
        self.weights, self.biases = [], []

    def fit_statistics(self, measurements: Measurements) -> None:
        """Trains the network; one that is there already stays, for no choice changes it."""
        if self.weights:
            return
        encoded = self.table(measurements).astype(np.float32)
        batch = min(_BATCH, len(encoded))
        passes = max(1, self.config["updates"] // math.ceil(len(encoded) / batch))
        network = MLPRegressor(
            hidden_layer_sizes=(self.config["hidden"], self.config["bottleneck"], self.config["hidden"]),
            batch_size=batch,
            max_iter=passes,
            random_state=self.seed,
            early_stopping=len(encoded) >= _VALIDATION,
            n_iter_no_change=10,
        )
        # several threads on matrices this small wait for each other, on a busy machine ten times as long as they work
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            # the passes are bounded on purpose; the log says whether they sufficed
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.fit(encoded, encoded)
        state = "still improving: allow more updates" if network.n_iter_ == passes else "no longer improving"
        _log.info("auto-encoder trained for %d passes of at most %d, %s", network.n_iter_, passes, state)
        self.weights, self.biases = list(network.coefs_), list(network.intercepts_)

    def _restored(self, encoded: np.ndarray) -> np.ndarray:
        """What the network makes of encoded features (n, width)."""
        *inner, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in inner:
            encoded = np.maximum(encoded @ weight + bias, 0)
        return encoded @ last[0] + last[1]

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`mfsim` and `mse`."""
        clean = self.table(measurements)
        back = self._restored(clean)
        found = {"mfsim": -self._similarity(clean, back), "mse": np.square(clean - back).mean(1)}
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def _similarity(self, one: np.ndarray, two: np.ndarray) -> np.ndarray:
        """Mean over layers of the cosine, (n,); 0 for a layer without length."""
        cosines = []
        for a, b in zip(self.by_layer(one), self.by_layer(two), strict=True):
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosines.append((a * b).sum(1) / np.maximum(lengths, 1e-12))
        return np.stack(cosines).mean(0)

    def state(self) -> dict[str, np.ndarray]:
        """The network's weights and biases."""
        weights = {f"weight{number}": array for number, array in enumerate(self.weights)}
        return {**weights, **{f"bias{number}": array for number, array in enumerate(self.biases)}}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        layers = range(len(state) // 2)
        self.weights = [state[f"weight{number}"] for number in layers]
        self.biases = [state[f"bias{number}"] for number in layers]
