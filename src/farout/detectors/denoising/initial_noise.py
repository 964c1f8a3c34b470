"""The noise that images are mixed with: drawn, or that of the nearest good images, found by inversion."""

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

__all__ = ["Neighbours", "descriptors", "inverted"]

_SPACING = 20
_SAME = 1e-6


def descriptors(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> (B, H W): their channel mean, divided by its Euclidean norm."""
    flat = images.mean(1).flatten(1)
    return flat / (flat.norm(dim=1, keepdim=True) + 1e-10)


@torch.no_grad()
def inverted(model: DiffusionModel, denoiser: Denoiser, images: Tensor, condition: Condition | None) -> Tensor:
    """The noise (B, C, H, W) from which DDIM would make each image: its deterministic path upwards to the last level,
    in steps of 20 levels, where x / sqrt(1 + sigma^2) is as good as pure noise.
    """
    last = model.schedule.steps - 1
    levels = [*range(0, last, _SPACING), last]
    path = model.schedule.sigma_of(torch.tensor(levels)).float().to(model.device)
    end = DDIM()(denoiser, model.encode(images), path.expand(len(images), -1), condition)
    return end / (1 + path[-1] ** 2).sqrt()


@dataclass(frozen=True)
class Neighbours:
    """Good images' descriptors (n, H W) and their inverted noise (n, C, H, W)."""

    images: Tensor
    noise: Tensor

    def nearest(self, images: Tensor, count: int) -> Tensor:
        """The noise (B, count, C, H, W) of the `count` nearest good images of each, itself left out."""
        if count >= len(self.images):
            raise FaroutError(f"{count} neighbours require more than {count} statistics images, got {len(self.images)}")
        # image by image: the same arithmetic whatever images are beside it
        rows = []
        for one in descriptors(images.cpu()):
            distances = (self.images - one).square().sum(1)
            distances = torch.where(distances < _SAME, torch.inf, distances)
            rows.append(self.noise[distances.topk(count, largest=False).indices])
        return torch.stack(rows)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        return {"neighbours": self.images.numpy(), "neighbour_noise": self.noise.numpy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """Puts `to_arrays` back."""
        parts = (torch.from_numpy(np.array(arrays[name])) for name in ("neighbours", "neighbour_noise"))
        return cls(*parts)
