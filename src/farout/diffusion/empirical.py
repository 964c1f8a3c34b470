"""The exact denoiser of a finite set of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition

__all__ = ["EmpiricalDenoiser"]

_BYTES_PER_CHUNK = 64 * 2**20


class EmpiricalDenoiser:
    """The denoiser that minimizes the denoising loss over n vectors x_i of equal weight (Karras et al. 2022, eq. 57).

        D(x, sigma) = sum_i w_i x_i,  w = softmax_i(-||x - x_i||^2 / (2 sigma^2))

    It is the limit of a network that is trained on these vectors for long. For a small sigma it is the nearest vector,
    for a large one the mean. (D(x, sigma) - x) / sigma^2 is the gradient of the log density of a Gaussian kernel
    density estimate. Everything is computed in float64 on the device of the vectors.

    Args:
        vectors: (n, width), n >= 1.

    Attributes:
        evaluations: rows evaluated so far.
    """

    def __init__(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or not len(vectors):
            raise FaroutError(f"expected vectors (n, width) with n >= 1, got shape {tuple(vectors.shape)}")
        self.vectors = vectors.double()
        self.squares = self.vectors.square().sum(1)
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, width), sigma (B,) -> the expected clean vectors (B, width), in x's type."""
        self.evaluations += len(x)
        return self._average(x.double(), sigma.double()).to(x.dtype)

    def neighbor_distance(self, neighbor: int = 10, sample: int = 1000) -> float:
        """Median distance of the vectors to their `neighbor`-th nearest other one, from at most `sample` of them.

        Vectors of a set with fewer others are compared with the most distant one.
        """
        step = max(1, len(self.vectors) // sample)
        indices = torch.arange(0, len(self.vectors), step)[:sample]
        rank = 1 + min(neighbor, len(self.vectors) - 1)  # the nearest is the vector itself
        chunks = indices.split(self._rows_per_chunk())
        nearest = [self._squared_distances(self.vectors[chunk]).kthvalue(rank, dim=1).values for chunk in chunks]
        return float(torch.cat(nearest).sqrt().median())

    def _rows_per_chunk(self) -> int:
        return max(1, _BYTES_PER_CHUNK // (8 * len(self.vectors)))

    def _squared_distances(self, x: Tensor) -> Tensor:
        products = x @ self.vectors.T
        return (x.square().sum(1, keepdim=True) - 2 * products + self.squares).clamp(min=0)

    def _average(self, x: Tensor, sigma: Tensor) -> Tensor:
        averages = []
        for rows in torch.arange(len(x)).split(self._rows_per_chunk()):
            logits = -self._squared_distances(x[rows]) / (2 * sigma[rows, None] ** 2)
            averages.append(logits.softmax(1) @ self.vectors)
        return torch.cat(averages) if averages else x
