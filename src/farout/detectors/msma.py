"""Norms of the score of a clean image at many noise levels, and their density (Mahmood et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.settings import check_words, checked_levels
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.features.densities import GaussianMixture, Mahalanobis, Nearest, pack_arrays, unpack_arrays

__all__ = ["MSMA"]

_SCORES = ("mixture", "mahalanobis", "nearest")


class MSMA(Detector):
    """Density of the norms of the model's score function at many noise levels.

    Mahmood, Oliva and Styner, "Multiscale score matching for out-of-distribution detection" (ICLR 2021, arXiv
    2010.13132). With D(x, sigma) the denoised image and s(x, sigma) = (D(x, sigma) - x) / sigma^2 the score of the
    images' density blurred by sigma, an image x, to which NO noise is added, is described by

        sigma_l |s(x, sigma_l)| = |x - D(x, sigma_l)| / sigma_l,   l = 1 … L,

    |.| the Euclidean norm: one evaluation a level, all levels in one batch. A density of these L numbers, fitted to
    good images, is the score: too small a norm is as odd as too large a one. The factor sigma_l, as in the authors'
    code, brings the levels to one scale (the norm of the predicted noise); the densities standardize each level, so
    that it changes none of them.

    The authors train a noise-conditional score network for the purpose; here a diffusion model serves, whose network
    has seen noisy images only: x is divided by sqrt(1 + sigma^2) for it as a noisy image would be. Their third density,
    a flow, is left out. Their mixture has 2 to 20 components by cross-validation; here 1 to `components` by the
    Bayesian information criterion, and no more than the statistics images allow.

    Args:
        levels: noise levels t; default: `count` levels from `lowest` to `highest`, evenly spaced in log sigma.
        count: maximum number of levels; levels with the same t count once.
        lowest: smallest sigma of those levels, for pixels in [0, 1] (for latents: in their own units), at least the
            schedule's.
        highest: largest sigma of those levels, in the same units, at most the schedule's.
        components: maximum number of Gaussians of the mixture.
        neighbours: rank of the neighbour whose distance is the indicator `nearest`.
        score: indicator used as score: `mixture` or `mahalanobis` (negative log density), or `nearest`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    statistics_suffice: ClassVar[bool] = True
    diffusion: DiffusionModel | None = None
    choices: ClassVar[frozenset[str]] = frozenset({"components", "neighbours", "score"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"count": 10, "lowest": 0.01, "highest": 1.0, "components": 20, "neighbours": 5, "score": "mixture"},
    }

    def __init__(
        self,
        *,
        levels: tuple[int, ...] | None = None,
        count: int = 10,
        lowest: float = 0.01,
        highest: float = 1.0,
        components: int = 20,
        neighbours: int = 5,
        score: Literal["mixture", "mahalanobis", "nearest"] = "mixture",
    ) -> None:
        check_words(self)
        if min(count, components, neighbours) < 1:
            given = f"{count}, {components} and {neighbours}"
            raise FaroutError(f"count, components and neighbours must be at least 1, got {given}")
        if not 0 < lowest < highest:
            raise FaroutError(f"lowest and highest must satisfy 0 < lowest < highest, got {lowest:g} and {highest:g}")
        if levels is not None:
            self._refuse_idle("with levels; leave levels out", "count", "lowest", "highest")
        self.levels: tuple[int, ...] = ()
        self.sigmas = torch.zeros(0)
        self.mixture: GaussianMixture | None = None
        self.gaussian: Mahalanobis | None = None
        self.nearest: Nearest | None = None

    @classmethod
    def tiny(cls, resources: Any) -> MSMA:
        """Three levels at which an untrained network's answers depend on the image."""
        return cls(levels=(200, 500, 900))

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Refuses levels that the schedule does not have."""
        assert diffusion is not None
        self._levels(diffusion)

    def _levels(self, model: DiffusionModel) -> tuple[int, ...]:
        """The levels t, rising; raises FaroutError for those outside the schedule."""
        schedule, given = model.schedule, self.config["levels"]
        if given is not None:
            return checked_levels(given, schedule.steps)
        low, high = model.x0_range or (0.0, 1.0)
        wanted = torch.tensor([self.config["lowest"], self.config["highest"]], dtype=torch.float64) * (high - low)
        ends = wanted.clamp(schedule.sigma[0], schedule.sigma[-1])
        if not ends[0] < ends[1]:
            raise FaroutError(
                f"sigma from {wanted[0]:g} to {wanted[1]:g} in the network's space is outside the schedule's "
                f"{schedule.sigma[0]:g} to {schedule.sigma[-1]:g}; change lowest and highest, or give levels"
            )
        ramp = torch.linspace(0, 1, self.config["count"], dtype=torch.float64)
        sigmas = torch.lerp(ends[0].log(), ends[1].log(), ramp).exp()
        return tuple(sorted({int(t) for t in schedule.t_of(sigmas).round()}))

    def prepare(self) -> None:
        """Finds the levels and builds the denoiser."""
        if self.diffusion is None:
            raise FaroutError("MSMA requires a diffusion model")
        self.levels = self._levels(self.diffusion)
        self.sigmas = self.diffusion.schedule.sigma_of(torch.tensor(self.levels)).float()
        self.denoiser: NetworkDenoiser = self.diffusion.denoiser(self.runtime.batch_size, self.precision)

    @property
    def rows_per_image(self) -> int:
        """One a level."""
        return max(1, len(self.levels))

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.denoiser.evaluations

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """`norm`, sigma times the score's norm, of every level: values (B, level, 1, 1)."""
        assert self.diffusion is not None
        clean = self.diffusion.encode(batch.images).repeat_interleave(len(self.levels), 0)
        sigmas = self.sigmas.to(clean.device).repeat(len(batch.keys))
        noise = (clean - self.denoiser(clean, sigmas)) / expand_dims(sigmas, clean)
        norms = in_float64(noise).square().flatten(1).sum(1).sqrt().float().cpu()
        values = norms.reshape(len(batch.keys), len(self.levels), 1, 1)
        return Measurements(batch.keys, values, tuple(float(t) for t in self.levels), ("norm",))

    @staticmethod
    def _table(measurements: Measurements) -> np.ndarray:
        """Norms (B, level), float64."""
        assert measurements.values is not None
        return measurements.values[:, :, 0, 0].double().numpy()

    def fit_statistics(self, measurements: Measurements) -> None:
        """The densities of the good images' norms."""
        table = self._table(measurements)
        self.mixture = GaussianMixture.fit(table, seed=self.seed, most=self.config["components"])
        self.gaussian = Mahalanobis.fit(table)
        self.nearest = Nearest.fit(table, k=self.config["neighbours"])

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`mixture`, `mahalanobis` and `nearest`."""
        assert self.mixture is not None
        assert self.gaussian is not None
        assert self.nearest is not None
        table = self._table(measurements)
        found = (self.mixture.score(table), self.gaussian.score(table), self.nearest.score(table))
        return {name: torch.from_numpy(score) for name, score in zip(_SCORES, found, strict=True)}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        parts = {"mixture": self.mixture, "mahalanobis": self.gaussian, "nearest": self.nearest}
        return pack_arrays({name: part for name, part in parts.items() if part is not None})

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "mixture"))
        self.gaussian = Mahalanobis.from_arrays(unpack_arrays(state, "mahalanobis"))
        self.nearest = Nearest.from_arrays(unpack_arrays(state, "nearest"))
