"""DDIM: Euler's rule for the probability flow dx/dsigma = eps, where x = x0 + sigma eps."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import Predictor, State, make_solver, predict_eps

__all__ = ["ddim"]


def _step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
    eps = predict_eps(predict, x, sigma)
    return x + expand_dims(sigma_next - sigma, x) * eps, state


ddim = make_solver(
    _step,
    "ddim",
    "DDIM with eta = 0 (Song et al. 2021, eq. 12): x' = x + (sigma' - sigma) eps. One evaluation a step.",
    once=True,
)
