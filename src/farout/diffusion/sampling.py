"""Sampling of new images: each image has its own seed and does not depend on the batch."""

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

__all__ = ["DEFAULT_STEPS", "Sampler", "Spacing", "parse_class_labels", "sample"]

DEFAULT_STEPS = 20
"""Steps of solvers that are not adaptive."""
Spacing = Literal["even", "geometric", "leading"]
"""How the levels of a path are spaced: evenly in t down from the largest, in log sigma, or in t up from 1."""


def parse_class_labels(model: DiffusionModel, classes: Sequence[str]) -> tuple[int, ...]:
    """Labels of classes given by name or number; `a,b` is a and b, `all` (or nothing) every class of the model.

    Raises FaroutError for an unknown class, a class that is given twice, and an unconditional model.
    """
    if model.conditioning is None:
        raise FaroutError(f"this diffusion model is unconditional and has no classes, got {', '.join(classes)}")
    names = list(model.conditioning.class_names)
    words = [part.strip() for text in classes for part in ([text] if text in names else text.split(","))]
    if not words or (words == ["all"] and "all" not in names):
        return tuple(range(len(names)))
    labels = []
    for word in words:
        if word in names:
            labels.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            raise FaroutError(
                f"there is no class {word!r}; the model has {', '.join(names)} (or 0 to {len(names) - 1}, or all)"
            )
    if len(set(labels)) < len(labels):
        raise FaroutError(f"a class is given twice in {', '.join(words)}")
    return tuple(labels)


@dataclass(frozen=True)
class Sampler:
    """Samples images of a diffusion model.

    Args:
        model: the diffusion model; images are sampled on its device.
        solver: a name in `farout.diffusion.solvers.registry.SOLVERS`.
        steps: steps from the largest noise level to none; None: 20, or chosen by an adaptive solver.
        spacing: of the levels of the path: `even` (evenly in t; of 1000 in 50 steps 999, 979, ..., 19), `geometric`
            (evenly in log sigma) or `leading` (evenly in t from 1 up: 981, ..., 21, 1; as in Stable Diffusion).
        guidance: scale s of null + s (conditional - null); 1 is conditional; the paper's omega is s - 1.
        seed: image i depends only on (seed, i) and its class.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: precision of the network.
        clamp: clamp each estimate of x0 to the range of images, if the model works on pixels.

    Raises:
        FaroutError: for an unknown solver or one that requires more steps, and for guidance without classes or without
            a null condition.
    """

    model: DiffusionModel
    solver: str = "dpm_solver_2m"
    steps: int | None = None
    spacing: Spacing = "even"
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
        self._solver.check(self.path[None])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, in addition to model, labels, seed and precision."""
        return {
            "solver": self.solver,
            "steps": None if is_adaptive(self.solver) else self._steps,
            "spacing": self.spacing,
            "guidance": self.guidance,
            "clamp": self.clamp,
        }

    @property
    def _steps(self) -> int:
        return DEFAULT_STEPS if self.steps is None else self.steps

    @cached_property
    def _solver(self) -> Solver:
        return create_solver(self.solver, self.model.schedule)

    @cached_property
    def path(self) -> Tensor:
        """sigmas from the schedule's largest down, as the solver expects them; see `noise_levels`."""
        schedule = self.model.schedule
        if self.spacing == "even":
            return solver_path(self.solver, noise_levels.even_path(schedule, self._steps))
        if self.spacing == "leading":
            return solver_path(self.solver, noise_levels.leading_path(schedule, self._steps))
        if self._steps < 1:
            raise FaroutError(f"steps must be 1 or more, got {self._steps}")
        return solver_path(self.solver, noise_levels.geometric_path(schedule, schedule.num_levels - 1, self._steps))

    @property
    def images_per_batch(self) -> int:
        """The number of images to sample together."""
        return Runtime(str(self.model.device), batch_size=self.batch_size).images_per_batch(self.model.shape)

    def condition(self, labels: Sequence[int] | None) -> Condition | None:
        """The condition of labels; raises FaroutError for labels of an unconditional model, and for missing labels."""
        conditioning = self.model.conditioning
        if conditioning is None:
            if labels is not None:
                raise FaroutError("this diffusion model is unconditional and cannot generate images of given labels")
            return None
        if labels is None:
            raise FaroutError(f"this model requires a label per image, 0 to {conditioning.num_classes - 1}")
        return conditioning(torch.tensor(list(labels), dtype=torch.int64, device=self.model.device))

    def sample_images(self, indices: Sequence[int], labels: Sequence[int] | None = None) -> Tensor:
        """The images with these indices: (B, C, H, W) float32 in [0, 1], on the CPU.

        Args:
            indices: numbers of the images, which seed their noise.
            labels: class of each image, for a conditional model.

        Raises FaroutError where labels do not match the model.
        """
        return self.sample_with_condition(self.condition(labels), indices)

    @torch.no_grad()
    def sample_with_condition(self, condition: Condition | None, indices: Sequence[int]) -> Tensor:
        """The images with these indices under any condition of the model, one row each; see `sample_images`."""
        model = self.model
        keys = [str(index) for index in indices]
        noise = image_noise(keys, model.shape, self.seed, model.schedule.num_levels - 1, 0).to(model.device)
        sigmas = self.path.to(model.device).repeat(len(keys), 1)
        # at the first level a variance-preserving sample is the noise itself: x = x_vp / sqrt(abar)
        x = noise * expand_dims((1 + sigmas[:, 0] ** 2).sqrt(), noise)
        return model.decode(self._solver(self.denoiser(), x, sigmas, condition)).cpu()

    def denoiser(self) -> Denoiser:
        """The model's denoiser with guidance and clamping."""
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
    spacing: Spacing = "even",
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    precision: Precision = "fp32",
    clamp: bool = True,
) -> Iterator[Tensor]:
    """Samples images: an iterator of batches (B, C, H, W) float32 in [0, 1].

    Image i depends only on (seed, i) and its label: a longer run begins with the images of a shorter one.

    Args:
        model: the diffusion model.
        count: number of images; those of a conditional model have its classes in turn.
        labels: instead of a count, the label of each image (conditional models).
        solver: see `Sampler`.
        steps: see `Sampler`.
        spacing: see `Sampler`.
        guidance: see `Sampler`.
        seed: see `Sampler`.
        batch_size: the most images sampled together, and rows of one network call; `auto`: by memory.
        precision: see `Sampler`.
        clamp: see `Sampler`.

    Raises:
        FaroutError: when called, for incompatible settings, counts and labels.
    """
    sampler = Sampler(model, solver, steps, spacing, guidance, seed, batch_size, precision, clamp)
    if (count is None) == (labels is None) or (count is not None and count < 1):
        raise FaroutError(f"give either a count of at least 1 or labels; got {count} and {labels}")
    if labels is None and model.conditioning is not None:
        labels = [index % model.conditioning.num_classes for index in range(count or 0)]
    sampler.condition(labels)
    total = len(labels) if labels is not None else count or 0

    # an inner generator, so that errors of the arguments are raised by the call, not by the first batch
    def sample_batches() -> Iterator[Tensor]:
        size = sampler.images_per_batch
        for start in range(0, total, size):
            indices = range(start, min(start + size, total))
            yield sampler.sample_images(indices, None if labels is None else [labels[index] for index in indices])

    return sample_batches()
