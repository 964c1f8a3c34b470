"""Interpolation between two images: one image with the noise of the other, or the noises of both (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farout.core.chunking import BatchSize
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import missing_null_condition
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.registry import create_solver, solver_path

__all__ = ["InterpolatedImages", "Interpolator", "slerp"]


def slerp(first: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    """Spherical interpolation (sin((1 - s) a) first + sin(s a) second) / sin a, where a is the angle between the rows.

    Args:
        first: values (B, ...) at s = 0.
        second: values (B, ...) at s = 1.
        fraction: s of each row, (B,).

    Rows that are parallel or opposite are interpolated linearly.
    """
    # float64 on the CPU, because not every device has float64
    a, b = (values.cpu().double().flatten(1) for values in (first, second))
    norms = (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)
    angle = ((a * b).sum(1) / norms).clamp(-1, 1).acos()
    s = fraction.to(angle)
    is_parallel = angle.sin() < 1e-6
    sine = torch.where(is_parallel, 1.0, angle.sin())
    weight_a, weight_b = (torch.where(is_parallel, part, (part * angle).sin() / sine) for part in (1 - s, s))
    return (weight_a[:, None] * a + weight_b[:, None] * b).reshape(first.shape).to(first)


@dataclass(frozen=True)
class InterpolatedImages:
    """Images (B, S, C, H, W) in [0, 1] on the CPU; S counts the levels of an interpolation, both ends included.

    Attributes:
        first: image A with the noise of B at each level, denoised: A at level 0, the decoded inversion of B at the end.
        second: the same with A and B exchanged.
        symmetric: between the noises of A and B, at S evenly spaced fractions.
    """

    first: Tensor
    second: Tensor
    symmetric: Tensor


class Interpolator:
    """Interpolates pairs of images by DDIM inversion and denoising, with any solver.

    As in the released code of Liu et al. 2022 (arXiv 2211.11255), the noise of an image is its variance-preserving
    inversion at the largest level T. At level t, `sqrt(abar_t) A + sqrt(1 - abar_t) noise_B` is denoised; at level T,
    where abar is taken as 0, the noise alone. Paths follow evenly spaced levels and end at the schedule's smallest
    sigma.

    Args:
        model: an unconditional model, or a class-conditional one, which is used with its null condition.
        solver: a name in `farout.diffusion.solvers.registry.SOLVERS`.
        steps: steps from the largest level to the smallest; an adaptive solver uses them only for the levels at which
            images are interpolated.
        images_between: number of interpolated images between the two ends.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: precision of the network.

    Attributes:
        levels: t of every interpolated image, both ends included.

    Raises:
        FaroutError: for more images than steps, too few steps for the solver, and a conditional model without a null
            condition.
    """

    def __init__(
        self,
        model: DiffusionModel,
        solver: str = "pndm4",
        steps: int = 50,
        images_between: int = 9,
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
    ) -> None:
        if model.conditioning is not None and not model.conditioning.has_null:
            raise missing_null_condition()
        self.path_levels = sorted({0, *noise_levels.even_levels(model.schedule, steps)})
        last = len(self.path_levels) - 1
        if images_between < 1:
            raise FaroutError(f"images_between must be 1 or more, got {images_between}")
        if images_between >= last:
            raise FaroutError(
                f"{images_between} images do not fit between the ends of {last} steps; give {images_between + 1} steps "
                "or more, or fewer images_between"
            )
        self.model, self.solver_name = model, solver
        self._solver = create_solver(solver, model.schedule)
        self._denoiser = model.denoiser(batch_size, precision)
        # indices into path_levels of the interpolated images
        self._indices = [round(last * number / (images_between + 1)) for number in range(images_between + 2)]
        self.levels = tuple(self.path_levels[index] for index in self._indices)
        self._top_scale = float((1 + model.schedule.sigma[-1] ** 2).sqrt())
        self._solver.check(self._inversion_paths(1))
        try:
            self._solver.check(self._denoising_paths(self._indices))
        except FaroutError as error:
            lowest = self._indices[1]
            raise FaroutError(
                f"{images_between} images between the ends of {last} steps leave {lowest} step{'s' * (lowest > 1)} "
                f"below the lowest level, too few for the solver; increase steps or decrease images_between ({error})"
            ) from error

    def _sigmas_up_to(self, index: int) -> Tensor:
        """Rising sigmas of the path's levels up to an index."""
        return self.model.schedule.sigma_of(torch.tensor(self.path_levels[: index + 1])).float()

    def _inversion_paths(self, count: int) -> Tensor:
        """Paths of `count` rows from the smallest level to the largest."""
        return solver_path(self.solver_name, self._sigmas_up_to(len(self.path_levels) - 1)).repeat(count, 1)

    def _denoising_paths(self, indices: Sequence[int]) -> Tensor:
        """Paths from levels, given by their indices, to the smallest level; one row each."""
        paths = [solver_path(self.solver_name, self._sigmas_up_to(index).flip(0)) for index in indices]
        return noise_levels.pad_paths(paths)

    @torch.no_grad()
    def invert(self, x0: Tensor) -> Tensor:
        """The variance-preserving noise of each x0 (B, ...): the inversion at level T divided by sqrt(1 + sigma^2)."""
        return self._solver(self._denoiser, x0, self._inversion_paths(len(x0)).to(x0.device)) / self._top_scale

    @torch.no_grad()
    def decode(self, noise: Tensor) -> Tensor:
        """x0 of each variance-preserving noise (B, ...) at level T."""
        paths = self._denoising_paths([len(self.path_levels) - 1] * len(noise))
        return self._solver(self._denoiser, self._top_scale * noise, paths.to(noise.device))

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> InterpolatedImages:
        """Interpolates between images A (B, C, H, W) and B (B, C, H, W) in [0, 1], row by row."""
        a, b = self.model.encode(first), self.model.encode(second)
        noise_a, noise_b = self.invert(torch.cat([a, b])).chunk(2)
        inner, count = self._indices[1:-1], len(self._indices)

        # x = x0 + sigma noise at each level between the ends, and slerp of the noises at the largest level
        sigmas = [float(self._sigmas_up_to(index)[-1]) for index in inner]
        fractions = torch.linspace(0, 1, count, dtype=torch.float64)
        starts = [
            *(a + sigma * noise_b for sigma in sigmas),
            *(b + sigma * noise_a for sigma in sigmas),
            *(self._top_scale * slerp(noise_a, noise_b, fraction.expand(len(a))) for fraction in fractions),
        ]
        # all in one call, so that the network's batches are full
        indices = [*inner, *inner, *[self._indices[-1]] * count]
        paths = self._denoising_paths([index for index in indices for _ in range(len(a))])
        x0 = torch.split(self._solver(self._denoiser, torch.cat(starts), paths.to(a.device)), len(a))

        symmetric = x0[-count:]
        asymmetric_first = [a, *x0[: len(inner)], symmetric[-1]]
        asymmetric_second = [b, *x0[len(inner) : -count], symmetric[0]]
        return InterpolatedImages(
            *(
                torch.stack([self.model.decode(values).cpu() for values in images], dim=1)
                for images in (asymmetric_first, asymmetric_second, symmetric)
            )
        )
