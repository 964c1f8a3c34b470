"""Which levels are started from and along which paths they are denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from farout.detectors.settings import checked_levels
from farout.diffusion import noise_levels
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.plms import PLMS
from farout.diffusion.solvers.registry import create_solver

__all__ = ["Plan", "make_plan", "paper_grid"]

FAST_LEVELS = (10, 170, 330, 490)
# chosen on dev sources: docs/results.md, section 1
ONESHOT_LEVELS = (20, 80, 200, 400)
_SPACING = 10


@dataclass(frozen=True)
class Plan:
    """levels: the starts t; paths: (levels, steps + 1) sigmas; solver; final_scale: factor on the solver's result
    before decoding (1, or sqrt(abar_0) where the paper decodes the variance-preserving sample).
    """

    levels: tuple[int, ...]
    paths: Tensor
    solver: Solver
    final_scale: float


def paper_grid(skip: int, grid: Literal["paper", "released"] = "paper") -> tuple[int, ...]:
    """Start labels of the paper's grid of 100: every `skip`-th of 1, 11, …, 991; `released`: of 10, 20, …, 990.

    The released code drops label 0 and starts at index 1.
    """
    if grid == "paper":
        return tuple(range(1, 1000, _SPACING))[::skip]
    return tuple(range(0, 1000, _SPACING))[1::skip]


def make_plan(
    schedule: NoiseSchedule,
    *,
    mode: str,
    levels: tuple[int, ...] | None,
    skip: int,
    grid: Literal["paper", "released"],
    steps: int,
    solver: str,
) -> Plan:
    """The plan of a mode, see `Reconstruction`; raises FaroutError for levels outside the schedule, or repeated."""
    wanted = _default_levels(mode, skip, grid) if levels is None else levels
    chosen = checked_levels(wanted, schedule.steps, lowest=1 if mode == "exact" else 0)
    if mode == "exact":
        table = noise_levels.pad_paths([noise_levels.grid_path(schedule, t, _SPACING) for t in chosen])
        return Plan(chosen, table, PLMS(), float(schedule.abar[0].sqrt()))
    counts = [1 if mode == "oneshot" else min(steps, max(1, t // 40)) for t in chosen]
    table = noise_levels.pad_paths(
        [noise_levels.geometric_path(schedule, t, count) for t, count in zip(chosen, counts, strict=True)]
    )
    return Plan(chosen, table, create_solver("ddim" if mode == "oneshot" else solver, schedule), 1.0)


def _default_levels(mode: str, skip: int, grid: Literal["paper", "released"]) -> tuple[int, ...]:
    return {"exact": paper_grid(skip, grid), "fast": FAST_LEVELS, "oneshot": ONESHOT_LEVELS}[mode]
