"""New images from noise: every image from its own seed, whatever batch it is made in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from farout.core.chunking import BatchSize, check_batch_size
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition, missing_null_condition
from farout.diffusion.denoiser import Denoiser, GuidedDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import image_noise
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.registry import create_solver, is_adaptive, solver_path

__all__ = ["STEPS", "Sampler", "Spacing", "parse_class_labels", "sample"]

STEPS = 20
"""Steps of methods that do not find their own, where none are asked for."""
Spacing = Literal["grid", "geometric", "leading"]
"""Where a path's levels lie: evenly spaced in t down from the largest, in log sigma, or in t up from 1."""


def parse_class_labels(model: DiffusionModel, wanted: Sequence[str]) -> tuple[int, ...]:
    """Labels of classes by name or number; `a,b` is a and b, `all` (or nothing) every class of the model's table.

    Raises FaroutError for a class outside the table, one that is named twice, and an unconditional model.
    """
    if model.conditioning is None:
        raise FaroutError(f"this diffusion model is unconditional and knows no classes, got {', '.join(wanted)}")
    names = list(model.conditioning.class_names)
    words = [part for text in wanted for part in ([text] if text in names else text.split(","))]
    if not words or (words == ["all"] and "all" not in names):
        return tuple(range(len(names)))
    chosen = tuple(_label(names, word.strip()) for word in words)
    if len(set(chosen)) < len(chosen):
        raise FaroutError(f"a class is named twice in {', '.join(words)}")
    return chosen


def _label(names: Sequence[str], word: str) -> int:
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise FaroutError(
        f"there is no class {word!r}; the model knows {', '.join(names)} (or 0 to {len(names) - 1}, or all)"
    )


@dataclass(frozen=True)
class Sampler:
    """How images are made from noise.

    Args:
        model: the diffusion model; images are made where it is.
        solver: a name of `farout.diffusion.solvers.registry.SOLVERS`.
        steps: steps from the largest noise level to none; None: 20, or the method's own.
        spacing: of the levels on the path: `grid` (evenly in t; of 1000 in 50 steps 999, 979, …, 19), `geometric`
            (evenly in log sigma) or `leading` (evenly in t from 1 up: 981, …, 21, 1; Stable Diffusion's own).
        guidance: scale s of null + s (conditional - null); 1 is conditional; the paper's omega is s - 1.
        seed: image i is made from (seed, i) alone.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: of the network.
        clamp: keep every estimate of the clean image within what images can be, where the model works on pixels.

    Raises:
        FaroutError: for a solver that is unknown or wants more steps, and for guidance without classes or without a
            null condition.
    """

    model: DiffusionModel
    solver: str = "dpm_solver_2m"
    steps: int | None = None
    spacing: Spacing = "grid"
    guidance: float = 1.0
    seed: int = 0
    batch_size: BatchSize = "auto"
    precision: Precision = "fp32"
    clamp: bool = True

    def __post_init__(self) -> None:
        conditioning = self.model.conditioning
        check_batch_size(self.batch_size)
        if self.spacing not in get_args(Spacing):
            raise FaroutError(f"spacing is {self.spacing!r}; expected one of {', '.join(get_args(Spacing))}")
        if self.guidance != 1 and conditioning is None:
            raise FaroutError(
                f"guidance {self.guidance:g} requires a class-conditional model; this one is unconditional"
            )
        if self.guidance != 1 and conditioning is not None and not conditioning.has_null:
            raise missing_null_condition()
        if is_adaptive(self.solver) and self.steps is not None:
            raise FaroutError(f"{self.solver} chooses its own steps; leave out steps={self.steps}")
        self._solve.check(self.path[None])

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images, in addition to model, labels, seed and precision."""
        return {
            "solver": self.solver,
            "steps": None if is_adaptive(self.solver) else self._steps,
            "spacing": self.spacing,
            "guidance": self.guidance,
            "clamp": self.clamp,
        }

    @property
    def _steps(self) -> int:
        return STEPS if self.steps is None else self.steps

    @cached_property
    def _solve(self) -> Solver:
        return create_solver(self.solver, self.model.schedule)

    @cached_property
    def path(self) -> Tensor:
        """sigmas from the schedule's largest to 0, as the solver takes them; see `noise_levels`."""
        schedule, steps = self.model.schedule, self._steps
        if self.spacing != "geometric":
            falling = noise_levels.even_path if self.spacing == "grid" else noise_levels.leading_path
            return solver_path(self.solver, falling(schedule, steps))
        if steps < 1:
            raise FaroutError(f"steps must be 1 or more, got {steps}")
        return solver_path(self.solver, noise_levels.geometric_path(schedule, schedule.steps - 1, steps))

    @property
    def images_per_batch(self) -> int:
        """The number of images to sample together."""
        return Runtime(str(self.model.device), batch_size=self.batch_size).images_per_batch(self.model.shape)

    def condition(self, labels: Sequence[int] | None) -> Condition | None:
        """The condition of the labels; raises FaroutError where they and the model do not go together."""
        conditioning = self.model.conditioning
        if conditioning is None:
            if labels is not None:
                raise FaroutError("this diffusion model is unconditional and cannot generate images of given labels")
            return None
        if labels is None:
            raise FaroutError(f"this model requires a label per image, 0 to {conditioning.num_classes - 1}")
        return conditioning(torch.tensor(list(labels), dtype=torch.int64, device=self.model.device))

    def images(self, indices: Sequence[int], labels: Sequence[int] | None = None) -> Tensor:
        """Images number `indices`: (B, C, H, W) float32 in [0, 1], on the CPU; a label each for a conditional model.

        Raises FaroutError for labels that do not go with the model.
        """
        return self.sample_with_condition(self.condition(labels), indices)

    @torch.no_grad()
    def sample_with_condition(self, condition: Condition | None, indices: Sequence[int]) -> Tensor:
        """Images number `indices` under any condition of the model, a row each; see `images`."""
        model = self.model
        keys = [str(index) for index in indices]
        noise = image_noise(keys, model.shape, self.seed, model.schedule.steps - 1, 0).to(model.device)
        sigmas = self.path.to(model.device).repeat(len(keys), 1)
        # at the first level a variance-preserving sample is the noise itself: x = x_vp / sqrt(abar)
        x = noise * expand_dims((1 + sigmas[:, 0] ** 2).sqrt(), noise)
        return model.decode(self._solve(self._denoiser(), x, sigmas, condition)).cpu()

    def _denoiser(self) -> Denoiser:
        denoiser: Denoiser = self.model.denoiser(self.batch_size, self.precision)
        if self.guidance != 1 and self.model.conditioning is not None:
            denoiser = GuidedDenoiser(denoiser, self.guidance, self.model.conditioning.null_condition)
        return self.model.clamp_x0(denoiser) if self.clamp else denoiser


def sample(
    model: DiffusionModel,
    count: int | None = None,
    *,
    labels: Sequence[int] | None = None,
    solver: str = "dpm_solver_2m",
    steps: int | None = None,
    spacing: Spacing = "grid",
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    precision: Precision = "fp32",
    clamp: bool = True,
) -> Iterator[Tensor]:
    """Makes images from noise: an iterator of (B, C, H, W) float32 in [0, 1], `batch_size` at a time.

    Image i depends on (seed, i) and its label alone: a longer run begins with the images of a shorter one.

    Args:
        model: the diffusion model.
        count: number of images; those of a conditional model take its classes in turn.
        labels: instead of a count, the label of each image (conditional models).
        solver: see `Sampler`.
        steps: see `Sampler`.
        spacing: see `Sampler`.
        guidance: see `Sampler`.
        seed: see `Sampler`.
        precision: see `Sampler`.
        clamp: see `Sampler`.
        batch_size: the most images sampled together, and rows of one network call; `auto`: by memory.

    Raises:
        FaroutError: at the call, for settings, counts and labels that do not go together.
    """
    sampler = Sampler(model, solver, steps, spacing, guidance, seed, batch_size, precision, clamp)
    if (count is None) == (labels is None) or (count is not None and count < 1):
        raise FaroutError(f"give either a count of at least 1 or labels; got {count} and {labels}")
    if labels is None and model.conditioning is not None:
        labels = [index % model.conditioning.num_classes for index in range(count or 0)]
    sampler.condition(labels)
    total = len(labels) if labels is not None else count or 0

    def batches() -> Iterator[Tensor]:
        size = sampler.images_per_batch
        for start in range(0, total, size):
            indices = range(start, min(start + size, total))
            yield sampler.images(indices, None if labels is None else [labels[index] for index in indices])

    return batches()
