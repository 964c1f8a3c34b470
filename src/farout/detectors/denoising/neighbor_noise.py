"""Initial noise from the inverted noise of the nearest normal images, for unconditional models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import Denoiser
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.ddim import DDIM

__all__ = ["NeighborNoise", "compute_descriptors", "invert_images"]

_SPACING = 20
_SAME_IMAGE = 1e-6
"""Squared distance of descriptors below which two images are the same."""


def compute_descriptors(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> (B, H W): their channel mean, divided by its Euclidean norm."""
    gray = images.mean(1).flatten(1)
    return gray / (gray.norm(dim=1, keepdim=True) + 1e-10)


@torch.no_grad()
def invert_images(model: DiffusionModel, denoiser: Denoiser, images: Tensor, condition: Condition | None) -> Tensor:
    """The noise (B, C, H, W) from which DDIM generates each image.

    DDIM is run upwards to the last level T in steps of 20 levels; x / sqrt(1 + sigma_T^2) is then nearly pure noise.
    """
    last = model.schedule.num_levels - 1
    levels = [*range(0, last, _SPACING), last]
    sigmas = model.schedule.sigma_of(torch.tensor(levels)).float().to(model.device)
    x_T = DDIM()(denoiser, model.encode(images), sigmas.expand(len(images), -1), condition)
    return x_T / (1 + sigmas[-1] ** 2).sqrt()


@dataclass(frozen=True)
class NeighborNoise:
    """Descriptors (n, H W) of normal images and their inverted noise (n, C, H, W)."""

    descriptors: Tensor
    noise: Tensor

    def find(self, images: Tensor, count: int) -> Tensor:
        """The noise (B, count, C, H, W) of the `count` nearest normal images; the image itself is left out."""
        if count >= len(self.descriptors):
            raise FaroutError(
                f"{count} neighbors require more than {count} statistics images, got {len(self.descriptors)}"
            )
        noise = []
        # image by image, so that the arithmetic does not depend on the batch
        for descriptor in compute_descriptors(images.cpu()):
            distances = (self.descriptors - descriptor).square().sum(1)
            distances = torch.where(distances < _SAME_IMAGE, torch.inf, distances)
            noise.append(self.noise[distances.topk(count, largest=False).indices])
        return torch.stack(noise)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays to be saved."""
        return {"neighbor_descriptors": self.descriptors.numpy(), "neighbor_noise": self.noise.numpy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """Restore from the arrays of `to_arrays`."""
        names = ("neighbor_descriptors", "neighbor_noise")
        return cls(*(torch.from_numpy(np.array(arrays[name])) for name in names))
