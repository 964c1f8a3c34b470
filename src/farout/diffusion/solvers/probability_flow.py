"""The probability flow by an adaptive Runge-Kutta method, with an error control of its own for every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Predictor, Solver, State, make_solver
from farout.diffusion.solvers.ndm import vp_drift
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["probability_flow"]

# Dormand & Prince 1980: stages of the order 5 rule, whose last slope is the next step's first, and its difference from
# the embedded order 4 rule
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
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 10.0
"""Hairer, Nørsett & Wanner 1993, section II.4: the new step is the old one times 0.9 error^(-1/5), within limits."""


def probability_flow(schedule: NoiseSchedule, tolerance: float = 7e-4) -> Solver:
    """The probability flow by RK45 in the time of the schedule (Song et al. 2021, appendix D).

    It takes paths of two sigmas, (B, 2), rising or falling, and finds its own steps: each row's own error, in root mean
    square over its values, stays below tolerance (1 + |x_vp|) per step. Six evaluations a tried step, and two at the
    start. Towards sigma 0 it integrates to the schedule's smallest sigma and ends with the x0 it has there.

    Raises FaroutError for a tolerance that is not positive; the solver, for paths of several steps, outside the
    schedule, or where the network's answers are not finite.
    """
    if not tolerance > 0:
        raise FaroutError(f"the tolerance of the probability flow is above 0, got {tolerance}")
    time = VPTime(schedule)

    def check(sigmas: Tensor) -> None:
        time.check(sigmas, "probability_flow")
        if sigmas.shape[1] != 2:
            shape = tuple(sigmas.shape)
            raise FaroutError(
                f"probability_flow finds its own steps: sigmas must have shape (B, 2), start and end, got {shape}"
            )

    def step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
        low = float(schedule.sigma[0])
        start, end = (time.t_of(each.cpu().double().clamp(min=low)) for each in (sigma, then))
        flow = _Flow(time, predict, tolerance, start, end, x / (1 + expand_dims(sigma, x) ** 2).sqrt())
        flow.run()
        moved = flow.y * (1 + expand_dims(then, x) ** 2).sqrt()
        return torch.where(expand_dims(then, x) > 0, moved, flow.x0), state

    return make_solver(step, "probability_flow", probability_flow.__doc__ or "", once=False, check=check)


@dataclass
class _Flow:
    """The rows of one call: times t (B,) and ends, float64; values y = x_vp (B, …); slopes and x0 at y, and steps."""

    time: VPTime
    predict: Predictor
    tolerance: float
    t: Tensor
    end: Tensor
    y: Tensor

    def run(self) -> None:
        """Moves every row to its end."""
        everything = torch.arange(len(self.t))
        self.slope, self.x0 = self._drift(self.y, self.t, everything)
        self.step = torch.zeros_like(self.t)
        running = (self.t != self.end).nonzero().squeeze(1)
        if len(running):
            self.step[running] = self._first_step(running)
        held = torch.zeros(len(self.t), dtype=torch.bool)
        while len(running):
            accepted = self._try(running, held)
            held[running] = ~accepted
            running = running[self.t[running] != self.end[running]]

    def _drift(self, y: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and x0 of some rows."""
        sigma = self.time.sigma_of(t)
        x0 = self.predict(
            y * (1 + expand_dims(sigma, y) ** 2).sqrt(), sigma.to(y.device, torch.float32), rows.to(y.device)
        )
        return vp_drift(self.time, y, sigma, x0), x0

    def _size(self, values: Tensor, scale: Tensor) -> Tensor:
        """Root mean square over each row, (B,) float64 on the CPU; raises FaroutError where it is not finite."""
        size = in_float64(values / scale).flatten(1).square().mean(1).sqrt().cpu()
        if not bool(torch.isfinite(size).all()):
            raise FaroutError(
                "the probability flow left the finite numbers: the network's answers are NaN or too large"
            )
        return size

    def _scale(self, *values: Tensor) -> Tensor:
        return self.tolerance * (1 + torch.stack([value.abs() for value in values]).amax(0))

    def _first_step(self, rows: Tensor) -> Tensor:
        """A first length from the size of slope and curvature (Hairer, Nørsett & Wanner 1993, section II.4)."""
        y, slope, t = self.y[rows], self.slope[rows], self.t[rows]
        way, scale = self.end[rows] - t, self._scale(y)
        size, speed = self._size(y, scale), self._size(slope, scale)
        trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).minimum(way.abs())
        there, _ = self._drift(y + expand_dims(trial * way.sign(), y) * slope, t + trial * way.sign(), rows)
        bend = self._size(there - slope, scale) / trial
        most = speed.maximum(bend)
        length = torch.where(most <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / most).pow(1 / 5))
        return torch.minimum(length, 100 * trial).minimum(way.abs())

    def _try(self, rows: Tensor, held: Tensor) -> Tensor:
        """One step of the rows, (R,): those whose error is small enough move; says which, (R,)."""
        t, y, way = self.t[rows], self.y[rows], self.end[rows] - self.t[rows]
        length = self.step[rows].minimum(way.abs())
        if bool((length <= 1e-12 * (1 + t.abs())).any()):
            raise FaroutError("the probability flow's steps became too short; raise its tolerance")
        last = length >= way.abs()
        then = torch.where(last, self.end[rows], t + length * way.sign())
        new, slopes, x0 = self._stages(rows, y, t, then - t)
        wrong = expand_dims(then - t, y) * _mix(_ERROR, slopes)
        error = self._size(wrong, self._scale(y, new))
        accepted = error < 1
        factor = (_SAFETY * error.clamp(min=1e-30).pow(-1 / 5)).clamp(_LEAST, _MOST)
        self.step[rows] = length * torch.where(held[rows] | ~accepted, factor.clamp(max=1.0), factor)
        moved, kept = rows[accepted], accepted.to(y.device)
        self.t[moved], self.y[moved.to(y.device)] = then[accepted], new[kept]
        self.slope[moved.to(y.device)], self.x0[moved.to(y.device)] = slopes[-1][kept], x0[kept]
        return accepted

    def _stages(self, rows: Tensor, y: Tensor, t: Tensor, step: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """y after a step of order 5, the seven slopes, and x0 at the new y."""
        slopes, new, x0 = [self.slope[rows.to(y.device)]], y, y
        for node, weights in zip(_NODES, _STAGES, strict=True):
            new = y + expand_dims(step, y) * _mix(weights, slopes)
            slope, x0 = self._drift(new, t + node * step, rows)
            slopes.append(slope)
        return new, slopes, x0


def _mix(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    mixed = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        mixed = mixed + weight * slope
    return mixed
