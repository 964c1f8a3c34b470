"""DDIM (Song, Meng & Ermon 2021, "Denoising diffusion implicit models")."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.solvers.base import RowDenoiser, RowState, Solver

__all__ = ["DDIM"]


class DDIM(Solver):
    """DDIM with eta = 0 (Song, Meng & Ermon 2021, eq. 12): first order, one evaluation per step.

    Divided by sqrt(abar), eq. 12 is Euler's method for the probability flow ODE dx / dsigma = eps (eq. 14).
    """

    name = "ddim"

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x' = x + (sigma' - sigma) eps."""
        eps = (x - model(x, sigma)) / sigma
        return x + (sigma_next - sigma) * eps
