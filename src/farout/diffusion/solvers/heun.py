"""Heun's second-order rule for the probability flow dx/dsigma = eps."""

from __future__ import annotations

from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import Predictor, State, make_solver, predict_eps

__all__ = ["heun", "heun_slope"]


def heun_slope(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, eps: Tensor) -> Tensor:
    """The mean of eps at x and eps after an Euler step; eps alone for rows that end at sigma 0, where no network can
    be evaluated.
    """
    rows = (sigma_next > 0).nonzero().squeeze(1)
    if not len(rows):
        return eps
    x_next = (x + expand_dims(sigma_next - sigma, x) * eps)[rows]
    slope = eps.clone()
    slope[rows] = (eps[rows] + predict_eps(predict, x_next, sigma_next[rows], rows)) / 2
    return slope


def _step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
    eps = predict_eps(predict, x, sigma)
    return x + expand_dims(sigma_next - sigma, x) * heun_slope(predict, x, sigma, sigma_next, eps), state


heun = make_solver(
    _step,
    "heun",
    "Heun's second-order rule (Karras et al. 2022, algorithm 1): two evaluations a step, one where it ends at sigma 0.",
    once=False,
)
