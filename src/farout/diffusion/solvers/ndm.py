"""NDM: the probability flow in fixed steps of t (Liu et al. 2022 call the fourth-order rule FON)."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Predictor, Solver, State, make_solver
from farout.diffusion.solvers.fourth_order import fourth_order_solver
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["ndm1", "ndm4", "vp_drift"]


def vp_drift(time: VPTime, x_vp: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """d x_vp / dt of the probability flow, in levels (Song et al. 2021, eq. 13): beta/2 (eps / std - x_vp), where
    std = sqrt(1 - abar) and eps / std = (x_vp - sqrt(abar) x0) / (1 - abar).
    """
    half = time.beta(time.t_of(sigma)) / 2
    sigma = sigma.cpu().double()
    square = 1 + sigma**2
    # (x_vp - sqrt(abar) x0) / (1 - abar) - x_vp, with 1 / (1 - abar) = (1 + sigma^2) / sigma^2
    return expand_dims(half / sigma**2, x_vp) * x_vp - expand_dims(half * square.sqrt() / sigma**2, x_vp) * x0


class _LinearTransfer:
    """x_vp' = x_vp + (t' - t) d, with d the drift of the probability flow."""

    def __init__(self, time: VPTime) -> None:
        self.time = time

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        return vp_drift(self.time, x / (1 + expand_dims(sigma, x) ** 2).sqrt(), sigma, x0)

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        now, after = ((1 + expand_dims(each, x) ** 2).sqrt() for each in (sigma, sigma_next))
        return after * (x / now + expand_dims(self.time.t_of(sigma_next) - self.time.t_of(sigma), x) * slope)


def ndm4(schedule: NoiseSchedule) -> Solver:
    """The probability flow in fixed steps of t, by Adams-Bashforth's four slopes after three steps of RK4 (the paper's
    PF+; Liu et al. 2022 call it FON); n + 9 evaluations for n steps, order 4 on even grids of levels.

    Rows of fewer than three steps, or of three that end in sigma 0, raise FaroutError.
    """
    time = VPTime(schedule)
    return fourth_order_solver("ndm4", ndm4.__doc__ or "", _LinearTransfer(time), time)


def ndm1(schedule: NoiseSchedule) -> Solver:
    """The probability flow in fixed steps of t by Euler's rule; n evaluations for n steps, order 1."""
    time = VPTime(schedule)
    transfer = _LinearTransfer(time)

    def step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
        return transfer.move(x, transfer.slope(x, sigma, predict(x, sigma)), sigma, sigma_next), state

    return make_solver(step, "ndm1", ndm1.__doc__ or "", once=True, check=lambda sigmas: time.check(sigmas, "ndm1"))
