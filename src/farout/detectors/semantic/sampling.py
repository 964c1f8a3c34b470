"""Reconstruction of noised features: one evaluation, stochastic DDIM, or the arithmetic of the released code."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.argument_checks import sort_levels
from farout.diffusion.noise import shared_noise
from farout.diffusion.schedule import NoiseSchedule

__all__ = ["FixedDenoiser", "Sampler", "StepNoise", "check_sampler", "reconstruct", "shared_step_noise"]

Sampler = Literal["oneshot", "ddim", "released"]
FixedDenoiser = Callable[[Tensor, float], Tensor]
"""x = x0 + sigma noise (B, width) and sigma -> x0."""
StepNoise = Callable[[int], Tensor]
"""The noise that a stochastic sampler adds in a step, of the shape of one image."""


def check_sampler(sampler: str, levels: tuple[int, ...], steps: int, schedule: NoiseSchedule) -> None:
    """Raise FaroutError for levels outside the schedule, repeated levels, and less than one step."""
    sort_levels(levels, schedule.num_levels, lowest=1 if sampler == "released" else 0)
    if steps < 1:
        raise FaroutError(f"steps must be at least 1, got {steps}")


def shared_step_noise(width: int, seed: int, level: int, draw: int) -> StepNoise:
    """The noise of the steps from one level and draw, shared by all images."""
    return lambda step: shared_noise((width,), seed, level, 1000 * (step + 1) + draw)


def reconstruct(
    denoiser: FixedDenoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    level: int,
    sampler: Sampler,
    steps: int,
    eta: float,
    step_noise: StepNoise,
) -> Tensor:
    """Noise x0 (B, width) to `level` with `noise` (B, width) and denoise it: (B, width).

    `oneshot`: the expected clean value, one evaluation. `ddim`: `steps` steps over evenly spaced levels, the last one
    to the expected clean value, with noise added in proportion to eta (Song et al. 2021, eq. 16). `released`: see
    `_reconstruct_as_released`.
    """
    if sampler == "released":
        return _reconstruct_as_released(denoiser, schedule, x0, noise, level, step_noise)
    steps = 1 if sampler == "oneshot" else steps
    sigmas = [float(schedule.sigma_of(level * (1 - i / steps))) for i in range(steps)] + [0.0]
    x = x0 + sigmas[0] * noise
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0hat = denoiser(x, sigma)
        eps = (x - x0hat) / sigma
        # eq. 16 in terms of sigma = sqrt((1 - abar) / abar): the deviation of the added noise
        sigma_added = eta * sigma_next * max(0.0, 1 - sigma_next**2 / sigma**2) ** 0.5
        x = x0hat + max(0.0, sigma_next**2 - sigma_added**2) ** 0.5 * eps
        if sigma_added:
            x = x + sigma_added * step_noise(step).to(x.device)
    return x


def _reconstruct_as_released(
    denoiser: FixedDenoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    start: int,
    step_noise: StepNoise,
) -> Tensor:
    """The released code's sampler: levels K, …, 1 with eta = 1, each step's mean taken one level below its noise.

    Its step from level 1 is the identity, so that K = 1 returns the noised input, and K = 3 a mixture of 41 % noised
    input and 59 % network. x is the variance-preserving sample, as in the published code.
    """
    abar = schedule.abar
    x = math.sqrt(abar[start]) * x0 + math.sqrt(1 - abar[start]) * noise
    for level in range(start, 1, -1):
        abar_t, abar_1, abar_2 = (float(abar[i]) for i in (level, level - 1, level - 2))
        eps = (x - abar_t**0.5 * denoiser(x / abar_t**0.5, float(schedule.sigma[level]))) / (1 - abar_t) ** 0.5
        x0hat = (x - (1 - abar_1) ** 0.5 * eps) / abar_1**0.5
        sigma_added = ((1 - abar_2) / (1 - abar_1) * (1 - abar_1 / abar_2)) ** 0.5
        x = abar_2**0.5 * x0hat + (1 - abar_2 - sigma_added**2) ** 0.5 * eps
        x = x + sigma_added * step_noise(level).to(x.device)
    return x
