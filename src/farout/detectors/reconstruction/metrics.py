"""The metrics between an image and its reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.chunking import BatchSize
from farout.core.devices import in_float64
from farout.features.perceptual import PerceptualDistance, ssim

__all__ = ["METRICS", "compute_metrics"]

METRICS = ("mse", "perceptual", "ssim", "eps_error", "score_norm")
"""mse: mean squared error of pixels; perceptual: distance of features (these two are the paper's); ssim: 1 - SSIM;
eps_error: mean squared error of the noise predicted at the start level; score_norm: mean square of that prediction."""

_FEATURE_MAPS = 256
"""Number of images whose feature maps are in memory at once."""


def compute_metrics(
    images: Tensor,
    reconstructions: Tensor,
    predicted_noise: Tensor,
    noise: Tensor,
    distance: PerceptualDistance,
    batch_size: BatchSize,
) -> Tensor:
    """Compare images (B, C, H, W) with n consecutive reconstructions each.

    Args:
        images: in [0, 1].
        reconstructions: (B n, C, H, W) in [0, 1].
        predicted_noise, noise: (B n, …) in the network's space, at the start level.
        distance: the perceptual distance.
        batch_size: of its network.

    Returns:
        float32 (B n, metric), in the order of METRICS.
    """
    originals = images.repeat_interleave(len(reconstructions) // len(images), 0)
    # SSIM needs float64: its variances are differences of squares
    similarity = ssim(in_float64(reconstructions), in_float64(originals))
    columns = [
        (reconstructions - originals).square().flatten(1).mean(1),
        perceptual_distances(images, reconstructions, distance, batch_size),
        (1 - similarity).float().to(reconstructions.device),
        (predicted_noise - noise).square().flatten(1).mean(1),
        predicted_noise.square().flatten(1).mean(1),
    ]
    return torch.stack(columns, dim=1)


def perceptual_distances(
    images: Tensor, reconstructions: Tensor, distance: PerceptualDistance, batch_size: BatchSize
) -> Tensor:
    """Perceptual distances (B n,); the features of an image are computed once for all its reconstructions."""
    n = len(reconstructions) // len(images)
    count = max(1, _FEATURE_MAPS // n)
    parts = []
    for image_chunk, reconstruction_chunk in zip(
        torch.split(images, count), torch.split(reconstructions, count * n), strict=True
    ):
        originals = [feature.repeat_interleave(n, 0) for feature in distance.features(image_chunk, batch_size)]
        parts.append(distance.distance(originals, distance.features(reconstruction_chunk, batch_size)))
    return torch.cat(parts)
