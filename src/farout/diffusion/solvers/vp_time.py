"""The time in which a variance-preserving process runs: t in levels, continuous, 0 the first noisy level, -1 clean."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.schedule import NoiseSchedule

__all__ = ["VPTime"]

_ROUNDING = 1e-4
"""Relative; paths in float32 do not hit entries of the table to the last bit."""


class VPTime:
    """Continuous time of a schedule, where -log abar(t) is a monotone cubic curve through the values of the table.

    For linear betas this is the closed form `t beta_0 + t^2 (beta_1 - beta_0) / 2` of Song et al. (2021), up to the
    difference between sums and integrals; it covers every other schedule too. All tensors are float64, on the CPU.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        # -log abar = log(1 + sigma^2), with abar = 1 at t = -1
        self._log_decay = np.concatenate([[0.0], np.log1p(schedule.sigma.numpy() ** 2)])
        self._curve = PchipInterpolator(np.arange(-1, schedule.num_levels, dtype=np.float64), self._log_decay)
        self._derivative = self._curve.derivative()

    def sigma_of(self, t: Tensor) -> Tensor:
        """sigma at time t of any shape."""
        return torch.from_numpy(np.sqrt(np.expm1(np.maximum(self._curve(t.numpy()), 0.0))))

    def beta(self, t: Tensor) -> Tensor:
        """The rate of noising, -d log abar / dt, per level."""
        return torch.from_numpy(np.maximum(self._derivative(t.numpy()), 0.0))

    def t_of(self, sigma: Tensor) -> Tensor:
        """t at sigma of any shape: a whole number where sigma is an entry of the table, -1 at sigma 0."""
        target = np.log1p(sigma.detach().cpu().double().numpy() ** 2)
        index = np.clip(np.searchsorted(self._log_decay, target), 1, len(self._log_decay) - 1)
        low, high = index - 2.0, index - 1.0
        for _ in range(52):  # bisection cannot leave the interval, however steep or flat the curve is
            middle = (low + high) / 2
            is_below = self._curve(middle) < target
            low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
        t = (low + high) / 2
        return torch.from_numpy(np.where(np.abs(t - np.round(t)) < _ROUNDING, np.round(t), t))

    def midpoint(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """sigma in the middle, in t, between two others."""
        return self.sigma_of((self.t_of(sigma) + self.t_of(sigma_next)) / 2)

    def check(self, sigmas: Tensor, name: str) -> None:
        """Raises FaroutError for a sigma that is neither 0 nor within the schedule's table."""
        low, high = float(self.schedule.sigma[0]), float(self.schedule.sigma[-1])
        outside = (sigmas != 0) & ((sigmas < low * (1 - _ROUNDING)) | (sigmas > high * (1 + _ROUNDING)))
        if bool(outside.any()):
            raise FaroutError(
                f"{name} integrates in the time of its schedule, whose sigmas are {low:.4g} to {high:.4g} (or 0); a "
                f"path has the sigma {float(sigmas[outside][0]):.4g}"
            )
