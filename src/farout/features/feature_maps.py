"""Feature maps of a backbone, pooled or resized to one grid, as modules from images to one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GridMaps", "NormalizedMaps", "PooledMaps"]


class NormalizedMaps(nn.Module):
    """Images (B, 3, size, size) in [0, 1] -> one feature map (B, c, h, w) per layer, float32.

    Args:
        network: returns the maps of normalized images.
        mean: mean of each input channel.
        std: standard deviation of each input channel.
        is_channels_last: the maps of the network are (B, h, w, c).
        normalize: scale the features of each position to mean 0 and standard deviation 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], is_channels_last: bool, normalize: bool
    ) -> None:
        super().__init__()
        self.network, self.is_channels_last, self.normalize = network, is_channels_last, normalize
        device = next((parameter.device for parameter in network.parameters()), None)
        self.register_buffer("mean", torch.tensor(tuple(mean), device=device).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std), device=device).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps, layer by layer."""
        levels = [level.float() for level in self.network((images - self.mean) / self.std)]
        if self.is_channels_last:
            levels = [level.movedim(-1, 1) for level in levels]
        if self.normalize:
            levels = [functional.layer_norm(v.movedim(1, -1), v.shape[1:2]).movedim(-1, 1) for v in levels]
        return levels


class PooledMaps(nn.Module):
    """Images -> float32 (B, width): means over positions, layer by layer."""

    def __init__(self, maps: NormalizedMaps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        """Means over positions."""
        return torch.cat([level.mean((2, 3)) for level in self.maps(images)], dim=1)


class GridMaps(nn.Module):
    """Images -> float32 (B, width, side, side): every layer averaged, or enlarged bilinearly, to one grid."""

    def __init__(self, maps: NormalizedMaps, side: int) -> None:
        super().__init__()
        self.maps, self.side = maps, side

    def forward(self, images: Tensor) -> Tensor:
        """The resized maps, one after the other."""
        return torch.cat([_resize_to_grid(level, self.side) for level in self.maps(images)], dim=1)


def _resize_to_grid(level: Tensor, side: int) -> Tensor:
    if level.shape[-1] >= side and level.shape[-2] >= side:
        return functional.adaptive_avg_pool2d(level, side)
    return functional.interpolate(level, size=(side, side), mode="bilinear", align_corners=False)
