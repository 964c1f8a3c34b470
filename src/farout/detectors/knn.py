"""Distance of pooled features to the k-th nearest good image (Sun et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.results import Measurements

__all__ = ["KNN"]


class KNN(VectorDetector):
    """Distance of an image's features to its k-th nearest normal image.

    Features are brought to length 1; distance = ||u - u_(k)||, u_(k) the k-th nearest of the good images kept, mean =
    the mean of the distances to the k nearest. Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest
    neighbors" (ICML 2022). Brute force: exact, and a good image weighs the same wherever it stands.

    Args:
        k: rank of the neighbour; at most 1 % of the stored images. The paper uses 50 of 50,000; on dev sources 1 is
            better than 10, and 10 better than 46.
        bank: maximum number of normal images stored, a random sample of more; more take longer to search.
        score: indicator used as score: `distance` to the k-th neighbour, or `mean` distance to the k nearest.
    """

    choices: ClassVar[frozenset[str]] = frozenset({"k", "bank", "score"})

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
        self.bank = self.squares = np.zeros(0)

    @property
    def neighbours(self) -> int:
        """The k that is used: as configured, at most a hundredth of the images kept, at least 1."""
        return max(1, min(int(self.config["k"]), len(self.bank) // 100))

    def describe(self) -> dict[str, Any]:
        """With the number of good images kept and the neighbour used."""
        return {**super().describe(), "bank": len(self.bank), "neighbours": self.neighbours}

    def fit_statistics(self, measurements: Measurements) -> None:
        """Keeps the good images' unit vectors."""
        table = self.table(measurements)
        chosen = np.random.default_rng(self.seed).permutation(len(table))[: self.config["bank"]]
        # kept in float32; rounded here, so that a loaded detector sees the same
        self._keep(self._unit(table[np.sort(chosen)]).astype(np.float32))

    def _keep(self, bank: np.ndarray) -> None:
        self.bank = bank.astype(np.float64)
        self.squares = np.square(self.bank).sum(1)

    @staticmethod
    def _unit(table: np.ndarray) -> np.ndarray:
        """Vectors of length 1; one of length 0 stays."""
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`distance` and `mean`."""
        unit = self._unit(self.table(measurements))
        gaps = self.squares - 2 * unit @ self.bank.T
        nearest = np.argpartition(gaps, self.neighbours - 1, axis=1)[:, : self.neighbours]
        # computed again from differences: products cancel where a good image is very near
        rows = [np.linalg.norm(one - self.bank[some], axis=1) for one, some in zip(unit, nearest)]
        distances = np.sort(np.stack(rows), axis=1)
        found = {"distance": distances[:, -1], "mean": distances.mean(1)}
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The unit vectors."""
        return {"bank": self.bank.astype(np.float32)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self._keep(state["bank"])
