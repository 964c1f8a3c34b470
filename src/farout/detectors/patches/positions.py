"""Features at the positions of an image: samples, nearest neighbors, and standardization over normal positions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.features.densities import ZScore

__all__ = [
    "PositionStatistics",
    "average_highest",
    "equal_layer_weights",
    "nearest_distances",
    "rank_by_hash",
    "sample_indices",
]


def rank_by_hash(name: str, seed: int) -> int:
    """A random number from the seed and a name; ranking images by it gives a sample independent of their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")


def sample_indices(total: int, count: int, seed: int, name: str) -> Tensor:
    """`count` different indices below `total` (all, if there are fewer), which depend on seed and name alone."""
    generator = np.random.default_rng(rank_by_hash(name, seed))
    return torch.from_numpy(np.sort(generator.permutation(total)[:count]))


def equal_layer_weights(groups: Sequence[int]) -> Tensor:
    """Weights (c,) with sum 1 that give every layer the same total weight, whatever its number of channels."""
    return torch.cat([torch.full((width,), 1 / (width * len(groups))) for width in groups])


def nearest_distances(vectors: Tensor, bank: Tensor) -> Tensor:
    """Distance of each vector (P, c) to the nearest row of the bank (N, c): (P,)."""
    # ||v - b||^2 = ||v||^2 - 2 v b + ||b||^2; ||v||^2 does not change which row is the nearest
    nearest = torch.addmm(bank.square().sum(1), vectors, bank.T, alpha=-2).argmin(1)  # one pass over (P, N) fewer
    # These products cancel where a row is very near: the distance is computed from the difference.
    return (vectors - bank[nearest]).square().sum(1).sqrt()


def average_highest(values: Tensor, share: float) -> Tensor:
    """Mean of the highest `share` of each row (B, P), at least of one value: (B,)."""
    count = max(1, int(share * values.shape[1]))
    return values.topk(count, dim=1).values.mean(1)


@dataclass(frozen=True)
class PositionStatistics:
    """Mean and deviation of errors and nearest distances over all positions of normal images.

    Each level's error is standardized, and so is the mean over levels (which varies less than a single level).

    Attributes:
        errors: statistics of the error of each level.
        mean_error: statistics of the mean over levels of the standardized errors.
        distances: statistics of the nearest distances.
    """

    errors: ZScore
    mean_error: ZScore
    distances: ZScore

    @classmethod
    def fit(cls, errors: np.ndarray, distances: np.ndarray) -> Self:
        """Fit to errors (n, level) and distances (n,) at n positions; raises FaroutError for NaN."""
        if not (np.isfinite(errors).all() and np.isfinite(distances).all()):
            raise FaroutError("errors of the statistics images are not all numbers; look for damaged images or weights")
        levels = ZScore.fit(errors)
        return cls(levels, ZScore.fit(levels.score(errors)[:, None]), ZScore.fit(distances[:, None]))

    def standardize_errors(self, errors: Tensor) -> Tensor:
        """Errors (n, level) -> standard deviations above normal positions (n,), float64."""
        return torch.from_numpy(self.mean_error.score(self.errors.score(errors.numpy())[:, None]))

    def standardize_distances(self, distances: Tensor) -> Tensor:
        """Distances (n,) -> standard deviations above normal positions (n,), float64."""
        return torch.from_numpy(self.distances.score(distances.numpy()[:, None]))
