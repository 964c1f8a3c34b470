"""Norms of the score of an image at many noise levels, and their density (Mahmood et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.argument_checks import check_literals, sort_levels
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import Requirements
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.features.densities import GaussianMixture, Mahalanobis, NearestNeighbor, pack_arrays, unpack_arrays

if TYPE_CHECKING:  # importing classifiers takes seconds, and the method uses none
    from farout.classifiers.model import Classifier

__all__ = ["MSMA"]


class MSMA(Detector):
    """Density of the norms of the model's score function at many noise levels.

    Mahmood, Oliva and Styner, "Multiscale score matching for out-of-distribution detection" (ICLR 2021, arXiv
    2010.13132). With D(x, sigma) the denoised image, the score of the images' density blurred by sigma is
    s(x, sigma) = (D(x, sigma) - x) / sigma^2. An image x, to which NO noise is added, is described by

        sigma_l ||s(x, sigma_l)|| = ||x - D(x, sigma_l)|| / sigma_l,   l = 1 … L,

    with the Euclidean norm: one evaluation per level, all levels in one batch. The OOD score is a negative log density
    of these L numbers, fitted to normal images, since norms that are too small are as anomalous as norms that are too
    large. The factor sigma_l, as in the authors' code, gives all levels the same scale (that of the predicted noise);
    it changes none of the scores, because the densities standardize each level.

    The authors train a noise-conditional score network. Here a diffusion model is used, whose network has seen noisy
    images only: x is divided by sqrt(1 + sigma^2) as a noisy image would be. Their third density, a normalizing flow,
    is left out. Their mixture has 2 to 20 components by cross-validation; here 1 to `components` by the Bayesian
    information criterion, and no more than the number of statistics images allows.

    Args:
        levels: noise levels t; default: `count` levels from `sigma_min` to `sigma_max`, evenly spaced in log sigma.
        count: maximum number of levels; levels with the same t count once.
        sigma_min: smallest sigma of those levels, for pixels in [0, 1] (for latents: in their own units), at least the
            schedule's.
        sigma_max: largest sigma of those levels, in the same units, at most the schedule's.
        components: maximum number of Gaussians of the mixture.
        neighbors: rank of the neighbor whose distance is the indicator `nearest`.
        score: indicator used as score: `mixture` or `mahalanobis` (negative log density), or `nearest`.
    """

    requirements: ClassVar[Requirements] = Requirements(diffusion="images", more_statistics=False)
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"components", "neighbors", "score"})
    # levels at which the prediction of an untrained network depends on the image
    test_arguments: ClassVar[Mapping[str, Any]] = {"levels": (200, 500, 900)}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "count": 10,
            "sigma_min": 0.01,
            "sigma_max": 1.0,
            "components": 20,
            "neighbors": 5,
            "score": "mixture",
        },
    }
    diffusion: DiffusionModel | None = None

    def __init__(
        self,
        *,
        levels: tuple[int, ...] | None = None,
        count: int = 10,
        sigma_min: float = 0.01,
        sigma_max: float = 1.0,
        components: int = 20,
        neighbors: int = 5,
        score: Literal["mixture", "mahalanobis", "nearest"] = "mixture",
    ) -> None:
        check_literals(self)
        if min(count, components, neighbors) < 1:
            given = f"{count}, {components} and {neighbors}"
            raise FaroutError(f"count, components and neighbors must be at least 1, got {given}")
        if not 0 < sigma_min < sigma_max:
            raise FaroutError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}"
            )
        if levels is not None:
            self._check_unused("without levels", "count", "sigma_min", "sigma_max")
        self.levels: tuple[int, ...] = ()
        self.mixture: GaussianMixture | None = None
        self.gaussian: Mahalanobis | None = None
        self.nearest: NearestNeighbor | None = None

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Reject levels that the schedule does not contain."""
        assert diffusion is not None
        self._choose_levels(diffusion)

    def _choose_levels(self, model: DiffusionModel) -> tuple[int, ...]:
        """The levels t in ascending order; raises FaroutError for levels outside the schedule."""
        schedule = model.schedule
        if self.config["levels"] is not None:
            return sort_levels(self.config["levels"], schedule.num_levels)
        low, high = model.x0_range or (0.0, 1.0)  # the values that images have in the network's space
        requested = torch.tensor([self.config["sigma_min"], self.config["sigma_max"]], dtype=torch.float64) * (
            high - low
        )
        ends = requested.clamp(schedule.sigma[0], schedule.sigma[-1])
        if not ends[0] < ends[1]:
            raise FaroutError(
                f"sigma from {requested[0]:g} to {requested[1]:g} in the network's space is outside the schedule's "
                f"{schedule.sigma[0]:g} to {schedule.sigma[-1]:g}; change sigma_min and sigma_max, or give levels"
            )
        ramp = torch.linspace(0, 1, self.config["count"], dtype=torch.float64)
        sigmas = torch.lerp(ends[0].log(), ends[1].log(), ramp).exp()
        return tuple(sorted({int(t) for t in schedule.t_of(sigmas).round()}))

    def prepare_networks(self) -> None:
        """Choose the levels and build the denoiser."""
        if self.diffusion is None:
            raise FaroutError("MSMA requires a diffusion model")
        self.levels = self._choose_levels(self.diffusion)
        self.sigmas = self.diffusion.schedule.sigma_of(torch.tensor(self.levels)).float().to(self.diffusion.device)
        self.denoiser: NetworkDenoiser = self.diffusion.denoiser(self.runtime.batch_size, self.precision, self.backend)

    @property
    def rows_per_image(self) -> int:
        """One per level."""
        return max(1, len(self.levels))

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.denoiser.evaluations

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """`norm`, sigma times the norm of the score, at every level: values (B, level, 1, 1)."""
        assert self.diffusion is not None
        count, levels = len(batch.keys), len(self.levels)
        x = self.diffusion.encode(batch.images).repeat_interleave(levels, 0)
        sigma = self.sigmas.repeat(count)
        # -sigma s(x, sigma) = (x - D(x, sigma)) / sigma
        scaled_score = (x - self.denoiser(x, sigma)) / expand_dims(sigma, x)
        norm = in_float64(scaled_score).square().flatten(1).sum(1).sqrt().float().cpu()
        return Measurements(batch.keys, norm.reshape(count, levels, 1, 1), tuple(map(float, self.levels)), ("norm",))

    @staticmethod
    def _norms(measurements: Measurements) -> np.ndarray:
        """(B, level), float64."""
        assert measurements.values is not None
        return measurements.values[:, :, 0, 0].double().numpy()

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit the densities of the norms of normal images."""
        norms = self._norms(measurements)
        self.mixture = GaussianMixture.fit(norms, seed=self.seed, max_components=self.config["components"])
        self.gaussian = Mahalanobis.fit(norms)
        self.nearest = NearestNeighbor.fit(norms, k=self.config["neighbors"])

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`mixture`, `mahalanobis` and `nearest`."""
        assert self.mixture is not None
        assert self.gaussian is not None
        assert self.nearest is not None
        norms = self._norms(measurements)
        return {
            "mixture": torch.from_numpy(self.mixture.score(norms)),
            "mahalanobis": torch.from_numpy(self.gaussian.score(norms)),
            "nearest": torch.from_numpy(self.nearest.score(norms)),
        }

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted densities."""
        densities = {"mixture": self.mixture, "mahalanobis": self.gaussian, "nearest": self.nearest}
        return pack_arrays({name: density for name, density in densities.items() if density is not None})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted densities."""
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "mixture"))
        self.gaussian = Mahalanobis.from_arrays(unpack_arrays(state, "mahalanobis"))
        self.nearest = NearestNeighbor.from_arrays(unpack_arrays(state, "nearest"))
