"""Random changes of whole batches of images: everything is drawn from one generator, so that a run can be repeated."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["random_crop", "random_flip", "random_resized_crop"]

_ATTEMPTS = 10


def _draw(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) from a CPU generator, on the device of `like`."""
    return torch.rand(shape, generator=generator).to(like.device)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) with a border of `padding` >= 0 zeros, cropped back to (H, W) at a place of its own."""
    if padding == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(images.device)
    rows = corners[0][:, None] + torch.arange(height, device=images.device)
    columns = corners[1][:, None] + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)
    # indices around a slice come first in the result, the channels last
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) mirrored left to right with probability one half."""
    mirrored = _draw((len(images),), generator, images) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random rectangle of each image (B, C, H, W), enlarged to (H, W) (Szegedy et al. 2015, section 6).

    Its share of the area is uniform in `scale`, the logarithm of its aspect ratio (width to height) uniform in
    `ratio`. Ten are drawn, as in torchvision: the first that fits is taken, the whole image where none does. Corners
    lie between pixels too; values are interpolated linearly.
    """
    count, _, height, width = images.shape
    draws = _draw((4, count, _ATTEMPTS), generator, images)
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1]) * height / width
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()])  # shares of height and width
    fits = (sides <= 1).all(0)
    first = fits.float().argmax(1, keepdim=True)
    found = fits.any(1)
    share = torch.where(found, sides.gather(2, first.expand(2, -1, -1))[..., 0], 1.0)
    place = draws[2:].gather(2, first.expand(2, -1, -1))[..., 0]
    centre = (1 - share) * (2 * place - 1)  # in coordinates from -1 to 1
    affine = images.new_zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = share[1], share[0]
    affine[:, 0, 2], affine[:, 1, 2] = centre[1], centre[0]
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
