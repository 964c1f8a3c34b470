"""Adams-Bashforth multistep rules: a step along a mixture of the present slope and up to three past ones."""

from __future__ import annotations

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import Predictor, Solver, State, Step, make_solver, predict_eps
from farout.diffusion.solvers.heun import heun_slope

__all__ = ["adams_bashforth", "mix_slopes", "multistep", "update_history"]

# Coefficients of equal steps; row k mixes the present slope with k past ones, the newest first.
_COEFFICIENTS = (
    torch.tensor([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], dtype=torch.float32) / 24
)


def mix_slopes(slope: Tensor, past: Tensor, count: Tensor, order: int) -> Tensor:
    """The Adams-Bashforth mixture of slopes (B, …) with up to three past ones (B, 3, …), the newest first; row i has
    count[i] of them and gets the highest order, at most `order`, that they allow.
    """
    history = torch.cat([slope[:, None], past[:, :3]], dim=1)
    weights = _COEFFICIENTS.to(slope.device)[count.clamp(max=order - 1)]
    return (history * weights.reshape(*weights.shape, *[1] * (slope.ndim - 1))).sum(1)


def update_history(slope: Tensor, past: Tensor, count: Tensor) -> State:
    """The state of a row after a step: its last three slopes, and how many it has had."""
    return {"past": torch.cat([slope[:, None], past[:, :2]], dim=1), "count": count + 1}


def multistep(order: int, *, heun_first: bool) -> Step:
    """A step of Adams-Bashforth's rule on eps; `heun_first`: the first step of each row is Heun's."""

    def step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
        """`count` is the number of past slopes of each row: rows may start at different steps of a batch."""
        eps = predict_eps(predict, x, sigma)
        count = state.get("count", torch.zeros(len(x), dtype=torch.long, device=x.device))
        past = state.get("past", x.new_zeros(len(x), 3, *x.shape[1:]))
        slope = mix_slopes(eps, past, count, order)
        first = (count == 0).nonzero().squeeze(1)
        if heun_first and len(first):

            def predict_first(x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
                return predict(x, sigma, first if rows is None else first[rows])

            slope[first] = heun_slope(predict_first, x[first], sigma[first], sigma_next[first], eps[first])
        return x + expand_dims(sigma_next - sigma, x) * slope, update_history(eps, past, count)

    return step


def adams_bashforth(order: int = 4) -> Solver:
    """Adams-Bashforth mixing of the present and up to `order - 1` past eps (Liu et al. 2022, eq. 12), in the paper's
    coefficients (equal steps assumed); the first steps use lower orders. One evaluation a step.

    Raises FaroutError unless 1 <= order <= 4.
    """
    if not 1 <= order <= 4:
        raise FaroutError(f"Adams-Bashforth is offered in orders 1 to 4, got {order}")
    return make_solver(multistep(order, heun_first=False), f"adams_bashforth_{order}", "Adams-Bashforth.", once=True)
