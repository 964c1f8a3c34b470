"""Invertible class-conditional maps of vectors with |det J| = 1, under which densities do not change."""

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
    """`count` layers y = W x + b with W orthogonal and det W = 1, by PyTorch's parametrization of a skew matrix A.

    - `matrix_exp`: W = exp(A), A = T - T^T, where T is the strictly lower triangle of a trainable square, initialized
      from uniform(-pi, pi), as in the paper (which uses the upper triangle; the two differ by a sign).
    - `cayley`: W = B (I + A/2)(I - A/2)^-1 with A = 0 at the start, and B the fixed exp of a random A as above. W has
      the same initial distribution, and no matrix exponential is differentiated. (Initializing A itself from
      uniform(-pi, pi) would put nearly all rotation angles at pi, where the gradient of Cayley's map vanishes.)

    b is initialized from uniform(+-1/sqrt(dim)). All matrices are one parametrized tensor (count, dim, dim): reading
    `weight` computes them together, and only once inside `torch.nn.utils.parametrize.cached()`. There are
    count (dim^2 + dim) parameters, the full squares counted; B is a buffer.
    """

    def __init__(self, count: int, dim: int, orthogonal_map: OrthogonalMap) -> None:
        super().__init__()
        square = torch.empty(count, dim, dim).uniform_(-math.pi, math.pi)
        self.bias = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))
        uses_exponential = orthogonal_map == "matrix_exp"
        if not uses_exponential:
            lower = square.double().tril(-1)
            square = torch.matrix_exp(lower - lower.mT).float()
        self.weight = nn.Parameter(square)
        parametrizations.orthogonal(self, "weight", orthogonal_map, use_trivialization=not uses_exponential)


class ConditionalCoupling(nn.Module):
    """Additive coupling [x1, x2] -> [x1 + m(x2, c), x2], with |det J| = 1 for any m; c is the class embedding.

    x1 are the first floor(dim / 2) coordinates. With the sigmoid s and hidden widths h = 4 ceil(dim / 2),
    u = Linear(s(Linear(x2))) + Linear(SiLU(c)) and m = Linear(s(Linear(s(u)))).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.split = [dim // 2, dim - dim // 2]
        hidden = 4 * self.split[1]
        self.input = nn.Sequential(nn.Linear(self.split[1], hidden), nn.Sigmoid(), nn.Linear(hidden, hidden))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))
        self.output = nn.Sequential(
            nn.Sigmoid(), nn.Linear(hidden, hidden), nn.Sigmoid(), nn.Linear(hidden, self.split[0])
        )

    def _shift(self, x2: Tensor, embedding: Tensor) -> Tensor:
        """m(x2, c)."""
        shift: Tensor = self.output(self.input(x2) + self.condition(embedding))
        return shift

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, dim), embedding (B, h) -> (B, dim)."""
        x1, x2 = torch.split(x, self.split, dim=1)
        return torch.cat([x1 + self._shift(x2, embedding), x2], dim=1)

    def inverse(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The inverse of `forward`."""
        x1, x2 = torch.split(x, self.split, dim=1)
        return torch.cat([x1 - self._shift(x2, embedding), x2], dim=1)


class VolumePreservingNetwork(nn.Module):
    """x -> [orthogonal layer -> conditional coupling] x layers -> orthogonal layer -> z, with |det dz/dx| = 1.

    The class-conditional volume-preserving network of Doorenbos, Sznitman and Marquez-Neila, "Non-linear outlier
    synthesis for out-of-distribution detection", arXiv 2411.13619: a density of z given the class is the density of x.
    With dim 768, 100 classes and 4 layers it has 36,162,816 parameters, the full squares of the orthogonal matrices
    counted. Odd dimensions work. Weights are initialized from torch's default generator.

    Args:
        dim: D, at least 2.
        classes: number of class embeddings, initialized as standard normal; all couplings share them.
        layers: number of couplings.
        orthogonal_map: see `OrthogonalLayers`.

    Raises FaroutError for other values.
    """

    def __init__(self, dim: int, classes: int, *, layers: int = 4, orthogonal_map: OrthogonalMap = "cayley") -> None:
        super().__init__()
        if dim < 2 or min(classes, layers) < 1:
            raise FaroutError(
                f"a volume-preserving network requires at least 2 dimensions, 1 class and 1 layer, got {dim}, "
                f"{classes} and {layers}"
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
        """The inverse of `forward`."""
        weight, bias, embedding = self.rotations.weight, self.rotations.bias, self.table(labels)
        z = (z - bias[-1]) @ weight[-1]
        for index in reversed(range(len(self.couplings))):
            coupling = self.couplings[index]
            assert isinstance(coupling, ConditionalCoupling)
            z = (coupling.inverse(z, embedding) - bias[index]) @ weight[index]
        return z


class ClassRotations(nn.Module):
    """z = V_c^T (x - m_c): a rotation per class, the linear baseline of `VolumePreservingNetwork`.

    The columns of V_c are the principal axes of class c by decreasing variance, so that the last coordinates vary
    least. A Gaussian of z is a Gaussian of x with the same covariance in rotated coordinates.

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
        """Fit to x (N, D) and labels (N,), with vectors of every class; computed in float64, stored in float32."""
        means, axes = [], []
        for label in range(classes):
            rows = x[labels == label].double()
            means.append(rows.mean(0))
            # eigh sorts by increasing variance
            axes.append(torch.linalg.eigh((rows - means[-1]).mT @ (rows - means[-1]))[1].flip(1))
        return cls(torch.stack(means).float(), torch.stack(axes).float())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, D), labels (B,) -> z (B, D)."""
        out = torch.empty_like(x)
        for label in set(labels.tolist()):
            rows = labels == label
            out[rows] = (x[rows] - self.means[label]) @ self.axes[label]
        return out

    def inverse(self, z: Tensor, labels: Tensor) -> Tensor:
        """The inverse of `forward`."""
        out = torch.empty_like(z)
        for label in set(labels.tolist()):
            rows = labels == label
            out[rows] = z[rows] @ self.axes[label].mT + self.means[label]
        return out
