"""A Gaussian per class in the flat space: densities, distances, and samples from the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.training.data_order import seed_of

__all__ = ["ClassGaussians", "sample_noise_round"]

_SHRINKAGE_GRID = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class ClassGaussians:
    """N(m_c, C_c) of each class c, with C_c = L_c L_c^T; everything in float64, on the CPU.

    Attributes:
        means: m_c, (classes, D).
        cholesky: L_c, lower triangular with a positive diagonal, (classes, D, D).
        strength: lambda, which was added to the diagonal of each covariance (in the units of z), or the shrinkage a.
    """

    means: Tensor
    cholesky: Tensor
    strength: float

    @classmethod
    def fit_ridge(
        cls, z: Tensor, labels: Tensor, names: Sequence[str], weight: float, *, relative: bool
    ) -> ClassGaussians:
        """Fit C_c = S_c + lambda I, with the unbiased covariance S_c.

        Args:
            z: flat vectors (N, D), two or more of each class.
            labels: their classes (N,).
            names: names of the classes.
            weight: lambda; with `relative`, lambda divided by the mean of tr(S_c) / D over the classes.
            relative: see `weight`.

        Raises FaroutError if a covariance has no Cholesky factor.
        """
        means, covariances = _fit_moments(z, labels, len(names))
        unit = float(covariances.diagonal(dim1=1, dim2=2).mean()) if relative else 1.0
        ridge = weight * unit
        identity = torch.eye(z.shape[1], dtype=torch.float64)
        return cls(means, _factorize(covariances + ridge * identity, names), ridge)

    @classmethod
    def fit_shrinkage(
        cls, z: Tensor, labels: Tensor, names: Sequence[str], held_out: tuple[Tensor, Tensor]
    ) -> ClassGaussians:
        """Fit C_c = (1 - a) S_c + a tr(S_c) / D I, with the a that gives held-out vectors the highest mean log density.

        a is the same for all classes, from a grid from 0.001 to 1. `held_out`: vectors (H, D) and labels (H,).
        """
        means, covariances = _fit_moments(z, labels, len(names))
        mean_variances = covariances.diagonal(dim1=1, dim2=2).mean(1)
        log_likelihood = torch.zeros(len(_SHRINKAGE_GRID), dtype=torch.float64)
        a = torch.tensor(_SHRINKAGE_GRID, dtype=torch.float64)[:, None]
        for label in sorted(set(held_out[1].tolist())):
            # shrinkage keeps the eigenvectors of S_c: one decomposition gives the likelihood for every a
            eigenvalues, eigenvectors = torch.linalg.eigh(covariances[label])
            variances = (1 - a) * eigenvalues.clamp(min=0) + a * mean_variances[label]
            centered = held_out[0][held_out[1] == label].double() - means[label]
            squares = (centered @ eigenvectors).square()
            log_likelihood -= 0.5 * (
                (squares[None] / variances[:, None]).sum((1, 2)) + len(squares) * variances.log().sum(1)
            )
        best = _SHRINKAGE_GRID[int(log_likelihood.argmax())]
        identity = torch.eye(z.shape[1], dtype=torch.float64)
        shrunk = (1 - best) * covariances + best * mean_variances[:, None, None] * identity
        return cls(means, _factorize(shrunk, names), best)

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def distances(self, z: Tensor, labels: Tensor) -> Tensor:
        """Squared Mahalanobis distance per coordinate, (z - m_c)^T C_c^-1 (z - m_c) / D: (N,) float64.

        1 on average for samples of the Gaussian.
        """
        distances = torch.empty(len(z), dtype=torch.float64)
        for label in set(labels.tolist()):
            rows = labels == label
            centered = (z[rows].double() - self.means[label]).mT
            whitened = torch.linalg.solve_triangular(self.cholesky[label], centered, upper=False)
            distances[rows] = whitened.square().mean(0)
        return distances

    def log_density(self, distances: Tensor, labels: Tensor) -> Tensor:
        """log N(z; m_c, C_c), (N,), of vectors with these `distances` from the classes `labels`."""
        half_log_determinants = self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        return -0.5 * self.dim * (distances + math.log(2 * math.pi)) - half_log_determinants[labels]

    def sample_tail(
        self, label: int, number: int, seed: int, *, candidates: int, kept: int, temperature: float
    ) -> Tensor:
        """Round `number` of a class: the `kept` of `candidates` samples with the lowest density, the lowest first.

        They depend on (seed, label, number) only. Returns (kept, D) float64.
        """
        noise = sample_noise_round(self.dim, candidates, seed, label, number)
        # the Mahalanobis distance of m + L e is |e|: only the samples that are kept need the multiplication
        order = noise.square().sum(1).argsort(descending=True, stable=True)
        return self.means[label] + temperature * noise[order[:kept]] @ self.cholesky[label].mT


def sample_noise_round(dim: int, candidates: int, seed: int, label: int, number: int) -> Tensor:
    """Standard normal noise (candidates, dim) float64 of one round of one class."""
    generator = torch.Generator().manual_seed(seed_of(seed, "draw", label, number))
    return torch.randn(candidates, dim, generator=generator, dtype=torch.float64)


def _fit_moments(z: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Means (classes, D) and unbiased covariances (classes, D, D)."""
    groups = [z[labels == label].double() for label in range(classes)]
    return torch.stack([rows.mean(0) for rows in groups]), torch.stack([rows.mT.cov() for rows in groups])


def _factorize(covariances: Tensor, names: Sequence[str]) -> Tensor:
    """Cholesky factors; raises FaroutError for singular covariances."""
    factors, failed = torch.linalg.cholesky_ex(covariances)
    if failed.any():
        first = names[int(failed.nonzero()[0])]
        raise FaroutError(
            f"the covariances of {int((failed > 0).sum())} of {len(names)} classes ({first!r} for one) are singular; "
            "give a larger reg_weight, or regularization='held_out'"
        )
    # column-major factors give sums that differ in the last bits from those of a loaded, row-major factor
    return factors.contiguous()
