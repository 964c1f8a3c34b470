"""PNDM (Liu et al. 2022, ICLR): multistep rules on eps with DDIM's transfer."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.adams_bashforth import multistep
from farout.diffusion.solvers.base import Solver, check_warm_up, make_solver
from farout.diffusion.solvers.fourth_order import fourth_order_solver
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["pndm2", "pndm4"]

pndm2 = make_solver(
    multistep(2, heun_first=True),
    "pndm2",
    "PNDM of order 2, S-PNDM (Liu et al. 2022): (3 eps - past eps) / 2 after a first step of Heun's rule; "
    "n + 1 evaluations. A row of one step to sigma 0 raises FaroutError: no level is left to warm up on.",
    once=False,
    check=lambda sigmas: check_warm_up(sigmas, "pndm2", 1),
)


class DDIMTransfer:
    """x' = x + (sigma' - sigma) eps: DDIM's transfer, divided by sqrt(abar')."""

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        return (x - x0) / expand_dims(sigma, x)

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return x + expand_dims(sigma_next - sigma, x) * slope


def pndm4(schedule: NoiseSchedule) -> Solver:
    """PNDM of order 4, F-PNDM (Liu et al. 2022): DDIM's transfer with Adams-Bashforth's four slopes after
    three steps of RK4, whose middle lies halfway in t; n + 9 evaluations for n steps.

    The coefficients are those of equal steps: order 4 where sigma falls evenly, order 2 (with a small constant) on a
    grid of levels. Rows of fewer than three steps, or of three that end in sigma 0, raise FaroutError.
    """
    return fourth_order_solver("pndm4", pndm4.__doc__ or "", DDIMTransfer(), VPTime(schedule))
