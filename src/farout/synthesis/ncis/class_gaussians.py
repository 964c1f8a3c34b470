"""A Gaussian per class, fitted to flat vectors: densities, distances, and draws from the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.training.data_order import seed_of

__all__ = ["ClassGaussians", "draw_round"]

_SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class ClassGaussians:
    """N(m_c, L_c L_c^T) for each class c; everything in float64, on the CPU.

    Attributes:
        means: m_c, (classes, D).
        roots: L_c, lower triangular with a positive diagonal, (classes, D, D).
        strength: what was added to each covariance (lambda, in the units of z), or the shrinkage a.
    """

    means: Tensor
    roots: Tensor
    strength: float

    @classmethod
    def ridged(
        cls, z: Tensor, labels: Tensor, names: Sequence[str], weight: float, *, relative: bool
    ) -> ClassGaussians:
        """Unbiased covariances S_c + lambda I; lambda = weight, or `relative` weight times the mean of tr(S_c) / D over
        classes. z (N, D), labels (N,), two or more vectors a class.

        Raises FaroutError where a covariance has no Cholesky factor.
        """
        means, covariances = _moments(z, labels, len(names))
        variance = float(covariances.diagonal(dim1=1, dim2=2).mean()) if relative else 1.0
        ridge = weight * variance
        return cls(means, _roots(covariances + ridge * torch.eye(z.shape[1], dtype=torch.float64), names), ridge)

    @classmethod
    def shrunk(cls, z: Tensor, labels: Tensor, names: Sequence[str], held_out: tuple[Tensor, Tensor]) -> ClassGaussians:
        """(1 - a) S_c + a tr(S_c) / D I, with the a of a grid from 0.001 to 1 that gives the held-out vectors (H, D)
        and their labels (H,) the highest mean log density; the same a for all classes.
        """
        means, covariances = _moments(z, labels, len(names))
        spheres = covariances.diagonal(dim1=1, dim2=2).mean(1)
        total = torch.zeros(len(_SHRINKAGES), dtype=torch.float64)
        a = torch.tensor(_SHRINKAGES, dtype=torch.float64)[:, None]
        for label in held_out[1].unique().tolist():
            values, axes = torch.linalg.eigh(covariances[label])
            spread = (1 - a) * values.clamp(min=0) + a * spheres[label]
            squares = ((held_out[0][held_out[1] == label].double() - means[label]) @ axes).square()
            total -= 0.5 * ((squares[None] / spread[:, None]).sum((1, 2)) + len(squares) * spread.log().sum(1))
        best = _SHRINKAGES[int(total.argmax())]
        identity = torch.eye(z.shape[1], dtype=torch.float64)
        mixed = (1 - best) * covariances + best * spheres[:, None, None] * identity
        return cls(means, _roots(mixed, names), best)

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def distances(self, z: Tensor, labels: Tensor) -> Tensor:
        """(z - m_c)^T C_c^-1 (z - m_c) / D, (N,) float64: squared distance per coordinate, 1 on average for draws."""
        out = torch.empty(len(z), dtype=torch.float64)
        for label in labels.unique().tolist():
            rows = labels == label
            apart = (z[rows].double() - self.means[label]).mT
            out[rows] = torch.linalg.solve_triangular(self.roots[label], apart, upper=False).square().mean(0)
        return out

    def log_density(self, distances: Tensor, labels: Tensor) -> Tensor:
        """log N(z; m_c, C_c), (N,), of z at these `distances` from class c."""
        log_volumes = self.roots.diagonal(dim1=1, dim2=2).log().sum(1)
        return -0.5 * self.dim * (distances + math.log(2 * math.pi)) - log_volumes[labels]

    def tail(self, label: int, number: int, seed: int, *, draws: int, kept: int, temperature: float) -> Tensor:
        """(kept, D) float64: of round `number` of `draws` draws of one class those of the lowest density, lowest first.

        They follow from (seed, label, number) alone.
        """
        drawn = draw_round(self.dim, draws, seed, label, number)
        # |L e|^2 under the Gaussian is |e|^2: only what is kept need be multiplied
        order = drawn.square().sum(1).argsort(descending=True, stable=True)
        return self.means[label] + temperature * drawn[order[:kept]] @ self.roots[label].mT


def draw_round(dim: int, draws: int, seed: int, label: int, number: int) -> Tensor:
    """Standard normal (draws, dim) float64 of one round of one class."""
    generator = torch.Generator().manual_seed(seed_of(seed, "draw", label, number))
    return torch.randn(draws, dim, generator=generator, dtype=torch.float64)


def _moments(z: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    groups = [z[labels == label].double() for label in range(classes)]
    return torch.stack([rows.mean(0) for rows in groups]), torch.stack([rows.mT.cov() for rows in groups])


def _roots(covariances: Tensor, names: Sequence[str]) -> Tensor:
    roots, failed = torch.linalg.cholesky_ex(covariances)
    if failed.any():
        first = names[int(failed.nonzero()[0])]
        raise FaroutError(
            f"the covariances of {int((failed > 0).sum())} of {len(names)} classes ({first!r} for one) are singular; "
            "give a larger reg_weight, or regularization='held_out'"
        )
    return roots.contiguous()  # sums of a column-major factor differ in their last bits from those of a loaded one
