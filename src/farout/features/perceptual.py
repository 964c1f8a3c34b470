"""Distances between two images of the same size: perceptual ones on a frozen network's features, and SSIM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.chunking import BatchSize, call_in_chunks
from farout.core.errors import FaroutError, MissingExtraError
from farout.features.backbones import create_lite0

__all__ = ["PerceptualDistance", "PerceptualName", "perceptual_distance", "ssim"]

PerceptualName = Literal["lite0", "lpips"]


class PerceptualDistance(Protocol):
    """Computes features of images, and distances between features."""

    def features(self, images: Tensor, batch_size: BatchSize = "auto") -> list[Tensor]:
        """Feature maps of images (B, C, H, W) in [0, 1], one tensor (B, c, h, w) per layer."""

    def distance(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """Distances (B,), float32, between two lists of feature maps; 0 for equal images."""

    def to(self, device: torch.device | str) -> PerceptualDistance:
        """Moves the network."""


class _FeatureDistance:
    """Sum over layers of the mean over positions of |w (f / |f| - g / |g|)|^2.

    This is LPIPS (Zhang et al. 2018, eq. 1) with the given channel weights; None: all one.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        min_side: int,
        weights: Sequence[Tensor] | None,
    ) -> None:
        self.network, self.min_side, self.weights = network, min_side, weights
        self.mean = torch.tensor(mean).reshape(1, 3, 1, 1)
        self.std = torch.tensor(std).reshape(1, 3, 1, 1)

    def to(self, device: torch.device | str) -> _FeatureDistance:
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.weights = None if self.weights is None else [weight.to(device) for weight in self.weights]
        return self

    def features(self, images: Tensor, batch_size: BatchSize = "auto") -> list[Tensor]:
        """Unit-normalized feature maps; gray images become three channels, small images are enlarged or padded."""
        ready = (self._enlarge(images.expand(-1, 3, -1, -1)) - self.mean) / self.std
        ready = ready.contiguous(memory_format=torch.channels_last)
        shapes: list[torch.Size] = []

        def call(chunk: Tensor) -> Tensor:
            maps = [_normalize_channels(feature.float()) for feature in self.network(chunk)]
            shapes[:] = [feature.shape[1:] for feature in maps]
            return torch.cat([feature.flatten(1) for feature in maps], dim=1)

        with torch.no_grad():
            flat = call_in_chunks(self.network, call, ready, batch_size=batch_size)
        parts = torch.split(flat, [shape.numel() for shape in shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _enlarge(self, images: Tensor) -> Tensor:
        """Enlarges bilinearly until the shorter side has the minimum length of the network."""
        side = min(images.shape[-2:])
        if side >= self.min_side:
            return images
        size = [round(length * self.min_side / side) for length in images.shape[-2:]]
        return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def distance(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """Distances (B,), float32, between two lists of unit-normalized feature maps."""
        total = one[0].new_zeros(len(one[0]))
        for layer, (f, g) in enumerate(zip(one, other, strict=True)):
            difference = (f - g).square()
            if self.weights is not None:
                difference = difference * self.weights[layer].to(difference.device)
            total = total + difference.sum(1).mean((1, 2))
        return total


class _PaddedLPIPS(_FeatureDistance):
    """LPIPS pads small images with black instead of enlarging them, as the reconstruction paper does (28 to 32 px)."""

    def _enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x, y = max(0, self.min_side - width), max(0, self.min_side - height)
        return functional.pad(images, (x // 2, x - x // 2, y // 2, y - y // 2))


def _normalize_channels(feature: Tensor) -> Tensor:
    return feature / (feature.square().sum(1, keepdim=True).sqrt() + 1e-10)


def perceptual_distance(name: PerceptualName) -> PerceptualDistance:
    """Creates a perceptual distance.

    Args:
        name: `lite0` (EfficientNet-lite0 features at 64 px or more, all layers, unit weights, no downloads) or `lpips`
            (LPIPS with AlexNet, version 0.1, as in the reconstruction paper).

    Raises FaroutError for another name, MissingExtraError if LPIPS or its AlexNet weights are missing.
    """
    if name == "lite0":
        return _FeatureDistance(create_lite0(), [0.5] * 3, [0.5] * 3, 64, None)
    if name != "lpips":
        raise FaroutError(f"there is no perceptual distance {name!r}; expected lite0 or lpips")
    return _create_lpips()


def _create_lpips() -> PerceptualDistance:
    try:
        import lpips
    except ImportError as error:
        hint = 'LPIPS requires `pip install "farout[lpips]"`; the built-in distance is perceptual="lite0"'
        raise MissingExtraError(hint) from error
    try:
        model = lpips.LPIPS(net="alex", verbose=False)
    except OSError as error:
        hint = (
            f"LPIPS could not download torchvision's AlexNet weights ({error}); put alexnet-owt-7be5be79.pth into "
            f'{torch.hub.get_dir()}/checkpoints, or use the built-in distance perceptual="lite0"'
        )
        raise MissingExtraError(hint) from error
    model = model.eval().requires_grad_(False)
    weights = [layer.model[-1].weight for layer in model.lins]
    # the scaling layer of LPIPS expects [-1, 1]; the same normalization for [0, 1]
    mean, std = (model.scaling_layer.shift.flatten() + 1) / 2, model.scaling_layer.scale.flatten() / 2
    return _PaddedLPIPS(model.net, mean.tolist(), std.tolist(), 32, weights)


def ssim(one: Tensor, other: Tensor, window: int = 7) -> Tensor:
    """Structural similarity (B,) of images (B, C, H, W) in [0, 1]: Wang et al. 2004, uniform window, mean over valid
    positions and channels, sample covariances; the window shrinks to the image where that is smaller.
    """
    window = min(window, *one.shape[-2:])
    window -= 1 - window % 2
    count = window**2
    sample = count / (count - 1) if count > 1 else 1.0

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, window, stride=1)

    a, b = mean(one), mean(other)
    var_a, var_b = sample * (mean(one**2) - a**2), sample * (mean(other**2) - b**2)
    covariance = sample * (mean(one * other) - a * b)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))
