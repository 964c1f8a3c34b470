"""Between two images: one image with the other's noise, or the noises of both (Liu et al., 2211.11255)."""

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


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (B, …), an angle for each row: (sin((1 - s) a) first + sin(s a) second) / sin a.

    share: s (B,), 0 is the first and 1 the second. Rows that are parallel, or opposite, are interpolated on a line.
    """
    rows = [each.cpu().double().flatten(1) for each in (first, second)]
    lengths = (rows[0].norm(dim=1) * rows[1].norm(dim=1)).clamp(min=1e-30)
    angle = ((rows[0] * rows[1]).sum(1) / lengths).clamp(-1, 1).acos()
    share = share.to(angle)
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    weights = [torch.where(straight, s, (s * angle).sin() / sine) for s in (1 - share, share)]
    mixed = weights[0][:, None] * rows[0] + weights[1][:, None] * rows[1]
    return mixed.reshape(first.shape).to(first)


@dataclass(frozen=True)
class InterpolatedImages:
    """Images (B, S, C, H, W) in [0, 1] on the CPU, station by station from 0 to the largest level.

    first: image A with the noise of B at each level, denoised: A at 0, B's inversion decoded at the end; second: the
    same with A and B exchanged; symmetric: between the noises of A and B, at S even shares.
    """

    first: Tensor
    second: Tensor
    symmetric: Tensor


class Interpolator:
    """Interpolates pairs of images by one solver, there (inversion) and back.

    As the code of Liu et al. 2022 (arXiv 2211.11255) has it. An image's noise is its variance-preserving inversion at
    the largest level. At level t, `sqrt(abar_t) A + sqrt(1 - abar_t) noise of B` is denoised; at the largest level,
    where abar stands for 0, the noise alone. Paths walk the even grid of levels and end at the schedule's smallest
    sigma.

    Args:
        model: an unconditional model, or a class-conditional one, which answers by its null condition.
        solver: a name of `farout.diffusion.solvers.registry.SOLVERS`.
        steps: steps from the largest level to the smallest, whose levels are the stations' too; a solver that finds its
            own steps uses them for that alone.
        stations: levels between the two ends that images are noised to.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: of the network.

    Attributes:
        levels: t of every station, ends included.

    Raises:
        FaroutError: for more stations than steps have room for, steps that are too few for the solver, and a
            conditional model without a null condition.
    """

    def __init__(
        self,
        model: DiffusionModel,
        solver: str = "pndm4",
        steps: int = 50,
        stations: int = 9,
        batch_size: BatchSize = "auto",
        precision: Precision = "fp32",
    ) -> None:
        if model.conditioning is not None and not model.conditioning.has_null:
            raise missing_null_condition()
        self.ladder = sorted({0, *noise_levels.even_levels(model.schedule, steps)})
        top = len(self.ladder) - 1
        if stations < 1:
            raise FaroutError(f"stations is {stations}; expected at least 1")
        if stations >= top:
            raise FaroutError(
                f"{stations} stations do not fit between the ends of {top} steps; give {stations + 1} steps or more, "
                "or fewer stations"
            )
        self.model, self.name = model, solver
        self._solve = create_solver(solver, model.schedule)
        self._denoiser = model.denoiser(batch_size, precision)
        self._places = [round(top * number / (stations + 1)) for number in range(stations + 2)]
        self.levels = tuple(self.ladder[place] for place in self._places)
        self._solve.check(self._up(1))
        self._rehearse_down()

    def _rehearse_down(self) -> None:
        try:
            self._solve.check(self._down(self._places))
        except FaroutError as error:
            steps, stations, lowest = len(self.ladder) - 1, len(self._places) - 2, self._places[1]
            raise FaroutError(
                f"{stations} stations on {steps} steps leave {lowest} step{'s' * (lowest > 1)} from the lowest station "
                f"to the image, too few for the solver; take more steps or fewer stations ({error})"
            ) from error

    def _sigmas(self, place: int) -> Tensor:
        """Rising sigmas of the ladder up to a place."""
        return self.model.schedule.sigma_of(torch.tensor(self.ladder[: place + 1])).float()

    def _up(self, count: int) -> Tensor:
        """Paths of the inversion of `count` rows."""
        return solver_path(self.name, self._sigmas(len(self.ladder) - 1)).repeat(count, 1)

    def _down(self, places: list[int]) -> Tensor:
        """Paths from places of the ladder to its lowest level, one row each."""
        return noise_levels.pad_paths([solver_path(self.name, self._sigmas(place).flip(0)) for place in places])

    def _walk(self, x: Tensor, sigmas: Tensor) -> Tensor:
        return self._solve(self._denoiser, x, sigmas.to(x.device))

    @torch.no_grad()
    def invert(self, x0: Tensor) -> Tensor:
        """The noise of each x0 (B, …) in the network's space, variance-preserving: x at the largest level, divided by
        sqrt(1 + sigma^2).
        """
        return self._walk(x0, self._up(len(x0))) / self._scale()

    def _scale(self) -> float:
        return float((1 + self.model.schedule.sigma[-1] ** 2).sqrt())

    @torch.no_grad()
    def decode(self, noise: Tensor) -> Tensor:
        """x0 of each noise (B, …), from the largest level down."""
        return self._walk(self._scale() * noise, self._down([len(self.ladder) - 1] * len(noise)))

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> InterpolatedImages:
        """Interpolates between images (B, C, H, W) in [0, 1] and (B, C, H, W): the first and the first, and so on."""
        x0 = [self.model.encode(images) for images in (first, second)]
        noise = self.invert(torch.cat(x0)).chunk(2)
        inner, stations = self._places[1:-1], len(self._places)
        starts = [*self._noised(x0[0], noise[1]), *self._noised(x0[1], noise[0]), *self._between(*noise)]
        places = [*inner, *inner, *[self._places[-1]] * stations]
        # all in one walk, so that the calls of the network are full
        sigmas = self._down([place for place in places for _ in range(len(first))])
        ends = self._walk(torch.cat(starts), sigmas).split(len(first))
        symmetric = ends[-stations:]
        one_way = [x0[0], *ends[: len(inner)], symmetric[-1]]
        other_way = [x0[1], *ends[len(inner) : -stations], symmetric[0]]
        return InterpolatedImages(self._images(one_way), self._images(other_way), self._images(symmetric))

    def _noised(self, x0: Tensor, noise: Tensor) -> list[Tensor]:
        """x of every station between the ends: the station's level of `noise` on `x0`."""
        return [x0 + float(self._sigmas(place)[-1]) * noise for place in self._places[1:-1]]

    def _between(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """x of every station of the symmetric kind, all at the largest level: the noises between the two."""
        shares = torch.linspace(0, 1, len(self._places), dtype=torch.float64)
        return [self._scale() * slerp(first, second, share.expand(len(first))) for share in shares]

    def _images(self, stations: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.model.decode(x0).cpu() for x0 in stations], dim=1)
