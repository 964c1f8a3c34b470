"""The exact denoiser of a finite set of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition

__all__ = ["EmpiricalDenoiser", "measure_neighbor_distances"]

_BYTES_PER_CHUNK = 64 * 2**20


class EmpiricalDenoiser:
    """The denoiser that minimizes the denoising loss over n vectors x_i of equal weight (Karras et al. 2022, eq. 57).

        D(x, sigma) = sum_i w_i x_i,  w = softmax_i(-||x - x_i||^2 / (2 (sigma s_i)^2))

    With all scales s_i = 1 it is the limit of a network that is trained on these vectors for long. For a small sigma it
    is the nearest vector, for a large one the mean. (D(x, sigma) - x) / sigma^2 is then the gradient of the log density
    of a Gaussian kernel density estimate.

    With the distance of x_i to its k-th neighbor as s_i the kernels are narrow where vectors are dense (the variable
    kernel estimate of Breiman, Meisel and Purcell 1977). Their factor s_i^-width is left out: in hundreds of dimensions
    the few narrowest kernels would have all the weight. Everything is computed in float64 on the device of the vectors.

    Args:
        vectors: (n, width), n >= 1.
        scales: (n,), positive; default: 1.

    Attributes:
        evaluations: rows evaluated so far.
    """

    def __init__(self, vectors: Tensor, scales: Tensor | None = None) -> None:
        _check_vectors(vectors)
        if scales is not None and (scales.shape != vectors.shape[:1] or not (scales > 0).all()):
            raise FaroutError(f"expected {len(vectors)} positive scales, got shape {tuple(scales.shape)}")
        self.vectors = vectors.double()
        self.scales = self.vectors.new_ones(len(vectors)) if scales is None else scales.to(self.vectors)
        self.squares = self.vectors.square().sum(1)
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, width), sigma (B,) -> the expected clean vectors (B, width), in x's type."""
        self.evaluations += len(x)
        averages = [torch.empty_like(x)[:0]]
        rows = _rows_per_chunk(len(self.vectors))
        for chunk, level in zip(x.double().split(rows), sigma.double().split(rows), strict=True):
            bandwidths = level[:, None] * self.scales
            logits = -_squared_distances(chunk, self.vectors, self.squares) / (2 * bandwidths**2)
            averages.append((logits.softmax(1) @ self.vectors).to(x.dtype))
        return torch.cat(averages)


def measure_neighbor_distances(vectors: Tensor, neighbor: int = 10) -> Tensor:
    """Distance of each of the vectors (n, width) to its `neighbor`-th nearest other one: (n,) float64.

    With fewer others, the distance to the most distant one. Distances below a tenth of their median are raised to it,
    so that copies of a vector do not get a kernel of no width; if the median is 0, all are at least 1e-6.
    """
    _check_vectors(vectors)
    vectors = vectors.double()
    squares = vectors.square().sum(1)
    rank = 1 + min(neighbor, len(vectors) - 1)  # the nearest is the vector itself
    nearest = [
        _squared_distances(chunk, vectors, squares).kthvalue(rank, dim=1).values
        for chunk in vectors.split(_rows_per_chunk(len(vectors)))
    ]
    distances = torch.cat(nearest).sqrt()
    return distances.clamp(min=max(0.1 * float(distances.median()), 1e-6))


def _check_vectors(vectors: Tensor) -> None:
    if vectors.ndim != 2 or not len(vectors):
        raise FaroutError(f"expected vectors (n, width) with n >= 1, got shape {tuple(vectors.shape)}")


def _rows_per_chunk(count: int) -> int:
    return max(1, _BYTES_PER_CHUNK // (8 * count))


def _squared_distances(x: Tensor, vectors: Tensor, squares: Tensor) -> Tensor:
    return (x.square().sum(1, keepdim=True) - 2 * x @ vectors.T + squares).clamp(min=0)
