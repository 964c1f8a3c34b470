"""Virtual outliers: unlikely features drawn from Gaussians that follow the classes while a classifier trains."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy.special import gammainccinv
from torch import Tensor, nn

__all__ = ["VirtualOutliers", "largest_radii"]

_RIDGE = 1e-4
"""Added to the diagonal of the covariance, as VOS's authors do."""


class VirtualOutliers(nn.Module):
    """Outliers in the space of penultimate features (Du et al. 2022, "VOS: learning what you don't know by virtual
    outlier synthesis", sections 3.1 and 3.2).

    The newest `queue` features of each class are kept. From them follow the mean of each class and one covariance
    S = (1 / n) sum over all features of (z - m_y)(z - m_y)^T + 1e-4 I, shared by the classes. Of `draws` samples of
    each class's Gaussian the `select` least likely are outliers. All that is kept are buffers, so that a resumed
    training goes on exactly; of several processes the first one's features are kept.

    Args:
        classes: K.
        width: D, the number of features.
        queue: features kept of each class.
        draws: samples of each class that the outliers are the least likely of.
        select: outliers of each class, at most `draws`.
    """

    features: Tensor
    counts: Tensor

    def __init__(self, classes: int, width: int, queue: int, draws: int, select: int) -> None:
        super().__init__()
        self.draws, self.select = draws, select
        self.register_buffer("features", torch.zeros(classes, queue, width))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))

    @property
    def full(self) -> bool:
        """Whether every class has filled its queue: only then are there outliers."""
        return bool((self.counts >= self.features.shape[1]).all())

    @torch.no_grad()
    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features (B, D) of classes (B,); the oldest of each class make way."""
        size = self.features.shape[1]
        order = labels.argsort(stable=True)
        each = torch.bincount(labels, minlength=len(self.counts))
        rank = torch.empty_like(labels)
        first = each.cumsum(0) - each
        rank[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
        kept = rank >= each[labels] - size  # of more than the queue holds, the last ones
        place = (self.counts[labels] + rank) % size
        self.features[labels[kept], place[kept]] = features.detach().float()[kept]
        self.counts += each

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means (K, D) and the shared covariance (D, D), float32, of full queues."""
        with torch.autocast(self.features.device.type, enabled=False):
            means = self.features.mean(1)
            centred = (self.features - means[:, None]).flatten(0, 1)
            covariance = centred.T @ centred / len(centred)
            covariance.diagonal().add_(_RIDGE)
        return means, covariance

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Tensor:
        """Outliers (K x `select`, D), those of a class side by side; randomness from a CPU generator.

        The direction and the length of a standard normal vector are independent, and its likelihood follows from the
        length alone. So directions are drawn for the selected samples only, and lengths as the largest of `draws`:
        the same distribution without drawing the rest.
        """
        means, covariance = self.statistics()
        classes, width = means.shape
        directions = torch.randn(classes, self.select, width, generator=generator)
        uniform = torch.rand(classes, self.select, generator=generator, dtype=torch.float64)
        radii = largest_radii(uniform, width, self.draws)
        normals = directions / directions.norm(dim=2, keepdim=True) * radii[..., None].float()
        with torch.autocast(means.device.type, enabled=False):
            spread = normals.to(means.device) @ torch.linalg.cholesky(covariance).T
            return (means[:, None] + spread).flatten(0, 1)


def largest_radii(uniform: Tensor, width: int, draws: int) -> Tensor:
    """Lengths of the longest of `draws` standard normal vectors of `width` entries, longest first.

    `uniform` (..., s), float64 in [0, 1): one number for each of the s longest -> lengths (..., s). The largest of n
    uniform numbers is V^(1/n), the next largest that times V'^(1/(n - 1)), and so on; the squared length at a share u
    of the distribution is the chi-square quantile of u. Logarithms keep 1 - u exact where u is near 1.
    """
    left = torch.arange(draws, draws - uniform.shape[-1], -1, dtype=torch.float64)
    logarithms = torch.log1p(-uniform) / left
    above = -torch.expm1(logarithms.cumsum(-1))
    above = above.clamp(min=torch.finfo(torch.float64).eps)  # a draw of exactly 0 would be infinitely long
    squared = 2 * cast("np.ndarray", gammainccinv(width / 2, above.numpy()))
    return torch.from_numpy(np.asarray(squared)).sqrt()
