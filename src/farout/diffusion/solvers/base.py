"""The loop under every solver: `solver(denoiser, x, sigmas, condition, callback, guide) -> x`.

`sigmas` is (B, steps + 1): every row follows its own path, so starts at many levels and repeats share one batch. Paths
rise (inversion) or fall; shorter ones are padded at the end by repeating their last sigma (`paths.pad`). A row whose
sigma does not change is neither moved, evaluated nor entered into a history: finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import Denoiser, expand_dims

__all__ = [
    "Callback",
    "Evaluation",
    "Guide",
    "Predictor",
    "Solver",
    "SparingGuide",
    "State",
    "Step",
    "check_warm_up",
    "make_solver",
    "predict_eps",
]

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


@runtime_checkable
class SparingGuide(Protocol):
    """A guide that is told how its rows will go, and does without branches where they cannot matter."""

    def begin(self, sigmas: Tensor) -> State:
        """The rows' state before the first step, from their paths (B, steps + 1)."""

    def wanted(self, state: State) -> Mapping[str, Tensor]:
        """By name of a branch, whether each row (R,) wants it now; one that is not named is wanted by all.

        The first branch is evaluated in every row, and its x0 stands for those that are not wanted.
        """

    def __call__(self, predictions: Mapping[str, Tensor], sigma: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Guide`."""


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
        """x0 (R, …) of the rows `active` (R,) of the batch, guided where there is a guide."""
        if self.guide is None:
            if isinstance(self.condition, Mapping):
                raise FaroutError("named branches of a condition require a guide that joins their predictions")
            return self.denoiser(x, sigma, None if self.condition is None else self.condition.rows(active))
        state = self.guided.take(active)
        wanted = self.guide.wanted(state) if isinstance(self.guide, SparingGuide) else {}
        x0, state = self.guide(self._branches(x, sigma, active, wanted), sigma, state)
        self.guided.put(state, active)
        return x0

    def _branches(self, x: Tensor, sigma: Tensor, active: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """x0 of every branch, all in one call of the denoiser."""
        if not isinstance(self.condition, Mapping) or not self.condition:
            raise FaroutError("a guide requires a mapping of named conditions, one per branch")
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rows = [wanted.get(name, every).nonzero().squeeze(1) for name in self.condition]
        rows[0] = every.nonzero().squeeze(1)
        joined = Condition.join([each.rows(active[some]) for each, some in zip(self.condition.values(), rows)])
        together = torch.cat(rows)
        first, *others = self.denoiser(x[together], sigma[together], joined).split([len(some) for some in rows])
        answers = [first, *(first.index_copy(0, some, x0) for some, x0 in zip(rows[1:], others, strict=True))]
        return dict(zip(self.condition, answers, strict=True))


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


def predict_eps(predict: Predictor, x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
    """eps = (x - x0) / sigma, the slope dx/dsigma of the probability flow."""
    return (x - predict(x, sigma, rows)) / expand_dims(sigma, x)


def make_solver(
    step: Step, name: str, doc: str, *, once: bool, check: Callable[[Tensor], None] | None = None
) -> Solver:
    """The solver whose single step is `step`.

    Args:
        step: moves rows from one sigma to the next.
        name: what errors call it.
        doc: its docstring.
        once: it evaluates once a step, so that a guide can go with it.
        check: raises FaroutError for paths (B, steps + 1), float64 on the CPU, that the method cannot follow; called
            before anything is evaluated.
    """

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
            raise FaroutError(f"sigmas must have shape (B, steps + 1) with B = {len(x)}, got {tuple(sigmas.shape)}")
        table = sigmas.detach().cpu().double()
        _check_departures(table)
        if check is not None:
            check(table)
        run = _Run(denoiser, condition, callback, guide, _Memory(len(x)))
        if isinstance(guide, SparingGuide):
            run.guided.put(guide.begin(sigmas.to(x.device)), torch.arange(len(x), device=x.device))
        return _integrate(step, run, x, sigmas.to(device=x.device, dtype=torch.float32))

    solve.__name__, solve.__doc__ = name, doc
    return solve


def _moves(sigmas: Tensor) -> Tensor:
    return sigmas[:, 1:] != sigmas[:, :-1]


def _check_departures(sigmas: Tensor) -> None:
    if bool((_moves(sigmas) & ~(sigmas[:, :-1] > 0)).any()):
        raise FaroutError(
            "a path leaves sigma 0 (or below), where no network can be evaluated; let rising paths start at the "
            "schedule's "
            "smallest sigma"
        )


def check_warm_up(sigmas: Tensor, name: str, steps: int) -> None:
    """Raises FaroutError where a row of sigmas (B, steps + 1) moves, but ends in sigma 0 or stops within the first
    `steps` of its steps, whose ends a warm-up evaluates. Rows that stand still want none.
    """
    moves = _moves(sigmas)
    short = moves.any(1) & ((moves & (sigmas[:, 1:] > 0)).sum(1) < steps)
    if bool(short.any()):
        steps_there = int(moves[int(short.nonzero()[0])].sum())
        raise FaroutError(
            f"{name} warms up over {steps} step{'s' * (steps > 1)} that end above sigma 0, so a path of "
            f"{steps_there} step{'s' * (steps_there > 1)} is too short: take at least {steps + 1} steps down to 0 "
            f"({steps} elsewhere), or ddim or dpm_solver_2m"
        )


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
