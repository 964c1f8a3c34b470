"""Solvers that need nothing but a path: `solver(denoiser, x, sigmas, condition, callback, guide) -> x`.

The loop and the interface are in `solvers.base`; methods that are built from a schedule are in `plms_pndm` and
`probability_flow`; `solvers.lookup` finds all of them by name.

All rules are written for `x = x0 + sigma eps`, where the probability-flow equation reads dx/dsigma = eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import spread
from farout.diffusion.solvers.base import Evaluation, Guide, Predictor, Solver, State, Step, check_warm_up, make_solver

__all__ = [
    "Evaluation",
    "Guide",
    "Solver",
    "adams_bashforth",
    "ddim",
    "dpm_solver_2m",
    "heun",
    "mixed_slopes",
    "plms",
    "pndm2",
    "remembered",
]


def _of(predict: Predictor, some: Tensor) -> Predictor:
    """The predictor that speaks of `some` of the rows of another one."""
    return lambda x, sigma, rows=None: predict(x, sigma, some if rows is None else some[rows])


def _eps(predict: Predictor, x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
    return (x - predict(x, sigma, rows)) / spread(sigma, x)


def _ddim_step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
    return x + spread(then - sigma, x) * _eps(predict, x, sigma), state


def _heun_step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
    eps = _eps(predict, x, sigma)
    return x + spread(then - sigma, x) * _heun_mean(predict, x, sigma, then, eps), state


def _heun_mean(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, eps: Tensor) -> Tensor:
    """The mean of eps and its value after a trial step; where the path ends at 0, eps alone (no level is below)."""
    rows = (then > 0).nonzero().squeeze(1)
    if not len(rows):
        return eps
    trial = (x + spread(then - sigma, x) * eps)[rows]
    mean = eps.clone()
    mean[rows] = (eps[rows] + _eps(predict, trial, then[rows], rows)) / 2
    return mean


def _2m_step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
    x0 = predict(x, sigma)
    mixed = x0
    if state:
        # lambda = -log sigma; a last step to sigma = 0 has infinite length and falls back to first order
        past = state["sigma"] > 0
        ratio = (state["sigma"].log() - sigma.log()) / (sigma.log() - then.log())
        weight = torch.where(past & (then > 0), 1 / (2 * ratio), torch.zeros_like(ratio))
        mixed = x0 + spread(weight, x) * (x0 - state["x0"])
    return spread(then / sigma, x) * x + spread(1 - then / sigma, x) * mixed, {"x0": x0, "sigma": sigma}


_ADAMS_BASHFORTH = (
    torch.tensor([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], dtype=torch.float32) / 24
)


def mixed_slopes(slope: Tensor, past: Tensor, count: Tensor, order: int) -> Tensor:
    """The Adams-Bashforth mixture of slopes (B, …) with up to three past ones (B, 3, …), the newest first; row i has
    count[i] of them and gets the highest order, at most `order`, that they allow.
    """
    history = torch.cat([slope[:, None], past[:, :3]], dim=1)
    weights = _ADAMS_BASHFORTH.to(slope.device)[count.clamp(max=order - 1)]
    return (history * weights.reshape(*weights.shape, *[1] * (slope.ndim - 1))).sum(1)


def remembered(slope: Tensor, past: Tensor, count: Tensor) -> State:
    """What a row knows after a step: its last three slopes, and how many it has had."""
    return {"past": torch.cat([slope[:, None], past[:, :2]], dim=1), "count": count + 1}


def _multistep(order: int, *, heun_first: bool) -> Step:
    def step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
        """Mixes eps with its past, row by row; `count` says how much of it a row has."""
        eps = _eps(predict, x, sigma)
        count = state.get("count", torch.zeros(len(x), dtype=torch.long, device=x.device))
        past = state.get("past", x.new_zeros(len(x), 3, *x.shape[1:]))
        mixed = mixed_slopes(eps, past, count, order)
        first = (count == 0).nonzero().squeeze(1)
        if heun_first and len(first):
            mixed[first] = _heun_mean(_of(predict, first), x[first], sigma[first], then[first], eps[first])
        return x + spread(then - sigma, x) * mixed, remembered(eps, past, count)

    return step


ddim = make_solver(
    _ddim_step,
    "ddim",
    "DDIM with eta = 0 (Song et al. 2021, eq. 12): x' = x + (sigma' - sigma) eps. One evaluation a step.",
    once=True,
)
heun = make_solver(
    _heun_step,
    "heun",
    "Heun's second-order rule (Karras et al. 2022, algorithm 1): two evaluations a step, one where it ends at sigma 0.",
    once=False,
)
dpm_solver_2m = make_solver(
    _2m_step,
    "dpm_solver_2m",
    "DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in log sigma, one evaluation a step.",
    once=True,
)


def adams_bashforth(order: int = 4) -> Solver:
    """Adams-Bashforth mixing of the present and up to `order - 1` past eps (Liu et al. 2022, eq. 12), in the paper's
    coefficients (equal steps assumed); the first steps use lower orders. One evaluation a step.

    Raises FaroutError unless 1 <= order <= 4.
    """
    if not 1 <= order <= 4:
        raise FaroutError(f"Adams-Bashforth is offered in orders 1 to 4, got {order}")
    return make_solver(_multistep(order, heun_first=False), f"adams_bashforth_{order}", "Adams-Bashforth.", once=True)


plms = make_solver(
    _multistep(4, heun_first=True),
    "plms",
    "PLMS: Adams-Bashforth of order 4 whose first step is a Heun step (one evaluation more), history per row.",
    once=False,
)

pndm2 = make_solver(
    _multistep(2, heun_first=True),
    "pndm2",
    "PNDM of order 2, S-PNDM (Liu et al. 2022): (3 eps - past eps) / 2 after a first step of Heun's rule; "
    "n + 1 evaluations. A row of one step to sigma 0 raises FaroutError: no level is left to warm up on.",
    once=False,
    check=lambda sigmas: check_warm_up(sigmas, "pndm2", 1),
)
