"""The fourth-order linear multistep method of Liu et al. (2022), which PNDM and NDM share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from farout.diffusion.solvers.adams_bashforth import combine_slopes, past_slopes
from farout.diffusion.solvers.base import RowDenoiser, RowState, VPSolver, check_warm_up

__all__ = ["FourthOrderSolver"]


class FourthOrderSolver(VPSolver):
    """Adams-Bashforth of order 4 after three steps of Runge-Kutta (Liu et al. 2022, "Pseudo numerical methods for
    diffusion models on manifolds", algorithm 2); n + 9 evaluations for n steps.

    The paper separates the *gradient part* of a method, which combines slopes, from its *transfer part* phi, which
    moves x by a slope. The gradient part is in `step`; subclasses define the slope and the transfer part.
    """

    evaluates_once: ClassVar[bool] = False
    warm_up_steps: ClassVar[int] = 3

    @abstractmethod
    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """The slope e at x (R, ...) and sigma (R, 1, ...), from the denoiser's x0 (R, ...)."""

    @abstractmethod
    def transfer(self, x: Tensor, e: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """phi(x, e, sigma, sigma'): x (R, ...) at sigma moved by the slope e to sigma'."""

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x' = phi(x, e', sigma, sigma'), where e' combines the slopes."""
        _, steps = past_slopes(x, state)
        e_t = self.slope(x, sigma, model(x, sigma))
        # gradient part, eq. 12: e' = (55 e_t - 59 e_(t-1) + 37 e_(t-2) - 9 e_(t-3)) / 24
        e = combine_slopes(e_t, 4, state)
        # eq. 13: the first three steps of a row by Runge-Kutta, with the middle in t
        rows = (steps < self.warm_up_steps).nonzero().squeeze(1)
        if len(rows) > 0:
            start, s, s_next, e1 = x[rows], sigma[rows], sigma_next[rows], e_t[rows]
            s_middle = self.time.midpoint(s, s_next).to(s)
            x2 = self.transfer(start, e1, s, s_middle)
            e2 = self.slope(x2, s_middle, model(x2, s_middle, rows))
            x3 = self.transfer(start, e2, s, s_middle)
            e3 = self.slope(x3, s_middle, model(x3, s_middle, rows))
            x4 = self.transfer(start, e3, s, s_next)
            e4 = self.slope(x4, s_next, model(x4, s_next, rows))
            e[rows] = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        # transfer part
        return self.transfer(x, e, sigma, sigma_next)

    def check_path(self, sigmas: Tensor) -> None:
        """Raises FaroutError for a sigma outside the schedule, and for paths that are too short for the warm-up."""
        super().check_path(sigmas)
        check_warm_up(sigmas, self.name, self.warm_up_steps)
