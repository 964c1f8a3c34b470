"""UniPC (Zhao et al. 2023, "UniPC: a unified predictor-corrector framework for fast sampling of diffusion models")."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import RowDenoiser, RowState, Solver

__all__ = ["UniPC"]


class UniPC(Solver):
    """UniPC of order 2 in lambda = -log sigma, with B(h) = exp(-h) - 1 and data prediction (Zhao et al. 2023).

    One evaluation per step: the corrector of a step uses the evaluation at its end, which the next step needs anyway.
    The first step of a row, and a step that ends at sigma 0, where lambda is infinite, are of first order. The weights
    grow with the factor by which sigma rises: inversions require short steps in log sigma, or another method.
    """

    name = "unipc"

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """Corrects x by the evaluation at x, then predicts the next x."""
        x0 = model(x, sigma)
        if not state:
            state["steps"] = torch.zeros(len(x), dtype=torch.long, device=x.device)
            state |= {"x": x, "x0": x0, "x0_before": x0, "sigma": sigma, "sigma_before": sigma}
        steps = expand_dims(state["steps"], x)

        # UniC: the last step again, with x0 at its end
        rows = (state["steps"] > 0).nonzero().squeeze(1)
        if len(rows) > 0:
            last = {name: values[rows] for name, values in state.items()}
            x = x.index_copy(0, rows, _correct(x0[rows], sigma[rows], last))

        # UniP: D = x0 + (1/2) D_1 / r_1, where D_1 = x0_last - x0 and r_1 = (lambda_last - lambda) / h
        h = _lambda(sigma_next) - _lambda(sigma)
        r1 = (_lambda(state["sigma"]) - _lambda(sigma)) / h
        is_second_order = (steps > 0) & (sigma_next > 0)
        D = x0 + torch.where(is_second_order, (0.5 / r1).to(x), 0.0) * (state["x0"] - x0)
        state.update(x0_before=state["x0"], sigma_before=state["sigma"])
        state.update(steps=state["steps"] + 1, x=x, x0=x0, sigma=sigma)
        return sigma_next / sigma * x + (1 - sigma_next / sigma) * D


def _lambda(sigma: Tensor) -> Tensor:
    """-log sigma in float64, on the CPU because not every device has float64; infinite at sigma 0."""
    return -sigma.cpu().double().log()


def _correct(x0: Tensor, sigma: Tensor, last: RowState) -> Tensor:
    """UniC: x at sigma from the step that led there and x0 (R, ...) at its end.

    Args:
        x0: of the predicted x.
        sigma: the end of the step, (R, 1, ...).
        last: values at the start of the step (x, x0, sigma) and of the step before (x0_before, sigma_before).
    """
    h = _lambda(sigma) - _lambda(last["sigma"])
    r1 = (_lambda(last["sigma_before"]) - _lambda(last["sigma"])) / h
    # the weights rho of D_1 / r_1 and D_2 (r_2 = 1) solve rho_1 + rho_2 = b_1, r_1 rho_1 + rho_2 = b_2
    B = torch.expm1(-h)
    b1 = (B / -h - 1) / B
    b2 = 2 * ((B / -h - 1) / -h - 0.5) / B
    rho1 = (b1 - b2) / (1 - r1)
    rho2 = b1 - rho1
    # of first order where there is no step before
    is_second_order = expand_dims(last["steps"], x0) > 1
    D1 = torch.where(is_second_order, (rho1 / r1).to(x0), 0.0) * (last["x0_before"] - last["x0"])
    D2 = torch.where(is_second_order, rho2.to(x0), 0.5) * (x0 - last["x0"])
    ratio = sigma / last["sigma"]
    return ratio * last["x"] + (1 - ratio) * (last["x0"] + (D1 + D2))
