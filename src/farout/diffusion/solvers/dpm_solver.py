"""DPM-Solver++(2M): second order in lambda = -log sigma, from x0 of this step and of the one before."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import Predictor, State, make_solver

__all__ = ["dpm_solver_2m"]


def _step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
    x0 = predict(x, sigma)
    mixed = x0
    if state:
        # r = h_last / h; a step that starts or ends at sigma 0 has infinite length and falls back to first order
        finite = (state["sigma"] > 0) & (sigma_next > 0)
        r = (state["sigma"].log() - sigma.log()) / (sigma.log() - sigma_next.log())
        weight = torch.where(finite, 1 / (2 * r), torch.zeros_like(r))
        mixed = x0 + expand_dims(weight, x) * (x0 - state["x0"])
    ratio = sigma_next / sigma
    return expand_dims(ratio, x) * x + expand_dims(1 - ratio, x) * mixed, {"x0": x0, "sigma": sigma}


dpm_solver_2m = make_solver(
    _step,
    "dpm_solver_2m",
    "DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in log sigma, one evaluation a step.",
    once=True,
)
