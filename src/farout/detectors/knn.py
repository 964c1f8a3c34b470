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
"""Memory for the products of the images that are compared at a time, and for the differences of their candidates."""


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
        self._store(np.zeros((0, 0), dtype=np.float32))

    @property
    def k(self) -> int:
        """The rank that is used: as configured, but at most a hundredth of the stored images, and at least 1."""
        return max(1, min(int(self.config["k"]), len(self.bank) // 100))

    def fit_statistics(self, measurements: Measurements) -> None:
        """Store the normalized features of normal images."""
        z = _normalize(self.vectors(measurements))
        chosen = np.random.default_rng(self.seed).permutation(len(z))[: self.config["bank"]]
        # in float32, as it is saved, so that a loaded detector gives the same scores
        self._store(z[np.sort(chosen)].astype(np.float32))

    def _store(self, bank: np.ndarray) -> None:
        self.bank, self._squared_lengths = bank, np.einsum("ij,ij->i", bank, bank)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance` and `mean`."""
        z, k = _normalize(self.vectors(measurements)), self.k
        distances = np.empty((len(z), k))
        rows = max(1, _BLOCK_BYTES // (5 * len(self.bank)))  # 4 bytes of a product, and 1 of its comparison
        for start in range(0, len(z), rows):
            block = z[start : start + rows]
            # ||z - b||^2 = ||z||^2 - 2 z b + ||b||^2; ||z||^2 does not change the order of the neighbors
            squared = block.astype(np.float32) @ self.bank.T
            squared *= -2
            squared += self._squared_lengths
            highest = squared.min(1) if k == 1 else np.partition(squared, k - 1, axis=1)[:, k - 1]
            # The products are rounded to float32, and cancel where a neighbor is very near: all rows that may be among
            # the k nearest ones are compared by their differences.
            tolerance = 2 * np.finfo(np.float32).eps * (z.shape[1] + 4)
            is_candidate = ~(squared > (highest + tolerance)[:, None])  # all of them for NaN, whose distances are NaN
            distances[start : start + rows] = self._nearest(block, is_candidate)
        return {"distance": torch.from_numpy(distances.max(1)), "mean": torch.from_numpy(distances.mean(1))}

    def _nearest(self, block: np.ndarray, is_candidate: np.ndarray) -> np.ndarray:
        """The k smallest distances (B, k) of vectors (B, d) to the stored ones that are candidates (B, bank)."""
        k = self.k
        images, stored = np.nonzero(is_candidate)
        distances = np.empty(len(images))
        count = max(1, _BLOCK_BYTES // (8 * block.shape[1]))
        for start in range(0, len(images), count):
            part = slice(start, start + count)
            distances[part] = np.linalg.norm(block[images[part]] - self.bank[stored[part]], axis=1)
        ordered = distances[np.lexsort((distances, images))]
        first = np.cumsum(is_candidate.sum(1)) - is_candidate.sum(1)
        return ordered[first[:, None] + np.arange(k)]

    def build_vector_score(self) -> nn.Module:
        """`distance` or `mean`, as configured."""
        return _NearestDistances(torch.from_numpy(self.bank).double(), self.k, self.score_name)

    def get_state(self) -> dict[str, np.ndarray]:
        """The stored features."""
        return {"bank": self.bank}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the stored features."""
        self._store(np.array(state["bank"], dtype=np.float32))

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
