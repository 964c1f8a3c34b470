"""The densities of `farout.features.densities` as torch modules in float64, for exported graphs.

They use `mm`, since the export of `matmul` with a dynamic batch fails in torch 2.6.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from farout.features.densities import ClassMahalanobis, GaussianMixture, Mahalanobis, PrincipalComponents

__all__ = [
    "ClassMahalanobisModule",
    "GaussianMixtureModule",
    "MahalanobisModule",
    "PrincipalComponentsModule",
    "ZScoreModule",
    "add_array",
]


def add_array(module: nn.Module, name: str, array: np.ndarray | Tensor) -> None:
    """Register an array as a float64 buffer."""
    module.register_buffer(name, torch.as_tensor(np.array(array, dtype=np.float64)))


class ZScoreModule(nn.Module):
    """(x - mean) / std of a table (B, d)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        add_array(self, "mean", mean)
        add_array(self, "std", std)

    def forward(self, x: Tensor) -> Tensor:
        """The z-scores, float64 (B, d)."""
        return (x.double() - self.mean) / self.std


class MahalanobisModule(nn.Module):
    """`Mahalanobis.score`."""

    precision: Tensor

    def __init__(self, fitted: Mahalanobis) -> None:
        super().__init__()
        self.standardize = ZScoreModule(fitted.mean, fitted.std)
        add_array(self, "precision", fitted.precision)

    def forward(self, x: Tensor) -> Tensor:
        """Table (B, d) -> (B,)."""
        z = self.standardize(x)
        return (torch.mm(z, self.precision) * z).sum(1) / z.shape[1]


class ClassMahalanobisModule(nn.Module):
    """`ClassMahalanobis.score`."""

    means: Tensor
    root: Tensor

    def __init__(self, fitted: ClassMahalanobis) -> None:
        super().__init__()
        self.standardize = ZScoreModule(fitted.mean, fitted.std)
        add_array(self, "means", fitted.means)
        add_array(self, "root", fitted.root)

    def forward(self, x: Tensor) -> Tensor:
        """Table (B, d) -> (B,)."""
        whitened = torch.mm(self.standardize(x), self.root)
        distances = [(whitened - mean).square().sum(1) for mean in self.means]
        return torch.stack(distances, dim=1).amin(1) / whitened.shape[1]


class PrincipalComponentsModule(nn.Module):
    """`PrincipalComponents.project`."""

    axes: Tensor

    def __init__(self, fitted: PrincipalComponents) -> None:
        super().__init__()
        self.standardize = ZScoreModule(fitted.mean, fitted.std)
        add_array(self, "axes", fitted.axes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Table (B, d) -> coordinates (B, k) and residual (B, d)."""
        z = self.standardize(x)
        coordinates = torch.mm(z, self.axes)
        return coordinates, z - torch.mm(coordinates, self.axes.T)


class GaussianMixtureModule(nn.Module):
    """`GaussianMixture.score`."""

    means: Tensor
    roots: Tensor
    constant: Tensor

    def __init__(self, fitted: GaussianMixture) -> None:
        super().__init__()
        self.standardize = ZScoreModule(fitted.mean, fitted.std)
        logdets = [np.log(np.diag(root)).sum() for root in fitted.roots]
        constant = np.array(logdets) - 0.5 * fitted.means.shape[1] * math.log(2 * math.pi) + np.log(fitted.weights)
        for name, array in {"means": fitted.means, "roots": fitted.roots, "constant": constant}.items():
            add_array(self, name, array)

    def forward(self, x: Tensor) -> Tensor:
        """Table (B, d) -> (B,)."""
        z = self.standardize(x)
        distances = [
            torch.mm(z - mean, root).square().sum(1) for mean, root in zip(self.means, self.roots, strict=True)
        ]
        return -torch.logsumexp(self.constant - 0.5 * torch.stack(distances, dim=1), dim=1)
