"""Distance of pooled features to the k-th nearest normal image (Sun et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements

__all__ = ["KNN"]

_BLOCK_BYTES = 64 * 2**20
"""Memory for the products and differences of the images that are compared at a time."""


class KNN(VectorDetector):
    """Distance of an image's features to its k-th nearest normal image.

    With z the features of an image scaled to length 1, and z_(k) the k-th nearest of the stored normal images,

        distance = ||z - z_(k)||,   mean = 1/k sum_(i <= k) ||z - z_(i)||.

    Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors" (ICML 2022). The
    search is exact.

    Args:
        k: rank of the neighbor; at most 1 % of the stored images. The paper uses 50 of 50,000; on changed
            training images 1 is better than 10, and 10 better than 46.
        bank: maximum number of normal images stored, a random sample of more; more take longer to search.
        score: indicator used as score: `distance` to the k-th neighbor, or `mean` distance to the k nearest.
    """

    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"k", "bank", "score"})

    def __init__(
        self,
        *,
        k: int = 1,
        bank: int = 50000,
        score: Literal["distance", "mean"] = "distance",
        **features: Any,
    ) -> None:
        super().__init__(**features)
        if k < 1 or bank < 1:
            raise FaroutError(f"k and bank must be at least 1, got {k} and {bank}")
        self.bank = np.zeros((0, 0))

    @property
    def k(self) -> int:
        """The rank that is used: as configured, but at most a hundredth of the stored images, and at least 1."""
        return max(1, min(int(self.config["k"]), len(self.bank) // 100))

    def fit_statistics(self, measurements: Measurements) -> None:
        """Store the normalized features of normal images."""
        z = _normalize(self.vectors(measurements))
        chosen = np.random.default_rng(self.seed).permutation(len(z))[: self.config["bank"]]
        # saved in float32 and rounded here, so that a loaded detector gives the same scores
        self.bank = z[np.sort(chosen)].astype(np.float32).astype(np.float64)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance` and `mean`."""
        z, k = _normalize(self.vectors(measurements)), self.k
        distances = np.empty((len(z), k))
        squared_lengths = np.einsum("ij,ij->i", self.bank, self.bank)
        rows = max(1, _BLOCK_BYTES // (8 * (len(self.bank) + k * z.shape[1])))
        for start in range(0, len(z), rows):
            block = z[start : start + rows]
            # ||z - b||^2 = ||z||^2 - 2 z b + ||b||^2; ||z||^2 does not change the order of the neighbors
            squared = block @ self.bank.T
            squared *= -2
            squared += squared_lengths
            nearest = squared.argmin(1)[:, None] if k == 1 else np.argpartition(squared, k - 1, axis=1)[:, :k]
            # These products cancel where a neighbor is very near: the k distances are computed from differences.
            distances[start : start + rows] = np.linalg.norm(block[:, None] - self.bank[nearest], axis=2)
        return {"distance": torch.from_numpy(distances.max(1)), "mean": torch.from_numpy(distances.mean(1))}

    def build_vector_score(self) -> nn.Module:
        """`distance` or `mean`, as configured."""
        return _NearestDistances(torch.from_numpy(self.bank), self.k, self.score_name)

    def get_state(self) -> dict[str, np.ndarray]:
        """The stored features."""
        return {"bank": self.bank.astype(np.float32)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the stored features."""
        self.bank = state["bank"].astype(np.float64)

    def describe_statistics(self) -> dict[str, Any]:
        """The number of stored images and the rank of the neighbor."""
        return {"bank": len(self.bank), "k": self.k}


class _NearestDistances(nn.Module):
    """`KNN.compute_scores` as a module."""

    bank: Tensor

    def __init__(self, bank: Tensor, k: int, score: str) -> None:
        super().__init__()
        self.register_buffer("bank", bank)
        self.k, self.score = k, score

    def forward(self, vectors: Tensor) -> Tensor:
        vectors = vectors.double()
        z = vectors / vectors.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        squared = self.bank.square().sum(1) - 2 * torch.mm(z, self.bank.T)
        nearest = squared.topk(self.k, dim=1, largest=False).indices
        distances = (z[:, None] - self.bank[nearest]).square().sum(2).sqrt()
        return distances.amax(1) if self.score == "distance" else distances.mean(1)


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
