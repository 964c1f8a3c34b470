"""Adams-Bashforth multistep methods: a step along a combination of the present slope and up to three past slopes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.solvers.base import RowDenoiser, RowState, Solver

__all__ = ["AdamsBashforth", "combine_slopes", "past_slopes"]

_COEFFICIENTS = (
    torch.tensor([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], dtype=torch.float32) / 24
)
"""Of equal steps; row k combines the present slope with k past slopes, the newest first."""


def past_slopes(x: Tensor, state: RowState) -> tuple[Tensor, Tensor]:
    """The last three slopes of each row (R, 3, ...), the newest first, and how many steps it has taken (R,)."""
    past = state.get("past_slopes", x.new_zeros(len(x), 3, *x.shape[1:]))
    steps = state.get("steps", torch.zeros(len(x), dtype=torch.long, device=x.device))
    return past, steps


def combine_slopes(slope: Tensor, order: int, state: RowState) -> Tensor:
    """The Adams-Bashforth combination of `slope` (R, ...) with the past slopes of each row, of at most this order.

    The n-th step of a row is of order n until `order` is reached. `slope` is added to the state. Order 4 is
    (55 e_t - 59 e_(t-1) + 37 e_(t-2) - 9 e_(t-3)) / 24 (Liu et al. 2022, "Pseudo numerical methods for diffusion models
    on manifolds", eq. 12).
    """
    past, steps = past_slopes(slope, state)
    slopes = torch.cat([slope[:, None], past], dim=1)
    weights = _COEFFICIENTS.to(slope.device)[steps.clamp(max=order - 1)]
    state.update(past_slopes=slopes[:, :3], steps=steps + 1)
    return (weights.reshape(-1, 4, *[1] * (slope.ndim - 1)) * slopes).sum(1)


class AdamsBashforth(Solver):
    """Adams-Bashforth on eps, with the coefficients of equal steps (Liu et al. 2022, eq. 12); one evaluation per step.

    The first steps of a row are of lower order. Subclasses with `heun_start` take the first step of each row by Heun's
    method, with a second evaluation.

    Args:
        order: 1 to 4.

    Raises FaroutError for another order.
    """

    heun_start: ClassVar[bool] = False

    def __init__(self, order: int = 4) -> None:
        if not 1 <= order <= 4:
            raise FaroutError(f"Adams-Bashforth is implemented for orders 1 to 4, got {order}")
        self.order, self.name = order, f"adams_bashforth_{order}"

    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """x' = x + (sigma' - sigma) e', where e' combines the present eps and past ones."""
        _, steps = past_slopes(x, state)
        eps = (x - model(x, sigma)) / sigma
        slope = combine_slopes(eps, self.order, state)
        # the first step by Heun's method, for the rows that do not end at sigma 0
        rows = ((steps == 0) & (sigma_next.flatten() > 0)).nonzero().squeeze(1)
        if self.heun_start and len(rows) > 0:
            x_next = (x + (sigma_next - sigma) * eps)[rows]
            eps_next = (x_next - model(x_next, sigma_next[rows], rows)) / sigma_next[rows]
            slope[rows] = (eps[rows] + eps_next) / 2
        return x + (sigma_next - sigma) * slope
