"""DPM-Solver++ (Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models")."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.diffusion.solvers.base import RowDenoiser, RowState, Solver

__all__ = ["DPMSolver2M"]


class DPMSolver2M(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in lambda = -log sigma, one evaluation per step.

    The first step of a row, and a step that ends at sigma 0, where lambda is infinite, are of first order.
    """

    name = "dpm_solver_2m"

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x' = (sigma' / sigma) x + (1 - sigma' / sigma) D, where sigma' / sigma = exp(-h)."""
        x0 = model(x, sigma)
        D = x0
        if state:
            # r = h_last / h; a row without an earlier step has sigma 0 in its state
            r = (state["sigma"].log() - sigma.log()) / (sigma.log() - sigma_next.log())
            # D = (1 + 1 / 2r) x0 - (1 / 2r) x0_last
            is_second_order = (state["sigma"] > 0) & (sigma_next > 0)
            D = x0 + torch.where(is_second_order, 1 / (2 * r), 0.0) * (x0 - state["x0"])
        state.update(x0=x0, sigma=sigma)
        return sigma_next / sigma * x + (1 - sigma_next / sigma) * D
