"""From noised features back to clean ones: one evaluation, stochastic DDIM, or the released code's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.detectors.settings import checked_levels
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.noise import shared_noise
from farout.diffusion.schedule import NoiseSchedule

__all__ = ["Sampler", "check_sampler", "fresh_noise", "reconstruct"]

Sampler = Literal["oneshot", "ddim", "released"]
Fresh = Callable[[int], Tensor]
"""Noise of one step, of the shape of one image."""


def check_sampler(sampler: str, levels: tuple[int, ...], steps: int, schedule: NoiseSchedule) -> None:
    """Raises FaroutError for levels outside the schedule, or repeated, and for no steps."""
    checked_levels(levels, schedule.steps, lowest=1 if sampler == "released" else 0)
    if steps < 1:
        raise FaroutError(f"steps must be at least 1, got {steps}")


def reconstruct(
    denoiser: NetworkDenoiser,
    x0: Tensor,
    noise: Tensor,
    level: int,
    sampler: Sampler,
    steps: int,
    eta: float,
    fresh: Fresh,
) -> Tensor:
    """x0 (B, width) noised to `level` with `noise` (B, width), and brought back, (B, width).

    `oneshot`: the expected clean value; `ddim`: `steps` steps over evenly spaced levels, the last one to the expected
    clean value, with fresh noise by eta (Song et al. 2021, eq. 16); `released`: see `_released`.
    """
    sigma = denoiser.schedule.sigma_of(level)
    if sampler == "released":
        return _released(denoiser, x0, noise, level, fresh)
    x = x0 + float(sigma) * noise
    if sampler == "oneshot":
        return _clean(denoiser, x, float(sigma))
    path = [float(denoiser.schedule.sigma_of(level * (1 - i / steps))) for i in range(steps)] + [0.0]
    for index in range(steps):
        now, then = path[index], path[index + 1]
        clean = _clean(denoiser, x, now)
        spread = eta * then * max(0.0, 1 - then**2 / now**2) ** 0.5
        x = clean + max(0.0, then**2 - spread**2) ** 0.5 * (x - clean) / now
        if spread:
            x = x + spread * fresh(index).to(x.device)
    return x


def _clean(denoiser: NetworkDenoiser, x: Tensor, sigma: float) -> Tensor:
    return denoiser(x, torch.full((len(x),), sigma, device=x.device))


def _released(denoiser: NetworkDenoiser, x0: Tensor, noise: Tensor, start: int, fresh: Fresh) -> Tensor:
    """The released code's sampler: labels K, …, 1, eta = 1, each step's mean taken one level below its noise.

    Its step from label 1 is the identity, so that K = 1 gives back the noised input, and K = 3 a mixture of 41 % noised
    input and 59 % network. It works on sqrt(abar) x, as the published code does.
    """
    abar = denoiser.schedule.abar
    x = float(abar[start].sqrt()) * x0 + float((1 - abar[start]).sqrt()) * noise
    for label in range(start, 1, -1):
        here, below, then = (float(abar[i]) for i in (label, label - 1, label - 2))
        clean = _clean(denoiser, x / here**0.5, float(denoiser.schedule.sigma[label]))
        eps = (x - here**0.5 * clean) / (1 - here) ** 0.5
        shifted = (x - (1 - below) ** 0.5 * eps) / below**0.5
        spread = ((1 - then) / (1 - below) * (1 - below / then)) ** 0.5
        x = then**0.5 * shifted + (1 - then - spread**2) ** 0.5 * eps + spread * fresh(label).to(x.device)
    return x


def fresh_noise(width: int, seed: int, level: int, draw: int) -> Fresh:
    """Noise of the steps of one start, shared by all images."""
    return lambda step: shared_noise((width,), seed, level, 1000 * (step + 1) + draw)
