"""The time in which a variance-preserving process runs: t in levels, continuous, 0 the first noisy level, -1 clean."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.schedule import NoiseSchedule

__all__ = ["VPTime"]

_SLACK = 1e-4
"""Relative; float32 paths do not hit the table's ends to the last bit."""


class VPTime:
    """Continuous time of a schedule, with `-log abar(t)` a monotone cubic curve through the table's values.

    For linear betas this is the closed form `t beta_0 + t^2 (beta_1 - beta_0) / 2` of Song et al. (2021), up to the
    rounding of sums to integrals; it serves every other schedule too. All tensors are float64, on the CPU.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        decay = np.concatenate([[0.0], np.log1p(schedule.sigma.numpy() ** 2)])
        self._decay = decay
        self._curve = PchipInterpolator(np.arange(-1, schedule.steps, dtype=np.float64), decay)
        self._rate = self._curve.derivative()

    def sigma_of(self, t: Tensor) -> Tensor:
        """sigma at time t of any shape."""
        return torch.from_numpy(np.sqrt(np.expm1(np.maximum(self._curve(t.numpy()), 0.0))))

    def beta(self, t: Tensor) -> Tensor:
        """The rate of noising, -d log abar / dt, per level."""
        return torch.from_numpy(np.maximum(self._rate(t.numpy()), 0.0))

    def t_of(self, sigma: Tensor) -> Tensor:
        """t at sigma of any shape: a whole number where sigma is an entry of the table, -1 at sigma 0."""
        wanted = np.log1p(sigma.detach().cpu().double().numpy() ** 2)
        place = np.clip(np.searchsorted(self._decay, wanted), 1, len(self._decay) - 1)
        low, high = place - 2.0, place - 1.0
        for _ in range(52):  # bisection cannot leave the interval, however steep or flat the curve
            middle = (low + high) / 2
            below = self._curve(middle) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        t = (low + high) / 2
        return torch.from_numpy(np.where(np.abs(t - np.round(t)) < _SLACK, np.round(t), t))

    def between(self, sigma: Tensor, then: Tensor) -> Tensor:
        """sigma in the middle, in time, of two others."""
        return self.sigma_of((self.t_of(sigma) + self.t_of(then)) / 2)

    def check(self, sigmas: Tensor, name: str) -> None:
        """Raises FaroutError for a sigma that is neither 0 nor within the schedule's table."""
        low, high = float(self.schedule.sigma[0]), float(self.schedule.sigma[-1])
        outside = (sigmas != 0) & ((sigmas < low * (1 - _SLACK)) | (sigmas > high * (1 + _SLACK)))
        if bool(outside.any()):
            raise FaroutError(
                f"{name} moves in the time of its schedule, whose sigmas run from {low:.4g} to {high:.4g} (or are 0); "
                f"the path goes to {float(sigmas[outside][0]):.4g}"
            )
