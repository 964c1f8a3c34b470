"""UniPC of order 2: a predictor whose last step is corrected by the evaluation that the next one makes anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import Predictor, State, make_solver

__all__ = ["unipc"]


def _log_ratio(sigma: Tensor, then: Tensor) -> Tensor:
    """How far log SNR / 2 rises from one sigma to the other, both on the CPU; float64."""
    return sigma.double().log() - then.double().log()


def _corrector_weights(back: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the past and the new difference of x0 (Zhao et al. 2023, with B(h) = exp(-h) - 1): the solution
    of rho_1 + rho_2 = b_1, r rho_1 + rho_2 = b_2, r = `back` / h the past step's end, seen from the present one.
    """
    base = torch.expm1(-h)
    first = (base / -h - 1) / base
    second = 2 * ((base / -h - 1) / -h - 0.5) / base
    past = (first - second) / (1 - back / h)
    return past, first - past


def _corrected(x: Tensor, x0: Tensor, state: State, sigma: Tensor) -> Tensor:
    """x at sigma by the corrector, from x0 of the predicted x; rows without a past step keep what was predicted."""
    # numbers of rows are computed in float64, which not every device has
    sigma, count, past, before = (each.cpu() for each in (sigma, state["count"], state["sigma"], state["before"]))
    ran = count > 0
    past_sigma = torch.where(ran, past, 2 * sigma)  # any number: those rows are not taken
    h = _log_ratio(past_sigma, sigma)
    second = count > 1
    back = torch.where(second, _log_ratio(past_sigma, torch.where(second, before, 2 * past_sigma)), -h)
    past, new = _corrector_weights(back, h)
    past, new = torch.where(second, past, 0.0), torch.where(second, new, 0.5)
    old = state["x0"]
    # differences are divided by where they lie in units of h, as the paper's are
    difference = expand_dims(past * h / back, x) * (state["x0_before"] - old) + expand_dims(new, x) * (x0 - old)
    ratio = expand_dims(sigma / past_sigma, x)
    corrected = ratio * state["x"] + (1 - ratio) * (old + difference)
    return torch.where(expand_dims(ran.float(), x) > 0, corrected, x)


def _step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
    x0 = predict(x, sigma)
    if not state:
        state = {"count": torch.zeros(len(x), dtype=torch.long, device=x.device)}
        state |= {"x": x, "x0": x0, "x0_before": x0, "sigma": sigma, "before": sigma}
    x = _corrected(x, x0, state, sigma)
    mixed = x0
    now, then, count, past = (each.cpu() for each in (sigma, then, state["count"], state["sigma"]))
    second = (count > 0) & (then > 0)  # a last step to sigma = 0 has infinite length: first order
    if bool(second.any()):
        h = _log_ratio(now, torch.where(then > 0, then, now / 2))
        back = _log_ratio(now, torch.where(second, past, 2 * now))
        mixed = x0 + expand_dims(torch.where(second, 0.5 * h / back, 0.0), x) * (state["x0"] - x0)
    ratio = expand_dims(then / now, x)
    kept = {"count": state["count"] + 1, "x": x, "x0": x0, "sigma": sigma}
    return ratio * x + (1 - ratio) * mixed, {**kept, "x0_before": state["x0"], "before": state["sigma"]}


unipc = make_solver(
    _step,
    "unipc",
    "UniPC of order 2 in log sigma, B2(h) (Zhao et al. 2023, data prediction): one evaluation a "
    "step; the first step, and one that ends in sigma 0, are of first order. Its weights grow with the factor by which "
    "sigma rises: inversions require short steps in log sigma, or another method.",
    once=True,
)
