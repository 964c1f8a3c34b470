"""The preprocessing of images as a torch module, for exported graphs: Pillow's arithmetic, exactly."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.data.preprocessing import Kernel, Preprocessing

__all__ = ["PreprocessingGraph"]

_BITS, _LOW_BITS = 22, 11
"""Pillow's weights are whole numbers of 22 binary digits; see `_split_weights`."""
_LUMINANCE = (19595.0, 38470.0, 7471.0)
"""Pillow's weights of ITU-R 601, out of 65,536."""


class PreprocessingGraph(nn.Module):
    """Turns RGB images (B, 3, H, W), uint8, into float32 (B, channels, *size) in [0, 1], as `Preprocessing` does.

    Pillow resizes 8-bit pixels with integer weights and rounds after each of the two directions. The sums are computed
    exactly here (for images up to 16 times larger than the result), although runtimes multiply in floating point. Gray
    images are given as three equal channels.

    Args:
        preprocessing: what to reproduce.
        any_size: take images of any size; else only those that `steps_before` have brought to `input_size`.

    Attributes:
        input_size: height and width that the images must have; None: any.
        steps_before: descriptions of the steps that are not part of the graph.

    Raises FaroutError where the first steps cannot be part of a graph: JPEG encoding, and two kinds of resizing.
    """

    height_high: Tensor
    height_low: Tensor
    width_high: Tensor
    width_low: Tensor

    def __init__(self, preprocessing: Preprocessing, any_size: bool = False) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.first_size = preprocessing.first_size
        self.input_size: tuple[int, int] | None = None
        self.steps_before = _describe_first_steps(preprocessing, self.first_size)
        if not any_size:
            self.input_size = self.first_size
        elif preprocessing.protocol == "common" or preprocessing.kernel == "nearest" or preprocessing.fill:
            raise FaroutError(
                f"the steps {'; '.join(self.steps_before)} cannot be part of a graph; export without any_size"
            )
        else:
            self.steps_before = []
        # The second resize has constant weights; those of the first one depend on the size of the images.
        self.resizes = self.first_size != preprocessing.size
        if self.resizes:
            for axis, name in enumerate(("height", "width")):
                weights = _constant_weights(self.first_size[axis], preprocessing.size[axis], preprocessing.kernel)
                for part, values in zip(("high", "low"), _split_weights(weights), strict=True):
                    self.register_buffer(f"{name}_{part}", values)
            self.height_first = _is_height_first(self.first_size, preprocessing.size)

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, channels, *size) of images (B, 3, H, W), uint8."""
        pixels = images.to(torch.float32)
        if self.input_size is None:
            pixels = self._resize_any_size(pixels)
        if self.resizes:
            height, width = (self.height_high, self.height_low), (self.width_high, self.width_low)
            pixels = _resize(pixels, height, width, self.height_first)
        if self.preprocessing.channels == 1:
            red, green, blue = _LUMINANCE
            # sums below 2^24 are exact
            pixels = red * pixels[:, 0:1] + green * pixels[:, 1:2] + blue * pixels[:, 2:3]
            pixels = torch.floor((pixels + 32768) / 65536)
        if self.preprocessing.scaling == "fixed":
            return pixels / 255
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        return (pixels - low) / (high - low).clamp(min=1)

    def _resize_any_size(self, pixels: Tensor) -> Tensor:
        """The crop and the first resize."""
        weights, sizes = [], []
        for axis, length in enumerate(self.first_size):
            indices = torch.arange(pixels.shape[2 + axis], device=pixels.device)
            size = indices[-1] + 1  # a tensor, which a graph computes from its input
            if self.preprocessing.crop is not None:
                cropped = size.clamp(max=self.preprocessing.crop)
                indices = indices - torch.div(size - cropped, 2, rounding_mode="floor")
                size = cropped
            weights.append(_split_weights(_resize_weights(indices, size, length, self.preprocessing.kernel)))
            sizes.append(size)
        width_first = _resize(pixels, weights[0], weights[1], False)
        if not _can_be_height_first():
            return width_first
        height_less, width_less = sizes[0] - self.first_size[0], sizes[1] - self.first_size[1]
        is_height_first = height_less > 2 * width_less.clamp(min=0)
        return torch.where(is_height_first, _resize(pixels, weights[0], weights[1], True), width_first)


def _describe_first_steps(preprocessing: Preprocessing, size: tuple[int, int]) -> list[str]:
    steps = []
    if preprocessing.crop is not None:
        steps.append(f"crop the central {preprocessing.crop} x {preprocessing.crop} pixels")
    covering = " after the larger side that does not fit is cut off on both sides" if preprocessing.fill else ""
    steps.append(f"resize to height {size[0]} and width {size[1]} with Pillow, {preprocessing.kernel}{covering}")
    if preprocessing.protocol == "common":
        steps.append(f"encode as JPEG (quality {preprocessing.jpeg_quality}, 4:2:0) and decode with Pillow")
    return steps


def _resize_weights(indices: Tensor, size: Tensor, length: int, kernel: Kernel) -> Tensor:
    """Pillow's weights (length, len(indices)), whole numbers in float64, from a side of `size` pixels to `length`.

    `indices` are counted from the crop; those outside 0 to size - 1 have the weight 0.
    """
    target = torch.arange(length, device=indices.device)
    # 2 length times the distance of two centers: whole numbers, exact also in runtimes without float64
    offset = (2 * indices[None, :] + 1) * length - (2 * target[:, None] + 1) * size
    t = offset.abs().to(torch.float64) / (2 * size.clamp(min=length)).to(torch.float64)
    if kernel == "bicubic":  # a = -0.5
        near, far = (1.5 * t - 2.5) * t * t + 1, (((t - 5) * t + 8) * t - 4) * -0.5
        weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    else:
        weights = (1 - t).clamp(min=0)
    inside = ((indices >= 0) & (indices < size))[None, :]
    weights = torch.where(inside, weights, 0.0)
    weights = 2.0**_BITS * weights / weights.sum(1, keepdim=True)
    return torch.sign(weights) * torch.floor(weights.abs() + 0.5)


def _constant_weights(size: int, length: int, kernel: Kernel) -> Tensor:
    if kernel != "nearest":
        return _resize_weights(torch.arange(size), torch.tensor(size), length, kernel)
    numbered = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    chosen = torch.from_numpy(np.array(numbered.resize((length, 1), Image.Resampling.NEAREST))[0])
    return 2.0**_BITS * (torch.arange(size)[None, :] == chosen[:, None]).double()


def _split_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """weights = 2^11 high + low, float32: their sums of products with 8-bit pixels have at most 24 digits."""
    high = torch.floor(weights / 2.0**_LOW_BITS)
    return high.to(torch.float32), (weights - high * 2.0**_LOW_BITS).to(torch.float32)


def _resize(pixels: Tensor, height: tuple[Tensor, Tensor], width: tuple[Tensor, Tensor], height_first: bool) -> Tensor:
    if height_first:
        return _resize_rows(_resize_rows(pixels.transpose(2, 3), *height).transpose(2, 3), *width)
    return _resize_rows(_resize_rows(pixels, *width).transpose(2, 3), *height).transpose(2, 3)


def _resize_rows(pixels: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """floor((pixels @ weights + 2^21) / 2^22), clipped to 8 bits, from exact sums: (..., N) -> (..., M)."""
    # not `matmul`, whose export with a dynamic batch fails in torch 2.6
    carried = torch.floor(functional.linear(pixels, low) / 2.0**_LOW_BITS)
    unit = 2.0 ** (_BITS - _LOW_BITS)
    return torch.floor((functional.linear(pixels, high) + carried + unit / 2) / unit).clamp(0, 255)


def _is_height_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes the height before the width; rounding in between makes a difference."""
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    picture = Image.fromarray(noise)
    bicubic = Image.Resampling.BICUBIC
    stepwise = picture.resize((size[1], target[0]), bicubic).resize((target[1], target[0]), bicubic)
    return np.array_equal(np.array(picture.resize((target[1], target[0]), bicubic)), np.array(stepwise))


@cache
def _can_be_height_first() -> bool:
    """Whether the installed Pillow resizes images whose height shrinks by more than twice as many pixels as their width
    in the other order, as it does from version 13 on.
    """
    return _is_height_first((64, 32), (16, 16))
