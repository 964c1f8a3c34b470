"""PNDM (Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds")."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from farout.diffusion.solvers.adams_bashforth import AdamsBashforth
from farout.diffusion.solvers.base import check_warm_up
from farout.diffusion.solvers.fourth_order import FourthOrderSolver

__all__ = ["PNDM2", "PNDM4"]


class PNDM2(AdamsBashforth):
    """PNDM of order 2, the paper's S-PNDM: (3 e_t - e_(t-1)) / 2 after a Heun step; n + 1 evaluations for n steps.

    A path of one step to sigma 0 raises FaroutError, because no level is left for the Heun step.
    """

    evaluates_once: ClassVar[bool] = False
    heun_start: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(2)
        self.name = "pndm2"

    def check_path(self, sigmas: Tensor) -> None:
        """Raises FaroutError for paths that are too short for the Heun step."""
        check_warm_up(sigmas, self.name, 1)


class PNDM4(FourthOrderSolver):
    """PNDM of order 4, the paper's F-PNDM: the slope is eps, the transfer part is that of DDIM.

    The multistep coefficients are those of equal steps: order 4 on paths of evenly spaced sigmas, order 2 with a small
    constant on evenly spaced levels t. Paths of fewer than three steps that end above sigma 0 raise FaroutError.
    """

    name = "pndm4"

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """e = eps = (x - x0) / sigma."""
        return (x - x0) / sigma

    def transfer(self, x: Tensor, e: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Liu et al. 2022, eq. 11, divided by sqrt(abar'): x' = x + (sigma' - sigma) e."""
        return x + (sigma_next - sigma) * e
