"""Heun's second-order method (Karras et al. 2022, "Elucidating the design space of diffusion-based models")."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from farout.diffusion.solvers.base import RowDenoiser, RowState, Solver

__all__ = ["Heun"]


class Heun(Solver):
    """Heun's method (Karras et al. 2022, algorithm 1): second order.

    Two evaluations per step; one in a step that ends at sigma 0, where no network can be evaluated.
    """

    name = "heun"
    evaluates_once: ClassVar[bool] = False

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x' = x + (sigma' - sigma) (d + d') / 2, where d' is the slope at the end of an Euler step."""
        # algorithm 1, lines 4 and 5: Euler step
        d = (x - model(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * d
        # lines 6 to 8: second-order correction of the rows that do not end at sigma 0
        rows = (sigma_next.flatten() > 0).nonzero().squeeze(1)
        if len(rows) > 0:
            d_next = (x_next[rows] - model(x_next[rows], sigma_next[rows], rows)) / sigma_next[rows]
            x_next[rows] = x[rows] + (sigma_next[rows] - sigma[rows]) * ((d[rows] + d_next) / 2)
        return x_next
