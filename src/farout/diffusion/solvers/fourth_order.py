"""Fourth-order multistep rules of Liu et al. 2022 (PNDM, ICLR): Adams-Bashforth after three Runge-Kutta steps.

The paper separates a *gradient rule*, which mixes slopes, from a *transfer*, which moves by the mixture. PNDM's
transfer is DDIM's and its slopes are eps; NDM's transfer is a straight line in the time of the variance-preserving
process, and its slopes are the drift of the probability flow.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from farout.diffusion.solvers.adams_bashforth import mix_slopes, update_history
from farout.diffusion.solvers.base import Predictor, Solver, State, Step, check_warm_up, make_solver
from farout.diffusion.solvers.vp_time import VPTime

__all__ = ["Transfer", "fourth_order_solver"]

_WARM_UP = 3
"""Steps of each row that lack the three past slopes."""


class Transfer(Protocol):
    """How a slope at (x, sigma) follows from x0, and where it leads."""

    def slope(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """x (B, …), sigma (B,), x0 (B, …) -> slope (B, …)."""

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """x (B, …) at sigma -> x at `sigma_next`."""


def _runge_kutta_slope(
    transfer: Transfer,
    middle: Tensor,
    predict: Predictor,
    rows: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    first: Tensor,
) -> Tensor:
    """RK4's mixture for some rows, whose slope at (x, sigma) is `first`: three evaluations more."""
    halfway = transfer.move(x, first, sigma, middle)
    second = transfer.slope(halfway, middle, predict(halfway, middle, rows))
    halfway = transfer.move(x, second, sigma, middle)
    third = transfer.slope(halfway, middle, predict(halfway, middle, rows))
    there = transfer.move(x, third, sigma, sigma_next)
    fourth = transfer.slope(there, sigma_next, predict(there, sigma_next, rows))
    return (first + 2 * second + 2 * third + fourth) / 6


def _linear_multistep(transfer: Transfer, time: VPTime) -> Step:
    def step(predict: Predictor, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: State) -> tuple[Tensor, State]:
        """(55 e - 59 e' + 37 e'' - 9 e''') / 24; RK4 in each row's first three steps."""
        slope = transfer.slope(x, sigma, predict(x, sigma))
        count = state.get("count", torch.zeros(len(x), dtype=torch.long, device=x.device))
        past = state.get("past", x.new_zeros(len(x), 3, *x.shape[1:]))
        mixed = mix_slopes(slope, past, count, 4)
        warm = (count < _WARM_UP).nonzero().squeeze(1)
        if len(warm):
            middle = time.between(sigma[warm], sigma_next[warm]).to(sigma)
            mixed[warm] = _runge_kutta_slope(
                transfer, middle, predict, warm, x[warm], sigma[warm], sigma_next[warm], slope[warm]
            )
        return transfer.move(x, mixed, sigma, sigma_next), update_history(slope, past, count)

    return step


def fourth_order_solver(name: str, doc: str, transfer: Transfer, time: VPTime) -> Solver:
    """The solver that moves by `transfer`, in the time of a schedule."""

    def check(sigmas: Tensor) -> None:
        time.check(sigmas, name)
        check_warm_up(sigmas, name, _WARM_UP)

    return make_solver(_linear_multistep(transfer, time), name, doc, once=False, check=check)
