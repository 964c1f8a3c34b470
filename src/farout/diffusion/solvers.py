"""Solvers: pure functions from noisy to clean, `solver(denoiser, x, sigmas, condition, callback, guide) -> x`.

`sigmas` is (B, steps + 1): every row follows its own path, so starts at many levels and repeats share one batch. Paths
rise (inversion) or fall; shorter ones are padded at the end by repeating their last sigma (`paths.pad`). A row whose
sigma does not change is neither moved, evaluated nor entered into a history: finished rows leave the batch.

All rules are written for `x = x0 + sigma eps`, where the probability-flow equation reads dx/dsigma = eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farout.diffusion.conditioning import Condition
from farout.diffusion.denoiser import Denoiser, spread
from farout.errors import FaroutError

__all__ = ["SOLVERS", "Evaluation", "Guide", "Solver", "adams_bashforth", "ddim", "dpm_solver_2m", "heun", "plms"]

State = dict[str, Tensor]
"""What a method remembers, each tensor with one entry per row."""


@dataclass(frozen=True)
class Evaluation:
    """What a callback is given at the first evaluation of each step.

    index: the step's number; rows: which rows of the batch moved, (R,); x: their noisy values before the step, (R, …);
    sigma: (R,); x0: their expected clean values, (R, …).
    """

    index: int
    rows: Tensor
    x: Tensor
    sigma: Tensor
    x0: Tensor


Callback = Callable[[Evaluation], None]
Guide = Callable[[Mapping[str, Tensor], Tensor, State], tuple[Tensor, State]]
"""Stateful guidance: (x0 of each named branch, sigma (R,), state) -> (x0, state)."""


class Solver(Protocol):
    """The signature that all solvers share."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        condition: Condition | Mapping[str, Condition] | None = None,
        callback: Callback | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Moves each row of x (B, …) along its path in sigmas (B, steps + 1); returns the rows at the paths' ends."""


class _Memory:
    """Row-wise state: one tensor per name, one entry per row of the whole batch; new names start at zero."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tensors: State = {}

    def take(self, rows: Tensor) -> State:
        return {name: tensor[rows] for name, tensor in self.tensors.items()}

    def put(self, new: State, rows: Tensor) -> None:
        for name, tensor in new.items():
            whole = self.tensors.setdefault(name, tensor.new_zeros(self.count, *tensor.shape[1:]))
            whole[rows] = tensor


@dataclass
class _Run:
    """One call of a solver: the denoiser with all that goes with its rows."""

    denoiser: Denoiser
    condition: Condition | Mapping[str, Condition] | None
    callback: Callback | None
    guide: Guide | None
    guided: _Memory

    def evaluate(self, x: Tensor, sigma: Tensor, active: Tensor) -> Tensor:
        if self.guide is None:
            if isinstance(self.condition, Mapping):
                raise FaroutError("named branches of a condition want a guide that joins their predictions")
            return self.denoiser(x, sigma, None if self.condition is None else self.condition.rows(active))
        x0, state = self.guide(self._branches(x, sigma, active), sigma, self.guided.take(active))
        self.guided.put(state, active)
        return x0

    def _branches(self, x: Tensor, sigma: Tensor, active: Tensor) -> dict[str, Tensor]:
        if not isinstance(self.condition, Mapping) or not self.condition:
            raise FaroutError("a guide wants a mapping of named conditions, one per branch")
        joined = Condition.join([branch.rows(active) for branch in self.condition.values()])
        count = len(self.condition)
        x0 = self.denoiser(torch.cat([x] * count), torch.cat([sigma] * count), joined)
        return dict(zip(self.condition, x0.chunk(count), strict=True))


class _Predict:
    """x0 at (x, sigma) of the rows that move in one step, or of some of them; the first call is reported."""

    def __init__(self, run: _Run, index: int, active: Tensor) -> None:
        self.run, self.index, self.active, self.calls = run, index, active, 0

    def __call__(self, x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
        active = self.active if rows is None else self.active[rows]
        x0 = self.run.evaluate(x, sigma, active)
        if self.calls == 0 and self.run.callback is not None:
            self.run.callback(Evaluation(self.index, active, x, sigma, x0))
        self.calls += 1
        return x0


Predictor = Callable[..., Tensor]
"""(x, sigma, rows=None) -> x0 of the rows that move, or of some of them."""
Step = Callable[[Predictor, Tensor, Tensor, Tensor, State], tuple[Tensor, State]]
"""(predict, x, sigma, sigma_next, state) -> (x, state), for the rows that move."""


def _solver(step: Step, name: str, doc: str, *, once: bool) -> Solver:
    """The solver whose single step is `step`; `once`: it evaluates once a step, so that a guide can go with it."""

    def solve(
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        condition: Condition | Mapping[str, Condition] | None = None,
        callback: Callback | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Checks the arguments and integrates; the text that users see is set below."""
        if guide is not None and not once:
            raise FaroutError(f"{name} evaluates more than once a step, a stateful guide cannot go with it; use ddim")
        if sigmas.ndim != 2 or len(sigmas) != len(x) or sigmas.shape[1] < 2:
            raise FaroutError(f"sigmas want shape (B, steps + 1) with B = {len(x)}, got {tuple(sigmas.shape)}")
        run = _Run(denoiser, condition, callback, guide, _Memory(len(x)))
        return _integrate(step, run, x, sigmas.to(device=x.device, dtype=torch.float32))

    solve.__name__, solve.__doc__ = name, doc
    return solve


def _integrate(step: Step, run: _Run, x: Tensor, sigmas: Tensor) -> Tensor:
    """The loop under every solver: it owns the rows' values and their state."""
    x, memory = x.clone(), _Memory(len(x))
    for index in range(sigmas.shape[1] - 1):
        now, then = sigmas[:, index], sigmas[:, index + 1]
        active = (now != then).nonzero().squeeze(1)
        if len(active):
            predict = _Predict(run, index, active)
            moved, state = step(predict, x[active], now[active], then[active], memory.take(active))
            x[active] = moved
            memory.put(state, active)
    return x


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


def _multistep(order: int, *, heun_first: bool) -> Step:
    def step(predict: Predictor, x: Tensor, sigma: Tensor, then: Tensor, state: State) -> tuple[Tensor, State]:
        """Mixes eps with its past, row by row; `count` says how much of it a row has."""
        eps = _eps(predict, x, sigma)
        count = state.get("count", torch.zeros(len(x), dtype=torch.long, device=x.device))
        past = state.get("past", x.new_zeros(len(x), 3, *x.shape[1:]))
        history = torch.cat([eps[:, None], past], dim=1)
        weights = _ADAMS_BASHFORTH.to(x.device)[count.clamp(max=order - 1)]
        mixed = (history * weights.reshape(*weights.shape, *[1] * (x.ndim - 1))).sum(1)
        first = (count == 0).nonzero().squeeze(1)
        if heun_first and len(first):
            mixed[first] = _heun_mean(_of(predict, first), x[first], sigma[first], then[first], eps[first])
        return x + spread(then - sigma, x) * mixed, {"past": history[:, :3], "count": count + 1}

    return step


ddim = _solver(
    _ddim_step,
    "ddim",
    "DDIM with eta = 0 (Song et al. 2021, eq. 12): x' = x + (sigma' - sigma) eps. One evaluation a step.",
    once=True,
)
heun = _solver(
    _heun_step,
    "heun",
    "Heun's second-order rule (Karras et al. 2022, algorithm 1): two evaluations a step, one where it ends at sigma 0.",
    once=False,
)
dpm_solver_2m = _solver(
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
    return _solver(_multistep(order, heun_first=False), f"adams_bashforth_{order}", "Adams-Bashforth.", once=True)


plms = _solver(
    _multistep(4, heun_first=True),
    "plms",
    "PLMS: Adams-Bashforth of order 4 whose first step is a Heun step (one evaluation more), history per row.",
    once=False,
)

SOLVERS: dict[str, Solver] = {"ddim": ddim, "heun": heun, "dpm_solver_2m": dpm_solver_2m, "plms": plms}
"""Solvers that need nothing but a path, by name."""
