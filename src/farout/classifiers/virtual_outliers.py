"""Virtual outliers: unlikely features, sampled from Gaussians that follow the classes while a classifier trains."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import gammainccinv
from torch import Tensor, nn

__all__ = ["VirtualOutliers", "sample_largest_radii"]

_RIDGE = 1e-4
"""Added to the diagonal of the covariance, as in the code of VOS."""


class VirtualOutliers(nn.Module):
    """Outliers in the space of penultimate features (Du et al. 2022, "VOS: learning what you don't know by virtual
    outlier synthesis", sections 3.1 and 3.2).

    A queue keeps the latest `queue` features of each class. They give the mean of each class and one covariance shared
    by the classes, S = (1 / n) sum (z - m_y)(z - m_y)^T + 1e-4 I. Of `draws` samples of each class's Gaussian the
    `virtual_per_class` least likely ones are outliers. All state is in buffers, so that a resumed
    training continues exactly; of several processes, the features of the main process are kept.

    Args:
        classes: number of classes K.
        width: number of features D.
        queue: features kept per class.
        draws: samples per class from which the outliers are selected.
        virtual_per_class: outliers per class, at most `draws`.
    """

    features: Tensor
    counts: Tensor

    def __init__(self, classes: int, width: int, queue: int, draws: int, virtual_per_class: int) -> None:
        super().__init__()
        self.draws, self.virtual_per_class = draws, virtual_per_class
        self.register_buffer("features", torch.zeros(classes, queue, width))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))

    @property
    def is_full(self) -> bool:
        """Whether the queues of all classes are full; there are no outliers before."""
        return bool((self.counts >= self.features.shape[1]).all())

    @torch.no_grad()
    def add_features(self, features: Tensor, labels: Tensor) -> None:
        """Add features (B, D) of classes (B,); they replace the oldest ones of each class."""
        size = self.features.shape[1]
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=len(self.counts))
        # rank: the number of earlier rows of the same class
        rank = torch.empty_like(labels)
        first = counts.cumsum(0) - counts
        rank[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
        is_kept = rank >= counts[labels] - size  # of more than the queue holds, the last ones
        slot = (self.counts[labels] + rank) % size
        self.features[labels[is_kept], slot[is_kept]] = features.detach().float()[is_kept]
        self.counts += counts

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means (K, D) and the shared covariance (D, D), float32; requires full queues."""
        with torch.autocast(self.features.device.type, enabled=False):
            means = self.features.mean(1)
            centered = (self.features - means[:, None]).flatten(0, 1)
            covariance = centered.T @ centered / len(centered)
            covariance.diagonal().add_(_RIDGE)
        return means, covariance

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Outliers (K * `virtual_per_class`, D), class by class; random numbers come from the CPU `generator`.

        The direction and the length of a standard normal vector are independent, and its likelihood depends on the
        length only. So directions are drawn for the selected samples only, and their lengths as the largest of
        `draws`: the same distribution without drawing the other samples.
        """
        means, covariance = self.statistics()
        classes, width = means.shape
        directions = torch.randn(classes, self.virtual_per_class, width, generator=generator)
        uniform = torch.rand(classes, self.virtual_per_class, generator=generator, dtype=torch.float64)
        radii = sample_largest_radii(uniform, width, self.draws)
        normals = directions / directions.norm(dim=2, keepdim=True) * radii[..., None].float()
        with torch.autocast(means.device.type, enabled=False):
            deviations = normals.to(means.device) @ torch.linalg.cholesky(covariance).T
            return (means[:, None] + deviations).flatten(0, 1)


def sample_largest_radii(uniform: Tensor, width: int, draws: int) -> Tensor:
    """Lengths of the longest of `draws` standard normal vectors of `width` entries, longest first.

    The largest of n uniform numbers is distributed as V^(1/n), the next largest is that times V'^(1/(n - 1)), and so
    on; the squared length at a probability u is the chi-square quantile of u. Logarithms keep 1 - u exact near u = 1.

    Args:
        uniform: (..., s) float64 in [0, 1), one uniform number for each of the s longest vectors.
        width: number of entries of a vector.
        draws: number of vectors.

    Returns:
        lengths (..., s).
    """
    remaining = torch.arange(draws, draws - uniform.shape[-1], -1, dtype=torch.float64)
    log_u = (torch.log1p(-uniform) / remaining).cumsum(-1)
    tail = -torch.expm1(log_u)  # 1 - u
    tail = tail.clamp(min=torch.finfo(torch.float64).eps)  # a draw of exactly 0 would give an infinite length
    squared = 2 * np.asarray(gammainccinv(width / 2, tail.numpy()))
    return torch.from_numpy(squared).sqrt()
