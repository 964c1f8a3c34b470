"""The metrics between an image and its reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.chunking import BatchSize
from farout.core.devices import in_float64
from farout.features.perceptual import PerceptualName, perceptual_distance, ssim

__all__ = ["METRICS", "Comparison"]

METRICS = ("mse", "perceptual", "ssim", "eps_error", "score_norm")
"""mse: mean squared error of pixels; perceptual: distance of features; ssim: 1 - SSIM; eps_error: mean squared error of
the noise predicted at the start; score_norm: mean square of that prediction. All but the first two are ours;
eps_error and score_norm cost nothing."""

_HELD = 256


class Comparison:
    """Compares images (B, C, H, W) with reconstructions (B * n, C, H, W), n in a row per image."""

    def __init__(self, perceptual: PerceptualName, batch_size: BatchSize, device: torch.device) -> None:
        self.distance = perceptual_distance(perceptual).to(device)
        self.batch_size = batch_size

    def __call__(self, images: Tensor, restored: Tensor, predicted: Tensor, noise: Tensor) -> Tensor:
        """(B * n, metrics), float32, in the order of METRICS."""
        times = len(restored) // len(images)
        originals = images.repeat_interleave(times, 0)
        columns = [
            _mean((restored - originals).square()),
            self._perceptual(images, restored, times),
            # variances as differences of squares lose digits in float32
            (1 - ssim(in_float64(restored), in_float64(originals))).float().to(restored.device),
            _mean((predicted - noise).square()),
            _mean(predicted.square()),
        ]
        return torch.stack(columns, dim=1)

    def _perceptual(self, images: Tensor, restored: Tensor, times: int) -> Tensor:
        """The originals' features are computed once per image; some hundred feature maps are held at once."""
        count = max(1, _HELD // times)
        parts = [
            self._group(some, rest, times)
            for some, rest in zip(images.split(count), restored.split(count * times), strict=True)
        ]
        return torch.cat(parts)

    def _group(self, images: Tensor, restored: Tensor, times: int) -> Tensor:
        known = self.distance.features(images, self.batch_size)
        originals = [feature.repeat_interleave(times, 0) for feature in known]
        return self.distance.distance(originals, self.distance.features(restored, self.batch_size))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
