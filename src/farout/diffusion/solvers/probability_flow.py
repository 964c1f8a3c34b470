"""The probability flow ODE by an adaptive Runge-Kutta method, with an error control of its own for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import RowDenoiser, RowState, VPSolver
from farout.diffusion.solvers.ndm import vp_drift

__all__ = ["ProbabilityFlow"]

# Dormand & Prince 1980: nodes and stages of the method of order 5, whose last slope is the first of the next step, and
# its difference from the embedded method of order 4
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
_SAFETY, _MIN_FACTOR, _MAX_FACTOR = 0.9, 0.2, 10.0
"""The new step is the old one times 0.9 error^(-1/5), within limits (Hairer, Nørsett & Wanner 1993, section II.4)."""


class ProbabilityFlow(VPSolver):
    """The probability flow ODE by RK45 in the time of the schedule (Song et al. 2021, appendix D.4).

    It takes paths of two sigmas, (B, 2), rising or falling, and chooses its own steps: the root mean square of each
    row's local error stays below tolerance (1 + |x_vp|). Six evaluations per tried step, and two at the start. Towards
    sigma 0 it integrates to the schedule's smallest sigma and returns the x0 there.

    Args:
        schedule: the schedule of the network.
        tolerance: absolute and relative tolerance of a step.

    Raises FaroutError for a tolerance that is not positive, and when called for paths of several steps, for a sigma
    outside the schedule, or where the network's predictions are not finite.
    """

    name = "probability_flow"
    evaluates_once: ClassVar[bool] = False

    def __init__(self, schedule: NoiseSchedule, tolerance: float = 7e-4) -> None:
        if not tolerance > 0:
            raise FaroutError(f"the tolerance of the probability flow must be above 0, got {tolerance}")
        super().__init__(schedule)
        self.tolerance = tolerance

    def check_path(self, sigmas: Tensor) -> None:
        """Raises FaroutError for a sigma outside the schedule, and for paths of several steps."""
        super().check_path(sigmas)
        if sigmas.shape[1] != 2:
            raise FaroutError(
                "probability_flow chooses its own steps: sigmas must have shape (B, 2), start and end, got "
                f"{tuple(sigmas.shape)}"
            )

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """Integrates dy / dt = f(y, t) for y = x_vp, from the t of sigma to the t of sigma_next."""
        smallest = float(self.time.schedule.sigma[0])
        # times are float64 on the CPU, (R,); values are on the device
        t, t_end = (self.time.t_of(s.flatten().cpu().double().clamp(min=smallest)) for s in (sigma, sigma_next))
        y = x / (1 + sigma**2).sqrt()
        f, x0 = self._drift(model, y, t, torch.arange(len(t)))
        h = torch.zeros_like(t)
        was_rejected = torch.zeros(len(t), dtype=torch.bool)
        rows = (t != t_end).nonzero().squeeze(1)
        if len(rows) > 0:
            h[rows] = self._initial_step(model, y, f, t, t_end, rows)

        while len(rows) > 0:
            on_device = rows.to(y.device)
            y_old, t_old, remaining = y[on_device], t[rows], t_end[rows] - t[rows]
            length = h[rows].minimum(remaining.abs())
            if bool((length <= 1e-12 * (1 + t_old.abs())).any()):
                raise FaroutError("the steps of the probability flow became too short; raise its tolerance")
            is_last = length >= remaining.abs()
            t_new = torch.where(is_last, t_end[rows], t_old + length * remaining.sign())
            step = t_new - t_old

            # the stages; after the last one y_new is the solution of order 5
            slopes, y_new, x0_new = [f[on_device]], y_old, y_old
            for node, weights in zip(_NODES, _STAGES, strict=True):
                y_new = y_old + expand_dims(step, y) * _weighted_sum(weights, slopes)
                slope, x0_new = self._drift(model, y_new, t_old + node * step, rows)
                slopes.append(slope)

            # error control of each row
            local_error = expand_dims(step, y) * _weighted_sum(_ERROR, slopes)
            scale = self.tolerance * (1 + torch.maximum(y_old.abs(), y_new.abs()))
            error = _root_mean_square(local_error / scale)
            is_accepted = error < 1
            factor = (_SAFETY * error.clamp(min=1e-30).pow(-1 / 5)).clamp(_MIN_FACTOR, _MAX_FACTOR)
            # a step does not grow right after a rejected one
            h[rows] = length * torch.where(was_rejected[rows] | ~is_accepted, factor.clamp(max=1.0), factor)
            was_rejected[rows] = ~is_accepted
            accepted, kept = rows[is_accepted], is_accepted.to(y.device)
            t[accepted] = t_new[is_accepted]
            for values, new in ((y, y_new), (f, slopes[-1]), (x0, x0_new)):
                values[accepted.to(y.device)] = new[kept]
            rows = rows[t[rows] != t_end[rows]]

        return torch.where(sigma_next > 0, y * (1 + sigma_next**2).sqrt(), x0)

    def _drift(self, model: RowDenoiser, y: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """f(y, t) and x0 of some rows."""
        sigma = expand_dims(self.time.sigma_of(t), y)
        x0 = model(y * (1 + sigma**2).sqrt(), sigma, rows.to(y.device))
        return vp_drift(self.time, y, self.time.sigma_of(t).reshape(sigma.shape), x0), x0

    def _initial_step(self, model: RowDenoiser, y: Tensor, f: Tensor, t: Tensor, t_end: Tensor, rows: Tensor) -> Tensor:
        """Length of the first step, from the sizes of y, slope and curvature (Hairer et al. 1993, section II.4)."""
        on_device = rows.to(y.device)
        y, f, t, remaining = y[on_device], f[on_device], t[rows], t_end[rows] - t[rows]
        scale = self.tolerance * (1 + y.abs())
        # a) and b): h_0 = 0.01 d_0 / d_1
        d0, d1 = _root_mean_square(y / scale), _root_mean_square(f / scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum(remaining.abs())
        # c) and d): an Euler step, and the second derivative
        euler_step = h0 * remaining.sign()
        f1, _ = self._drift(model, y + expand_dims(euler_step, y) * f, t + euler_step, rows)
        d2 = _root_mean_square((f1 - f) / scale) / h0
        # e) and f): h_1^5 max(d_1, d_2) = 0.01
        largest = d1.maximum(d2)
        h1 = torch.where(largest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / largest).pow(1 / 5))
        return h1.minimum(100 * h0).minimum(remaining.abs())


def _root_mean_square(values: Tensor) -> Tensor:
    """Root mean square of each row, (R,) float64 on the CPU; raises FaroutError where it is not finite."""
    size = in_float64(values).flatten(1).square().mean(1).sqrt().cpu()
    if not bool(torch.isfinite(size).all()):
        raise FaroutError("the probability flow diverged: the network's predictions are NaN or too large")
    return size


def _weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total
