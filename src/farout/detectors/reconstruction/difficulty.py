"""How difficult an image is to denoise, whatever the network, and errors adjusted for it.

Simple images (plain shirts, digits) are denoised with smaller errors than detailed ones by every denoiser. Statistics
of the image alone explain most of the variance of a network's errors over normal images; what is left depends on what
the network knows. The idea is that of the complexity correction of likelihoods (Serra et al. 2020, arXiv 1909.11480)
and of background models (Ren et al. 2019, arXiv 1906.02845).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.core.devices import in_float64
from farout.features.densities import FittedStatistics, ZScore

__all__ = ["IMAGE_STATISTICS", "AdjustedErrors", "compute_image_statistics", "one_sided_evidence"]

IMAGE_STATISTICS = ("linear_error", "variation", "variance", "detail", "mean", "bright")
"""linear_error: log of the expected squared error of a fixed linear denoiser at the noise level; variation: log of the
mean absolute difference of adjacent pixels; variance: log variance of the pixels; detail: log mean square of the
difference to the mean of 3 x 3 pixels; mean: of the pixels; bright: fraction of pixels above 0.05. The first depends on
the noise level, the others do not."""

_FLOOR_FREQUENCY = 0.03
"""In cycles per pixel: the power spectrum of the linear denoiser is 1 / (f^2 + floor^2), as that of natural images."""
_POWER = 0.1
"""Variance of the linear denoiser's images, of values in [0, 1]."""
_RIDGE = 5.0


def compute_image_statistics(images: Tensor, sigmas: Tensor) -> Tensor:
    """Statistics of images (B, C, H, W) in [0, 1] at noise levels (n,), sigmas in the same unit as the images.

    The linear denoiser is the Wiener filter of images with power spectrum S(f): gain S / (S + sigma^2). For an image
    with power spectrum P its expected squared error is the mean over f of P (1 - gain)^2 + gain^2 sigma^2.

    Returns:
        float32 (B, n, statistic), in the order of IMAGE_STATISTICS, on the CPU.
    """
    x = in_float64(images).cpu().double()
    height, width = x.shape[-2:]
    frequency = (
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None].square()
        + torch.fft.fftfreq(width, dtype=torch.float64).square()
    )
    prior = 1 / (frequency + _FLOOR_FREQUENCY**2)
    prior[0, 0] = 0
    prior = _POWER * prior / prior.mean().clamp(min=1e-12)  # an image of one pixel has no frequency but 0
    variance = sigmas.cpu().double()[:, None, None].square()
    gain = prior / (prior + variance)
    centered = x - x.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centered, norm="ortho").abs().square().mean(1)
    linear_error = torch.einsum("bhw,nhw->bn", power, (1 - gain).square()) / (height * width)
    linear_error = linear_error + (gain.square() * variance).mean((1, 2)) + 1e-12

    edges = functional.pad(x, (0, 1, 0, 1), mode="replicate")
    variation = (edges[..., :-1, 1:] - x).abs().mean((1, 2, 3)) + (edges[..., 1:, :-1] - x).abs().mean((1, 2, 3))
    detail = (x - functional.avg_pool2d(x, 3, 1, 1)).square().mean((1, 2, 3))
    constant = torch.stack(
        [
            (variation + 1e-4).log(),
            (x.var((1, 2, 3), correction=0) + 1e-5).log(),
            (detail + 1e-5).log(),
            x.mean((1, 2, 3)),
            (x > 0.05).double().mean((1, 2, 3)),
        ],
        dim=1,
    )
    return torch.cat([linear_error.log()[..., None], constant[:, None].expand(-1, len(sigmas), -1)], dim=2).float()


@dataclass(frozen=True)
class AdjustedErrors(FittedStatistics):
    """Residuals of log errors after a quadratic ridge regression on image statistics, in standard deviations.

    The statistics are standardized and clamped to 3 standard deviations, beyond which the regression does not
    extrapolate.
    """

    mean: np.ndarray
    std: np.ndarray
    coefficients: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fit(cls, statistics: np.ndarray, log_errors: np.ndarray) -> Self:
        """From tables (n, d) and (n, levels) of normal images."""
        z = ZScore.fit(statistics)
        terms = _quadratic_terms(z.transform(statistics))
        penalty = _RIDGE * np.eye(terms.shape[1])
        penalty[0, 0] = 0  # the intercept
        coefficients = np.linalg.solve(terms.T @ terms + penalty, terms.T @ log_errors)
        deviation = np.maximum((log_errors - terms @ coefficients).std(0), 1e-12)
        return cls(z.mean, z.std, coefficients, deviation)

    def transform(self, statistics: np.ndarray, log_errors: np.ndarray) -> np.ndarray:
        """Residuals (n, levels)."""
        z = (np.asarray(statistics, dtype=np.float64) - self.mean) / self.std
        return (log_errors - _quadratic_terms(z) @ self.coefficients) / self.deviation


def _quadratic_terms(z: np.ndarray) -> np.ndarray:
    """1, the columns, and their products in pairs."""
    z = np.clip(z, -3, 3)
    rows, columns = np.triu_indices(z.shape[1])
    return np.concatenate([np.ones((len(z), 1)), z, z[:, rows] * z[:, columns]], axis=1)


def one_sided_evidence(z: Tensor) -> Tensor:
    """-log of the upper tail probability of a standard normal variable: 0 for small z, z^2 / 2 for large ones.

    The sum over independent z is Fisher's combination of their p-values.
    """
    return -torch.special.log_ndtr(-z)
