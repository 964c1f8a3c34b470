"""Paths of noise levels for the solvers: tables of sigmas (B, steps + 1), one row per path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.schedule import NoiseSchedule

__all__ = [
    "even_levels",
    "even_path",
    "falling_path",
    "geometric_path",
    "leading_levels",
    "leading_path",
    "pad_paths",
    "strided_path",
]


def pad_paths(paths: Sequence[Tensor]) -> Tensor:
    """One table (B, steps + 1) from paths of any lengths, float32; shorter ones repeat their last sigma.

    The table has at least one step, in which a path of one sigma does not change.
    """
    longest = max(2, *(len(path) for path in paths))
    rows = [torch.cat([path, path[-1:].expand(longest - len(path))]) for path in paths]
    return torch.stack(rows).to(torch.float32)


def strided_path(schedule: NoiseSchedule, start: int, stride: int) -> Tensor:
    """sigmas of the levels start, start - stride, ... above 0, then of level 0: (steps + 1,)."""
    levels = [*range(start, 0, -stride), 0]
    return schedule.sigma_of(torch.tensor(levels)).to(torch.float32)


def geometric_path(schedule: NoiseSchedule, start: int | float, steps: int) -> Tensor:
    """`steps` sigmas, evenly spaced in log sigma from level `start` to the schedule's smallest (excluded), then 0.

    Returns (steps + 1,). One step is the one-shot estimate.
    """
    first = schedule.sigma_of(start).log()
    ramp = torch.arange(steps, dtype=torch.float64) / steps
    levels = (first + ramp * (schedule.sigma[0].log() - first)).exp()
    return torch.cat([levels, levels.new_zeros(1)]).to(torch.float32)


def falling_path(schedule: NoiseSchedule, levels: Sequence[int]) -> Tensor:
    """sigmas of ascending levels, the largest first, then 0: (levels + 1,)."""
    sigmas = schedule.sigma_of(torch.tensor(levels[::-1]))
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)


def even_levels(schedule: NoiseSchedule, steps: int, start: int | None = None) -> list[int]:
    """`steps` evenly spaced, ascending levels up to `start` (None: the largest level, T - 1).

    They are stride - 1, 2 stride - 1, ..., start with stride (start + 1) / steps, rounded; for 50 steps of 1000 levels
    19, 39, ..., 999.

    Raises FaroutError unless 1 <= steps <= start + 1.
    """
    count = schedule.num_levels if start is None else start + 1
    if not 1 <= steps <= count:
        raise FaroutError(f"steps must be 1 to {count}, the number of levels, got {steps}")
    return [round(count * (number + 1) / steps) - 1 for number in range(steps)]


def even_path(schedule: NoiseSchedule, steps: int, start: int | None = None) -> Tensor:
    """sigmas of the levels of `even_levels`, the largest first, then 0: (steps + 1,)."""
    return falling_path(schedule, even_levels(schedule, steps, start))


def leading_levels(schedule: NoiseSchedule, steps: int) -> list[int]:
    """`steps` evenly spaced, ascending levels: T u / steps + 1 for u = 0, 1, ...; from 0 for more than T / 2 steps.

    For 50 steps of 1000 levels 1, 21, ..., 981: the levels of Stable Diffusion ("leading" in diffusers).

    Raises FaroutError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= schedule.num_levels:
        raise FaroutError(f"steps must be 1 to {schedule.num_levels}, the number of levels, got {steps}")
    first = int(steps <= schedule.num_levels // 2)
    return [schedule.num_levels * number // steps + first for number in range(steps)]


def leading_path(schedule: NoiseSchedule, steps: int) -> Tensor:
    """sigmas of the levels of `leading_levels`, the largest first, then of level 0: (steps + 1,).

    This is the path of Stable Diffusion's own sampler. If level 0 is among the levels, it ends at sigma 0 instead.

    Raises FaroutError unless 1 <= steps <= T.
    """
    levels = leading_levels(schedule, steps)[::-1]
    sigmas = schedule.sigma_of(torch.tensor([*levels, 0]))
    return torch.cat([sigmas[:-1], sigmas[-1:] * (levels[-1] > 0)]).to(torch.float32)
