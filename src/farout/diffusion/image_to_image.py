"""Image-to-image: an image is noised to a level and denoised again, so that it gets the traces of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from farout.core.chunking import BatchSize, check_batch_size
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition, missing_null_condition
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded_generator
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.registry import create_solver, is_adaptive, solver_path

__all__ = ["DEFAULT_STEPS", "DenoisingSpacing", "ImageToImage"]

DEFAULT_STEPS = 10
"""Denoising steps of solvers that are not adaptive."""
DenoisingSpacing = Literal["even", "geometric"]
"""How the levels of the denoising path are spaced: the kinds of `Spacing` that can start at any level."""


@dataclass(frozen=True)
class ImageToImage:
    """Noises images to a level, x = x0 + sigma_t noise, and denoises them by any solver, without guidance.

    The noising is that of SDEdit (Meng et al. 2022, "SDEdit: guided image synthesis and editing with stochastic
    differential equations"); the target is the image itself, so nothing is edited.

    A level is a fraction s of the schedule: the noise is that of t = s T - 1. Images that were sampled from pure noise,
    such as synthetic outliers, pass through all levels. The upper levels decide the content of an image, which is to be
    kept here; on the lower ones a generator leaves its traces (smoothed texture, residual noise, shifted colors, the
    grid of an autoencoder), whatever the content. At the default of 0.5 both kinds of images pass through the same
    lower half. At level 1 nothing of the image would be left: the result would be a new sample of its class. Lower
    levels keep more of the image and leave fewer traces; a model without classes requires them to keep the content.
    Level 0 encodes and decodes by the autoencoder alone.

    Args:
        model: the diffusion model; images are computed on its device.
        level: level to which images are noised.
        max_level: each image has its own level, drawn uniformly between `level` and this one; None: always `level`.
        classes: denoise each image under its class, if the model is class-conditional; False: under the null condition.
        solver: a name in `farout.diffusion.solvers.registry.SOLVERS`.
        steps: denoising steps; None: 10, or chosen by an adaptive solver. With `even` a low level has at most as many
            steps as there are levels below it.
        spacing: of the levels of the denoising path: `even` (evenly in t) or `geometric` (evenly in log sigma).
        seed: level and noise of an image depend only on (seed, its content); the noise is the same for any level.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: precision of the network.

    Raises:
        FaroutError: for levels outside 0 to 1, level 0 without an autoencoder, an unknown solver or one that requires
            more steps, and `classes` False for a class-conditional model without a null condition.
    """

    model: DiffusionModel
    level: float = 0.5
    max_level: float | None = None
    classes: bool = True
    solver: str = "dpm_solver_2m"
    steps: int | None = None
    spacing: DenoisingSpacing = "even"
    seed: int = 0
    batch_size: BatchSize = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        highest = self.level if self.max_level is None else self.max_level
        if not 0 <= self.level <= highest <= 1:
            given = f"{self.level:g}" + ("" if self.max_level is None else f" to {highest:g}")
            raise FaroutError(f"levels are fractions of the schedule, 0 to 1, max_level at least level; got {given}")
        if self.level == 0 and self.model.autoencoder is None:
            raise FaroutError(
                "this model has no autoencoder, so level 0 does not change an image; give a level above 0, such as 0.5"
            )
        check_batch_size(self.batch_size)
        if self.spacing not in get_args(DenoisingSpacing) or (self.steps is not None and self.steps < 1):
            given = f"steps is {self.steps}, spacing is {self.spacing!r}"
            raise FaroutError(f"{given}; expected at least 1 step, and a spacing of even or geometric")
        if is_adaptive(self.solver) and self.steps is not None:
            raise FaroutError(f"{self.solver} chooses its own steps; leave out steps={self.steps}")
        conditioning = self.model.conditioning
        if conditioning is not None and not self.classes and not conditioning.has_null:
            raise missing_null_condition()
        extremes = {self._num_levels(0.0), self._num_levels(1.0)}
        self._solver.check(noise_levels.pad_paths([self._path(count) for count in extremes]))

    @property
    def uses_classes(self) -> bool:
        """Whether each image requires its label."""
        return self.classes and self.model.conditioning is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, in addition to model, seed and precision."""
        return {
            "level": self.level,
            "max_level": self.max_level,
            "classes": self.uses_classes,
            "solver": self.solver,
            "steps": None if is_adaptive(self.solver) else self._steps,
            "spacing": self.spacing,
        }

    @property
    def _steps(self) -> int:
        return DEFAULT_STEPS if self.steps is None else self.steps

    @cached_property
    def _solver(self) -> Solver:
        return create_solver(self.solver, self.model.schedule)

    def _num_levels(self, fraction: float) -> int:
        """How many of the T levels an image passes, at a fraction of the way from `level` to `max_level`."""
        highest = self.level if self.max_level is None else self.max_level
        level = self.level + fraction * (highest - self.level)
        return max(int(highest > 0), round(level * self.model.schedule.num_levels))

    def _path(self, num_levels: int) -> Tensor:
        """sigmas of the denoising path, as the solver expects them."""
        schedule = self.model.schedule
        if num_levels == 0:
            return torch.zeros(2)
        if self.spacing == "even":
            path = noise_levels.even_path(schedule, min(self._steps, num_levels), num_levels - 1)
        else:
            path = noise_levels.geometric_path(schedule, num_levels - 1, self._steps)
        return solver_path(self.solver, path)

    def image_levels(self, identities: Sequence[str]) -> list[float]:
        """The level of each image, as a fraction of the schedule, rounded to one of its levels."""
        return [self._draw(identity)[0] / self.model.schedule.num_levels for identity in identities]

    def _draw(self, identity: str) -> tuple[int, Tensor]:
        """The number of levels and the noise of one image."""
        generator = seeded_generator(self.seed, "round trip", identity)
        fraction = float(torch.rand((), generator=generator))
        return self._num_levels(fraction), torch.randn(self.model.shape, generator=generator)

    @torch.no_grad()
    def __call__(self, images: Tensor, identities: Sequence[str], labels: Sequence[int] | None = None) -> Tensor:
        """Reconstructs images (B, C, H, W) that were preprocessed for the model; float32 in [0, 1], on the CPU.

        Args:
            images: in [0, 1].
            identities: see `Batch.identities`; they seed their levels and noise.
            labels: their classes, required if `uses_classes`.

        Raises FaroutError for missing labels, and for a label that the model does not have.
        """
        model, conditioning = self.model, self.model.conditioning
        condition: Condition | None = None
        if conditioning is not None and self.classes:
            if labels is None:
                raise FaroutError(
                    "images are denoised under their classes, which requires a label for each, 0 to "
                    f"{conditioning.num_classes - 1}; or turn classes off"
                )
            condition = conditioning(torch.tensor(list(labels), dtype=torch.int64, device=model.device))
        x0 = model.encode(images)
        level_counts, noise = zip(*(self._draw(identity) for identity in identities), strict=True)
        sigmas = noise_levels.pad_paths([self._path(count) for count in level_counts]).to(x0.device)
        x = x0 + expand_dims(sigmas[:, 0], x0) * torch.stack(noise).to(x0.device)
        denoiser = model.clamp_x0(model.denoiser(self.batch_size, self.precision))
        return model.decode(self._solver(denoiser, x, sigmas, condition)).cpu()
