"""NDM: classical numerical methods for the probability flow in fixed steps of t (Liu et al. 2022, 2211.11255)."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.solvers.base import RowDenoiser, RowState, VPSolver
from farout.diffusion.solvers.fourth_order import FourthOrderSolver
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["NDM1", "NDM4", "vp_drift"]


def vp_drift(time: VPTime, x_vp: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """d x_vp / dt = beta / 2 (eps / std - x_vp), the probability flow ODE (Song et al. 2021, eq. 13), t in levels.

    Here std^2 = 1 - abar = sigma^2 / (1 + sigma^2), and eps / std = (x_vp - sqrt(abar) x0) / (1 - abar).

    Args:
        time: of the schedule.
        x_vp: variance-preserving values (R, ...).
        sigma: noise levels (R, 1, ...).
        x0: clean values (R, ...).
    """
    sigma = sigma.cpu().double()  # not every device has float64
    half_beta = time.beta(time.t_of(sigma)) / 2
    x_weight = half_beta / sigma**2
    x0_weight = half_beta * (1 + sigma**2).sqrt() / sigma**2
    return x_weight.to(x_vp) * x_vp - x0_weight.to(x_vp) * x0


def _vp_slope(time: VPTime, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    return vp_drift(time, x / (1 + sigma**2).sqrt(), sigma, x0)


def _linear_transfer(time: VPTime, x: Tensor, d: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x_vp' = x_vp + (t' - t) d, for x = sqrt(1 + sigma^2) x_vp."""
    x_vp = x / (1 + sigma**2).sqrt()
    return (1 + sigma_next**2).sqrt() * (x_vp + (time.t_of(sigma_next) - time.t_of(sigma)).to(x) * d)


class NDM1(VPSolver):
    """The probability flow by Euler's method in fixed steps of t: first order, one evaluation per step."""

    name = "ndm1"

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x_vp' = x_vp + (t' - t) d, where d is the drift of the probability flow."""
        d = _vp_slope(self.time, x, sigma, model(x, sigma))
        return _linear_transfer(self.time, x, d, sigma, sigma_next)


class NDM4(FourthOrderSolver):
    """The probability flow by a fourth-order multistep method in fixed steps of t; the denoising paper's PF+, FON in
    the PNDM paper.

    The slope is the drift of the probability flow, the transfer part a straight line in t: order 4 on evenly spaced
    levels. Paths of fewer than three steps that end above sigma 0 raise FaroutError.
    """

    name = "ndm4"

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """e = d x_vp / dt."""
        return _vp_slope(self.time, x, sigma, x0)

    def transfer(self, x: Tensor, e: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """x_vp' = x_vp + (t' - t) e."""
        return _linear_transfer(self.time, x, e, sigma, sigma_next)
