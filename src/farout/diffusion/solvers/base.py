"""The base class of the solvers: `solver(denoiser, x, sigmas, condition, callback, guide) -> x`.

A solver integrates the probability flow ODE dx / dsigma = eps(x, sigma), where x = x0 + sigma eps (Song et al. 2021,
"Score-based generative modeling through stochastic differential equations"; Karras et al. 2022, eq. 1), from one noise
level to another.

`sigmas` has shape (B, steps + 1): every row of a batch has its own path, so that images at different noise levels share
one batch. Sigma falls along a path (denoising) or rises (inversion). Shorter paths are padded by repeating their last
sigma (`noise_levels.pad_paths`). A row whose sigma does not change in a step is neither evaluated nor changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import Denoiser, expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.vp_time import VPTime

__all__ = [
    "BranchSkippingGuide",
    "Callback",
    "Evaluation",
    "Guide",
    "RowDenoiser",
    "RowState",
    "Solver",
    "VPSolver",
    "check_warm_up",
]

RowState = dict[str, Tensor]
"""Named tensors with one entry per row of a batch, which a solver or a guide keeps from one step to the next."""


@dataclass(frozen=True)
class Evaluation:
    """The argument of a callback: the first evaluation of the denoiser in a step.

    index: number of the step; rows: indices of the rows that change in this step, (R,); x: their noisy values before
    the step, (R, ...); sigma: (R,); x0: the denoiser's estimate of the clean values, (R, ...).
    """

    index: int
    rows: Tensor
    x: Tensor
    sigma: Tensor
    x0: Tensor


Callback = Callable[[Evaluation], None]
Guide = Callable[[Mapping[str, Tensor], Tensor, RowState], tuple[Tensor, RowState]]
"""Guidance with a state per row: (x0 of each named branch, sigma (R,), state) -> (guided x0, new state)."""


@runtime_checkable
class BranchSkippingGuide(Protocol):
    """A guide that does not need every branch for every row in every step."""

    def initial_state(self, sigmas: Tensor) -> RowState:
        """The state of the rows before the first step, from their paths (B, steps + 1)."""

    def required_branches(self, state: RowState) -> Mapping[str, Tensor]:
        """Name of a branch -> which rows require it in the next evaluation, bool (R,).

        A branch without an entry is evaluated for all rows. The first branch is always evaluated; its x0 is used for
        rows in which another branch is skipped.
        """

    def __call__(self, predictions: Mapping[str, Tensor], sigma: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """See `Guide`."""


class RowDenoiser:
    """The denoiser as a solver's step sees it: evaluates the rows that change, under their conditions and guide."""

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition | Mapping[str, Condition] | None,
        callback: Callback | None,
        guide: Guide | None,
        sigmas: Tensor,
    ) -> None:
        self._denoiser, self._condition, self._callback, self._guide = denoiser, condition, callback, guide
        self._count = len(sigmas)
        self._guide_state = guide.initial_state(sigmas) if isinstance(guide, BranchSkippingGuide) else {}

    def start_step(self, index: int, rows: Tensor) -> None:
        """Sets the number of the step, and which rows of the batch change in it, (R,)."""
        self._index, self._rows, self._is_first = index, rows, True

    def __call__(self, x: Tensor, sigma: Tensor, subset: Tensor | None = None) -> Tensor:
        """x0 (R, ...) at x (R, ...) and sigma (R, 1, ...).

        Args:
            x: noisy values of the rows that change, or of some of them.
            sigma: their noise levels.
            subset: which of the rows that change these are; None: all.
        """
        rows = self._rows if subset is None else self._rows[subset]
        sigma = sigma.flatten()
        if self._guide is not None:
            x0 = self._guided(self._guide, x, sigma, rows)
        elif isinstance(self._condition, Mapping):
            raise FaroutError("named branches of a condition require a guide that joins their predictions")
        else:
            x0 = self._denoiser(x, sigma, None if self._condition is None else self._condition.rows(rows))
        if self._is_first and self._callback is not None:
            self._callback(Evaluation(self._index, rows, x, sigma, x0))
        self._is_first = False
        return x0

    def _guided(self, guide: Guide, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Evaluates the branches of all conditions in one call of the denoiser and joins them by the guide."""
        if not isinstance(self._condition, Mapping) or not self._condition:
            raise FaroutError("a guide requires a mapping of named conditions, one per branch")
        state = {name: values[rows] for name, values in self._guide_state.items()}
        required = guide.required_branches(state) if isinstance(guide, BranchSkippingGuide) else {}
        every = torch.arange(len(x), device=x.device)
        indices = [required[name].nonzero().squeeze(1) if name in required else every for name in self._condition]
        indices[0] = every
        joined = Condition.join([part.rows(rows[index]) for part, index in zip(self._condition.values(), indices)])
        together = torch.cat(indices)
        x0_together = self._denoiser(x[together], sigma[together], joined)
        first, *others = torch.split(x0_together, [len(index) for index in indices])
        branches = [first, *(first.index_copy(0, index, x0) for index, x0 in zip(indices[1:], others, strict=True))]
        x0, state = guide(dict(zip(self._condition, branches, strict=True)), sigma, state)
        _update_rows(self._guide_state, rows, state, self._count)
        return x0


def _update_rows(state: RowState, rows: Tensor, new: RowState, count: int) -> None:
    """Writes the entries of some rows into a state of `count` rows; the other rows of a new name are zero."""
    for name, values in new.items():
        if name not in state:
            state[name] = values.new_zeros(count, *values.shape[1:])
        state[name][rows] = values


class Solver(ABC):
    """Moves noisy values along paths of noise levels. Subclasses implement `step`.

    Attributes:
        name: the method's name in errors.
        evaluates_once: whether each step evaluates the denoiser once, as a stateful guide requires.
    """

    name: str
    evaluates_once: ClassVar[bool] = True

    @abstractmethod
    def step(self, model: RowDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: RowState) -> Tensor:
        """One step of the rows that change: x (R, ...) at sigma (R, 1, ...) -> x at sigma_next (R, 1, ...).

        Args:
            model: (x, sigma, subset=None) -> x0.
            x: noisy values of the rows.
            sigma: noise levels of x, shaped so that they multiply x.
            sigma_next: noise levels after the step, of the same shape.
            state: what the method keeps of earlier steps of these rows; empty before the first step of a batch, zero
                for a row that has not changed before. Entries that the step assigns are kept.
        """

    def check(self, sigmas: Tensor, *, guided: bool = False) -> None:
        """Raises FaroutError for paths (B, steps + 1) that the method cannot follow, without evaluating anything.

        Args:
            sigmas: the paths.
            guided: whether a stateful guide is used.
        """
        if guided and not self.evaluates_once:
            raise FaroutError(
                f"{self.name} evaluates the network more than once per step, so it cannot be used with a stateful "
                "guide; use ddim"
            )
        if sigmas.ndim != 2 or sigmas.shape[1] < 2:
            raise FaroutError(f"sigmas must have shape (B, steps + 1), got {tuple(sigmas.shape)}")
        sigmas = sigmas.detach().cpu().double()
        changes = sigmas[:, 1:] != sigmas[:, :-1]
        if bool((changes & ~(sigmas[:, :-1] > 0)).any()):
            raise FaroutError(
                "a path starts at sigma 0 (or below), where no network can be evaluated; start rising paths at the "
                "schedule's smallest sigma"
            )
        self.check_path(sigmas)

    def check_path(self, sigmas: Tensor) -> None:
        """Raises FaroutError for paths, float64 on the CPU, that this method in particular cannot follow."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        condition: Condition | Mapping[str, Condition] | None = None,
        callback: Callback | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Moves each row of x to the end of its path.

        Args:
            denoiser: (x, sigma, condition) -> x0.
            x: noisy values (B, ...) at the first sigma of each path.
            sigmas: paths (B, steps + 1).
            condition: of the rows; with a guide, a mapping of named conditions, one per branch.
            callback: called at the first evaluation of each step.
            guide: joins the branches' predictions.

        Returns x (B, ...) at the last sigma of each path. Raises FaroutError for paths that the method cannot follow.
        """
        if len(sigmas) != len(x):
            raise FaroutError(f"sigmas must have shape (B, steps + 1) with B = {len(x)}, got {tuple(sigmas.shape)}")
        self.check(sigmas, guided=guide is not None)
        sigmas = sigmas.to(device=x.device, dtype=torch.float32)
        model = RowDenoiser(denoiser, condition, callback, guide, sigmas)
        state: RowState = {}
        x = x.clone()
        for index in range(sigmas.shape[1] - 1):
            rows = (sigmas[:, index] != sigmas[:, index + 1]).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            sigma, sigma_next = (expand_dims(sigmas[rows, column], x) for column in (index, index + 1))
            rows_state = {name: values[rows] for name, values in state.items()}
            model.start_step(index, rows)
            x[rows] = self.step(model, x[rows], sigma, sigma_next, rows_state)
            _update_rows(state, rows, rows_state, len(x))
        return x


class VPSolver(Solver):
    """A solver in the time t of a variance-preserving process, whose paths stay within the schedule.

    Args:
        schedule: the schedule of the network.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.time = VPTime(schedule)

    def check_path(self, sigmas: Tensor) -> None:
        """Raises FaroutError for a sigma outside the schedule."""
        self.time.check(sigmas, self.name)


def check_warm_up(sigmas: Tensor, name: str, steps: int) -> None:
    """Raises FaroutError for a path of sigmas (B, steps + 1) with fewer than `steps` steps that end above sigma 0.

    The warm-up of a multistep method evaluates the denoiser at the end of these steps. Rows whose sigma never changes
    need no warm-up.
    """
    changes = sigmas[:, 1:] != sigmas[:, :-1]
    too_short = changes.any(1) & ((changes & (sigmas[:, 1:] > 0)).sum(1) < steps)
    if bool(too_short.any()):
        length = int(changes[int(too_short.nonzero()[0])].sum())
        raise FaroutError(
            f"{name} warms up over {steps} step{'s' * (steps > 1)} that end above sigma 0, so a path of "
            f"{length} step{'s' * (length > 1)} is too short: take at least {steps + 1} steps down to 0 "
            f"({steps} elsewhere), or ddim or dpm_solver_2m"
        )
