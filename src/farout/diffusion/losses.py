"""What training minimises: the squared error of the network's native answer at random levels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from farout.diffusion.conditioning import Condition
from farout.diffusion.denoiser import NetworkDenoiser, spread
from farout.errors import FaroutError

__all__ = ["LevelSampling", "denoising_loss", "sample_levels"]

LevelSampling = Literal["uniform", "low_noise"]


def sample_levels(count: int, steps: int, how: LevelSampling, generator: torch.Generator) -> Tensor:
    """Random levels t (count,) in 0 to steps - 1.

    `uniform`: as published (Ho et al. 2020, algorithm 1); `low_noise`: t = floor(steps u^2), which puts half of the
    levels into the lowest quarter, where reconstruction looks.
    """
    u = torch.rand(count, generator=generator)
    if how == "low_noise":
        u = u**2
    elif how != "uniform":
        raise FaroutError(f"levels are sampled 'uniform' or 'low_noise', got {how!r}")
    return (u * steps).long().clamp(max=steps - 1)


def denoising_loss(
    denoiser: NetworkDenoiser,
    x0: Tensor,
    generator: torch.Generator,
    how: LevelSampling = "uniform",
    condition: Condition | None = None,
) -> Tensor:
    """Mean squared error between the network's native answer and its target, one level and one noise per row.

    x0 is (B, …) in the network's space; levels and noise come from `generator` (a CPU one) alone, so they do not
    depend on the device. Returns a scalar (Ho et al. 2020, eq. 14, for `epsilon`).
    """
    t = sample_levels(len(x0), denoiser.schedule.steps, how, generator)
    sigma = denoiser.schedule.sigma_of(t).to(torch.float32)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    x = x0 + spread(sigma, x0) * noise
    predicted = denoiser.predict(x, sigma.to(x0.device), condition)
    return (predicted - denoiser.target(x0, noise, sigma)).square().mean()
