"""What is known of features at good positions: a sample of them, layers of equal weight, distances, deviations."""

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

__all__ = ["Deviations", "drawn", "equal_layers", "flat", "nearest", "rank", "top"]


def flat(grid: Tensor) -> Tensor:
    """Features on a grid (B, c, side, side) -> (B, side * side, c), row by row."""
    return grid.flatten(2).transpose(1, 2).contiguous()


def drawn(places: int, wanted: int, seed: int, name: str) -> Tensor:
    """`wanted` different places of `places` (all, where those are fewer), from the seed and a name alone."""
    generator = np.random.default_rng(rank(name, seed))
    return torch.from_numpy(np.sort(generator.permutation(places)[:wanted]))


def rank(name: str, seed: int) -> int:
    """A number from the seed and a name: orders images by content, for a sample that their order does not decide."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")


def equal_layers(groups: Sequence[int]) -> Tensor:
    """Weights (c,) of sum 1 with which every layer counts the same, however many channels it has."""
    return torch.cat([torch.full((width,), 1 / (width * len(groups))) for width in groups])


def nearest(vectors: Tensor, bank: Tensor) -> Tensor:
    """Distance of each of (P, c) to the nearest row of the bank (N, c): (P,).

    Computed again from the difference: where a row is very near, the products that find it cancel.
    """
    gaps = bank.square().sum(1) - 2 * vectors @ bank.T
    return (vectors - bank[gaps.argmin(1)]).square().sum(1).sqrt()


def top(values: Tensor, share: float) -> Tensor:
    """Mean of the largest `share` of each row (B, P), at least one value: (B,)."""
    count = max(1, int(share * values.shape[1]))
    return values.topk(count, dim=1).values.mean(1)


@dataclass(frozen=True)
class Deviations:
    """How far values at positions lie above those of good images, in standard deviations over all their positions.

    Each level's error is standardised, the mean over levels is standardised again (a mean of several levels varies less
    than one), and so are the nearest distances.

    errors: statistics of the levels' errors; mean: of their mean; distances: of the nearest distances.
    """

    errors: ZScore
    mean: ZScore
    distances: ZScore

    @classmethod
    def fit(cls, errors: np.ndarray, distances: np.ndarray) -> Self:
        """From errors (n, level) and distances (n,) at n positions of good images; raises FaroutError for NaN."""
        if not (np.isfinite(errors).all() and np.isfinite(distances).all()):
            raise FaroutError("errors of the statistics images are not all numbers; look for damaged images or weights")
        each = ZScore.fit(errors)
        return cls(each, ZScore.fit(each.score(errors)[:, None]), ZScore.fit(distances[:, None]))

    def of_errors(self, errors: Tensor) -> Tensor:
        """(n, level) -> (n,) float64."""
        return torch.from_numpy(self.mean.score(self.errors.score(errors.numpy())[:, None]))

    def of_distances(self, distances: Tensor) -> Tensor:
        """(n,) -> (n,) float64."""
        return torch.from_numpy(self.distances.score(distances.numpy()[:, None]))
