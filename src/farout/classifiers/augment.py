"""Data augmentation of batches of images; all randomness comes from one CPU generator, so that runs are repeatable."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["random_crop", "random_flip", "random_resized_crop"]

_ATTEMPTS = 10


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) padded by `padding` >= 0 zeros, each cropped back to (H, W) at a random position."""
    if padding == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(images.device)
    rows = corners[0][:, None] + torch.arange(height, device=images.device)
    columns = corners[1][:, None] + torch.arange(width, device=images.device)
    batch = torch.arange(count, device=images.device)
    # Indices on both sides of a slice come first in the result, so the channels are last.
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each flipped left to right with probability one half."""
    is_flipped = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(is_flipped[:, None, None, None], images.flip(-1), images)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random rectangle of each image (B, C, H, W), resized to (H, W) (Szegedy et al. 2015, section 6).

    The rectangle's share of the area is uniform in `scale`, the logarithm of its aspect ratio (width / height) uniform
    in `ratio`. As in torchvision, ten are drawn and the first one that fits is used, or the whole image if none fits.
    Corners may be between pixels; values are interpolated linearly.
    """
    count, _, height, width = images.shape
    draws = torch.rand(4, count, _ATTEMPTS, generator=generator).to(images.device)
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1]) * height / width
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()])  # shares of height and width
    fits = (sides <= 1).all(0)
    first = fits.float().argmax(1, keepdim=True)
    share = torch.where(fits.any(1), sides.gather(2, first.expand(2, -1, -1))[..., 0], 1.0)
    position = draws[2:].gather(2, first.expand(2, -1, -1))[..., 0]
    center = (1 - share) * (2 * position - 1)  # in coordinates from -1 to 1
    affine = images.new_zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = share[1], share[0]
    affine[:, 0, 2], affine[:, 1, 2] = center[1], center[0]
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
