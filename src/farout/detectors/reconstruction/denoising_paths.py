"""The noise levels from which images are reconstructed, and the paths of sigmas along which they are denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from farout.detectors.argument_checks import sort_levels
from farout.diffusion import noise_levels
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.plms import PLMS
from farout.diffusion.solvers.registry import create_solver

__all__ = ["DenoisingPaths", "build_denoising_paths", "paper_levels"]

FAST_LEVELS = (10, 170, 330, 490)
# chosen on dev sources: docs/results.md, section 1
ONESHOT_LEVELS = (20, 80, 200, 400)
_SPACING = 10


@dataclass(frozen=True)
class DenoisingPaths:
    """How images are denoised from several noise levels.

    Attributes:
        levels: the start levels t.
        sigmas: (levels, steps + 1), the path of each start level.
        solver: the solver that follows the paths.
        final_scale: factor on the solver's result before decoding: 1, or sqrt(abar_0) where the paper decodes the
            variance-preserving sample.
    """

    levels: tuple[int, ...]
    sigmas: Tensor
    solver: Solver
    final_scale: float


def paper_levels(skip: int, grid: Literal["paper", "released"] = "paper") -> tuple[int, ...]:
    """Every `skip`-th start level of the paper's grid of 100: 1, 11, …, 991; `released`: of 10, 20, …, 990.

    The released code drops level 0 and starts at index 1.
    """
    if grid == "paper":
        return tuple(range(1, 1000, _SPACING))[::skip]
    return tuple(range(0, 1000, _SPACING))[1::skip]


def build_denoising_paths(
    schedule: NoiseSchedule,
    *,
    mode: str,
    levels: tuple[int, ...] | None,
    skip: int,
    grid: Literal["paper", "released"],
    steps: int,
    solver: str,
) -> DenoisingPaths:
    """Build the paths of a mode, see `Reconstruction`; raises FaroutError for levels that the schedule lacks."""
    if mode == "exact":
        levels = sort_levels(paper_levels(skip, grid) if levels is None else levels, schedule.num_levels, lowest=1)
        paths = [noise_levels.strided_path(schedule, t, _SPACING) for t in levels]
        return DenoisingPaths(levels, noise_levels.pad_paths(paths), PLMS(), float(schedule.abar[0].sqrt()))
    if mode == "oneshot":
        levels = sort_levels(ONESHOT_LEVELS if levels is None else levels, schedule.num_levels)
        paths = [noise_levels.geometric_path(schedule, t, 1) for t in levels]
        return DenoisingPaths(levels, noise_levels.pad_paths(paths), create_solver("ddim", schedule), 1.0)
    levels = sort_levels(FAST_LEVELS if levels is None else levels, schedule.num_levels)
    paths = [noise_levels.geometric_path(schedule, t, min(steps, max(1, t // 40))) for t in levels]
    return DenoisingPaths(levels, noise_levels.pad_paths(paths), create_solver(solver, schedule), 1.0)
