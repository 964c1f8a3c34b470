"""Solvers that are built from a schedule: PNDM4 (F-PNDM) and fixed steps of the probability flow (NDM1, NDM4).

Liu et al. 2022 (PNDM, ICLR): a *gradient rule* mixes slopes, a *transfer* moves by the mixture. PNDM's transfer is
DDIM's, its slopes are eps; NDM's transfer is a straight line in the time of the variance-preserving process, its slopes
are the drift of the probability flow there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from farout.diffusion.denoiser import spread
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Predictor, Solver, State, Step, check_warm_up, make_solver
from farout.diffusion.solvers.ddim_heun_dpm import mixed_slopes, remembered
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["ndm1", "ndm4", "pndm4", "vp_drift"]

_WARM_UP = 3
"""Steps of LMS4 that lack the past slopes which it mixes."""


class _Transfer(Protocol):
    """How a slope at (x, sigma) follows from x0, and where it leads."""

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """x (B, …), sigma (B,), x0 (B, …) -> slope (B, …)."""

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, then: Tensor) -> Tensor:
        """x (B, …) at sigma -> x at `then`."""


class _DDIM:
    """x' = x + (sigma' - sigma) eps: DDIM's transfer, divided by sqrt(abar')."""

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        return (x - x0) / spread(sigma, x)

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, then: Tensor) -> Tensor:
        return x + spread(then - sigma, x) * slope


def vp_drift(time: VPTime, x_vp: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """d x_vp / dt of the probability flow, in levels (Song et al. 2021, eq. 13): beta/2 (eps / std - x_vp), where
    std = sqrt(1 - abar) and eps / std = (x_vp - sqrt(abar) x0) / (1 - abar).
    """
    half = time.beta(time.t_of(sigma)) / 2
    sigma = sigma.cpu().double()
    square = 1 + sigma**2
    # (x_vp - sqrt(abar) x0) / (1 - abar) - x_vp, with 1 / (1 - abar) = (1 + sigma^2) / sigma^2
    return spread(half / sigma**2, x_vp) * x_vp - spread(half * square.sqrt() / sigma**2, x_vp) * x0


class _Linear:
    """x_vp' = x_vp + (t' - t) d, with d the drift of the probability flow."""

    def __init__(self, time: VPTime) -> None:
        self.time = time

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        return vp_drift(self.time, x / (1 + spread(sigma, x) ** 2).sqrt(), sigma, x0)

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, then: Tensor) -> Tensor:
        now, after = ((1 + spread(each, x) ** 2).sqrt() for each in (sigma, then))
        return after * (x / now + spread(self.time.t_of(then) - self.time.t_of(sigma), x) * slope)


def _runge_kutta(
    transfer: _Transfer,
    middle: Tensor,
    predict: Predictor,
    rows: Tensor,
    x: Tensor,
    sigma: Tensor,
    then: Tensor,
    first: Tensor,
) -> Tensor:
    """RK4's mixture for some rows, whose slope at (x, sigma) is `first`: three evaluations more."""
    halfway = transfer.move(x, first, sigma, middle)
    second = transfer.slope(halfway, middle, predict(halfway, middle, rows))
    halfway = transfer.move(x, second, sigma, middle)
    third = transfer.slope(halfway, middle, predict(halfway, middle, rows))
    there = transfer.move(x, third, sigma, then)
    fourth = transfer.slope(there, then, predict(there, then, rows))
    return (first + 2 * second + 2 * third + fourth) / 6


def _lms4(transfer: _Transfer, time: VPTime) -> Step:
    def step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
        """(55 e - 59 e' + 37 e'' - 9 e''') / 24; RK4 in each row's first three steps."""
        slope = transfer.slope(x, sigma, predict(x, sigma))
        count = state.get("count", torch.zeros(len(x), dtype=torch.long, device=x.device))
        past = state.get("past", x.new_zeros(len(x), 3, *x.shape[1:]))
        mixed = mixed_slopes(slope, past, count, 4)
        warm = (count < _WARM_UP).nonzero().squeeze(1)
        if len(warm):
            middle = time.between(sigma[warm], then[warm]).to(sigma)
            mixed[warm] = _runge_kutta(transfer, middle, predict, warm, x[warm], sigma[warm], then[warm], slope[warm])
        return transfer.move(x, mixed, sigma, then), remembered(slope, past, count)

    return step


def _four(name: str, doc: str, transfer: _Transfer, time: VPTime) -> Solver:
    def check(sigmas: Tensor) -> None:
        time.check(sigmas, name)
        check_warm_up(sigmas, name, _WARM_UP)

    return make_solver(_lms4(transfer, time), name, doc, once=False, check=check)


def pndm4(schedule: NoiseSchedule) -> Solver:
    """PNDM of order 4, F-PNDM (Liu et al. 2022): DDIM's transfer with Adams-Bashforth's four slopes after
    three steps of RK4, whose middle lies halfway in t; n + 9 evaluations for n steps.

    The coefficients are those of equal steps: order 4 where sigma falls evenly, order 2 (with a small constant) on a
    grid of levels. Rows of fewer than three steps, or of three that end in sigma 0, raise FaroutError.
    """
    return _four("pndm4", pndm4.__doc__ or "", _DDIM(), VPTime(schedule))


def ndm4(schedule: NoiseSchedule) -> Solver:
    """The probability flow in fixed steps of t, by Adams-Bashforth's four slopes after three steps of RK4 (the paper's
    PF+; Liu et al. 2022 call it FON); n + 9 evaluations for n steps, order 4 on even grids of levels.

    Rows of fewer than three steps, or of three that end in sigma 0, raise FaroutError.
    """
    time = VPTime(schedule)
    return _four("ndm4", ndm4.__doc__ or "", _Linear(time), time)


def ndm1(schedule: NoiseSchedule) -> Solver:
    """The probability flow in fixed steps of t by Euler's rule; n evaluations for n steps, order 1."""
    time = VPTime(schedule)
    transfer = _Linear(time)

    def step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
        return transfer.move(x, transfer.slope(x, sigma, predict(x, sigma)), sigma, then), state

    return make_solver(step, "ndm1", ndm1.__doc__ or "", once=True, check=lambda sigmas: time.check(sigmas, "ndm1"))
