"""Invertible maps of vectors, class by class, that keep volume (|det J| = 1): densities pass through unchanged."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from farout.core.errors import FaroutError

__all__ = ["ClassRotations", "ConditionalCoupling", "OrthogonalLayers", "OrthogonalMap", "VolumePreservingNetwork"]

OrthogonalMap = Literal["matrix_exp", "cayley"]


class OrthogonalLayers(nn.Module):
    """`count` layers y = W x + b, W orthogonal with det W = 1, by PyTorch's parametrisation of a skew matrix A.

    matrix_exp: W = exp(A), A = T - T^T of the strictly lower triangle T of a trainable square, drawn from
    uniform(-pi, pi): the paper's start and the paper's coordinates (it takes the upper triangle, which is the same up
    to a sign). cayley: W = B (I + A/2)(I - A/2)^-1, A = 0 at the start and B = exp of such a draw, fixed: the start has
    the same distribution (A itself drawn so wide would put nearly all of Cayley's angles at pi, where its gradient
    vanishes), the coordinates differ, and no exponential is differentiated. b starts at uniform(+-1/sqrt(dim)).

    All matrices are one parametrised tensor (count, dim, dim): reading `weight` computes them together, once, and
    inside `torch.nn.utils.parametrize.cached()` once for all reads. Parameters: count (dim^2 + dim), the whole square
    counted; B is a buffer.
    """

    def __init__(self, count: int, dim: int, orthogonal_map: OrthogonalMap) -> None:
        super().__init__()
        square = torch.empty(count, dim, dim).uniform_(-math.pi, math.pi)
        self.bias = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))
        plain = orthogonal_map == "matrix_exp"
        if not plain:
            lower = square.double().tril(-1)
            square = torch.matrix_exp(lower - lower.mT).float()
        self.weight = nn.Parameter(square)
        parametrizations.orthogonal(self, "weight", orthogonal_map, use_trivialization=not plain)


class ConditionalCoupling(nn.Module):
    """x = [x1, x2] -> [x1 + m(x2, c), x2]: additive, so |det J| = 1 for any m; c is the class's embedding.

    x1 are the first floor(dim / 2) coordinates. With h = 4 ceil(dim / 2) and s the sigmoid,
    u = Linear(s(Linear(x2))) + Linear(SiLU(c)), m = Linear(s(Linear(s(u)))), all hidden widths h.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.split = [dim // 2, dim - dim // 2]
        hidden = 4 * self.split[1]
        self.enter = nn.Sequential(nn.Linear(self.split[1], hidden), nn.Sigmoid(), nn.Linear(hidden, hidden))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))
        self.leave = nn.Sequential(
            nn.Sigmoid(), nn.Linear(hidden, hidden), nn.Sigmoid(), nn.Linear(hidden, self.split[0])
        )

    def _shift(self, rest: Tensor, embedding: Tensor) -> Tensor:
        return self.leave(self.enter(rest) + self.condition(embedding))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, dim), embedding (B, h) -> (B, dim)."""
        first, rest = x.split(self.split, dim=1)
        return torch.cat([first + self._shift(rest, embedding), rest], dim=1)

    def inverse(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Undoes `forward`."""
        first, rest = x.split(self.split, dim=1)
        return torch.cat([first - self._shift(rest, embedding), rest], dim=1)


class VolumePreservingNetwork(nn.Module):
    """x -> [orthogonal layer -> conditional coupling] x layers -> orthogonal layer -> z, |det dz/dx| = 1.

    The class-conditional volume-preserving network of Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier
    synthesis for out-of-distribution detection", arXiv 2411.13619: a density of z given the class is the density of x.
    With dim 768, 100 classes and 4 layers it has 36,162,816 parameters, all squares behind orthogonal matrices counted.
    Odd dimensions work. Weights are drawn from torch's default generator.

    Args:
        dim: D, at least 2.
        classes: rows of the table of class embeddings, standard normal at the start, which all couplings share.
        layers: number of couplings.
        orthogonal_map: see `OrthogonalLayers`.

    Raises FaroutError for other values.
    """

    def __init__(self, dim: int, classes: int, *, layers: int = 4, orthogonal_map: OrthogonalMap = "cayley") -> None:
        super().__init__()
        if dim < 2 or min(classes, layers) < 1:
            raise FaroutError(
                f"a volume-preserving network requires at least 2 dimensions, 1 class and 1 layer, got {dim}, "
                f"{classes} "
                f"and {layers}"
            )
        if orthogonal_map not in ("matrix_exp", "cayley"):
            raise FaroutError(f"the orthogonal map is {orthogonal_map!r}; expected matrix_exp or cayley")
        self.rotations = OrthogonalLayers(layers + 1, dim, orthogonal_map)
        self.couplings = nn.ModuleList(ConditionalCoupling(dim) for _ in range(layers))
        self.table = nn.Embedding(classes, 4 * (dim - dim // 2))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, D), labels (B,) in 0 .. classes - 1 -> z (B, D)."""
        weight, bias, embedding = self.rotations.weight, self.rotations.bias, self.table(labels)
        for index, coupling in enumerate(self.couplings):
            x = coupling(x @ weight[index].mT + bias[index], embedding)
        return x @ weight[-1].mT + bias[-1]

    def inverse(self, z: Tensor, labels: Tensor) -> Tensor:
        """Undoes `forward`."""
        weight, bias, embedding = self.rotations.weight, self.rotations.bias, self.table(labels)
        z = (z - bias[-1]) @ weight[-1]
        for index in reversed(range(len(self.couplings))):
            z = (self.couplings[index].inverse(z, embedding) - bias[index]) @ weight[index]
        return z


class ClassRotations(nn.Module):
    """z = V_c^T (x - m_c): a rotation per class, the linear baseline for `VolumePreservingNetwork`.

    Fitted, V_c are the principal axes of class c by falling variance, so that the last coordinates vary least. A
    Gaussian of z is then one of x whose covariance is not changed but written in its own axes.

    Args:
        means: m_c, (classes, D).
        axes: V_c as columns, (classes, D, D).
    """

    means: Tensor
    axes: Tensor

    def __init__(self, means: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("axes", axes)

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, classes: int) -> ClassRotations:
        """From x (N, D) and labels (N,), every class with a vector; computed in float64, kept in float32."""
        means, axes = [], []
        for label in range(classes):
            rows = x[labels == label].double()
            means.append(rows.mean(0))
            # eigh sorts by rising variance
            axes.append(torch.linalg.eigh((rows - means[-1]).mT @ (rows - means[-1]))[1].flip(1))
        return cls(torch.stack(means).float(), torch.stack(axes).float())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, D), labels (B,) -> z (B, D)."""
        out = torch.empty_like(x)
        for label in labels.unique().tolist():
            rows = labels == label
            out[rows] = (x[rows] - self.means[label]) @ self.axes[label]
        return out

    def inverse(self, z: Tensor, labels: Tensor) -> Tensor:
        """Undoes `forward`."""
        out = torch.empty_like(z)
        for label in labels.unique().tolist():
            rows = labels == label
            out[rows] = z[rows] @ self.axes[label].mT + self.means[label]
        return out
