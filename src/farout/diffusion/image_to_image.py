"""Part of the way to noise, and back: what a generator leaves on any image that it makes, on images of one's own."""

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

__all__ = ["STEPS", "DenoisingSpacing", "ImageToImage"]

STEPS = 10
"""Steps back of methods that do not find their own, where none are asked for."""
DenoisingSpacing = Literal["grid", "geometric"]
"""Where the levels of the way back lie: the kinds of `Spacing` that begin at any level."""


@dataclass(frozen=True)
class ImageToImage:
    """Noises images part of the way, x = x0 + sigma_t noise, and denoises them by any solver, without guidance.

    The noising is SDEdit's (Meng et al. 2022, "SDEdit: guided image synthesis and editing with stochastic differential
    equations"), the end is the image itself: nothing is edited.

    A level is a share of the schedule: at level s the noise is that of t = s T - 1. Images made from pure noise, such
    as outliers, walk through all levels. The upper ones decide what an image shows, and that is to stay the image's
    own; on the lower ones a generator leaves its traces (smoothed texture, what is left of the noise, shifted colours,
    an autoencoder's grid), whatever is shown. From the middle, the default, both kinds of image have gone the same
    lower half of the way. From level 1 nothing of the image would come back: a new sample of its class. Lower levels
    leave more of the image and fewer traces; where no class is told, an image wants them to stay what it is. Level 0 is
    the round trip through the autoencoder alone.

    Args:
        model: the diffusion model; images go where it is.
        level: where images turn round.
        highest: every image has a level of its own, drawn evenly from `level` to this one; None: all have `level`.
        classes: denoise each image under its class, where the model is told classes; False: under the null condition.
        solver: a name of `farout.diffusion.solvers.registry.SOLVERS`.
        steps: steps back; None: 10, or the method's own. On the grid a low level has as many as there are levels.
        spacing: of the levels on the way back: `grid` (evenly in t) or `geometric` (evenly in log sigma).
        seed: level and noise of an image follow from (seed, its content) alone; the noise is the same for any level.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: of the network.

    Raises:
        FaroutError: for levels outside 0 to 1, level 0 without an autoencoder, a solver that is unknown or wants more
            steps, and for classes left aside by a model without a null condition.
    """

    model: DiffusionModel
    level: float = 0.5
    highest: float | None = None
    classes: bool = True
    solver: str = "dpm_solver_2m"
    steps: int | None = None
    spacing: DenoisingSpacing = "grid"
    seed: int = 0
    batch_size: BatchSize = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        top = self.level if self.highest is None else self.highest
        if not 0 <= self.level <= top <= 1:
            given = f"{self.level:g}" + ("" if self.highest is None else f" to {top:g}")
            raise FaroutError(f"levels are shares of the schedule, 0 to 1, the highest last; got {given}")
        if self.level == 0 and self.model.autoencoder is None:
            raise FaroutError(
                "this model has no autoencoder, so an image comes back from level 0 as it went; give a level above 0, "
                "such as 0.5"
            )
        check_batch_size(self.batch_size)
        if self.spacing not in get_args(DenoisingSpacing) or (self.steps is not None and self.steps < 1):
            given = f"steps is {self.steps}, spacing is {self.spacing!r}"
            raise FaroutError(f"{given}; expected at least 1 step, and a spacing of grid or geometric")
        if is_adaptive(self.solver) and self.steps is not None:
            raise FaroutError(f"{self.solver} chooses its own steps; leave out steps={self.steps}")
        conditioning = self.model.conditioning
        if conditioning is not None and not self.classes and not conditioning.has_null:
            raise missing_null_condition()
        self._solve.check(
            noise_levels.pad_paths([self._path(number) for number in {self._number(0.0), self._number(1.0)}])
        )

    @property
    def uses_classes(self) -> bool:
        """Whether each image wants its label."""
        return self.classes and self.model.conditioning is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images, in addition to model, seed and precision."""
        adaptive = is_adaptive(self.solver)
        return {
            "level": self.level,
            "highest": self.highest,
            "classes": self.uses_classes,
            "solver": self.solver,
            "steps": None if adaptive else self._steps,
            "spacing": self.spacing,
        }

    @property
    def _steps(self) -> int:
        return STEPS if self.steps is None else self.steps

    @cached_property
    def _solve(self) -> Solver:
        return create_solver(self.solver, self.model.schedule)

    def _number(self, share: float) -> int:
        """Levels that an image is noised through, of T, at a share of the way from `level` to `highest`."""
        top = self.level if self.highest is None else self.highest
        level = self.level + share * (top - self.level)
        return max(int(top > 0), round(level * self.model.schedule.steps))

    def _path(self, number: int) -> Tensor:
        """sigmas on the way back, as the solver takes them."""
        schedule = self.model.schedule
        if number == 0:
            return torch.zeros(2)
        if self.spacing == "grid":
            return solver_path(self.solver, noise_levels.even_path(schedule, min(self._steps, number), number - 1))
        return solver_path(self.solver, noise_levels.geometric_path(schedule, number - 1, self._steps))

    def levels(self, keys: Sequence[str]) -> list[float]:
        """The level of each image, as a share of the schedule, rounded to one of its levels."""
        return [number / self.model.schedule.steps for number, _ in map(self._drawn, keys)]

    def _drawn(self, key: str) -> tuple[int, Tensor]:
        """Levels noised through, and noise, of one image."""
        generator = seeded_generator(self.seed, "round trip", key)
        share = float(torch.rand((), generator=generator))
        return self._number(share), torch.randn(self.model.shape, generator=generator)

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Sequence[str], labels: Sequence[int] | None = None) -> Tensor:
        """Images (B, C, H, W) float32 in [0, 1], on the CPU, of images (B, C, H, W), prepared as the model's.

        Args:
            images: in [0, 1].
            keys: their content hashes (`Batch.identities`), which seed their draws.
            labels: their classes, where `uses_classes`.

        Raises FaroutError where labels are wanted and missing, or the model does not know one.
        """
        model, condition = self.model, self._condition(labels)
        x0 = model.encode(images)
        numbers, noise = zip(*map(self._drawn, keys), strict=True)
        sigmas = noise_levels.pad_paths([self._path(number) for number in numbers]).to(x0.device)
        x = x0 + expand_dims(sigmas[:, 0], x0) * torch.stack(noise).to(x0.device)
        back = self._solve(model.clamp_x0(model.denoiser(self.batch_size, self.precision)), x, sigmas, condition)
        return model.decode(back).cpu()

    def _condition(self, labels: Sequence[int] | None) -> Condition | None:
        conditioning = self.model.conditioning
        if conditioning is None or not self.classes:
            return None
        if labels is None:
            raise FaroutError(
                "images are denoised under their classes, which require a label each, 0 to "
                f"{conditioning.num_classes - 1}; "
                "or turn classes off"
            )
        return conditioning(torch.tensor(list(labels), dtype=torch.int64, device=self.model.device))
