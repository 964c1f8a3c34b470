"""How fast and how bent the deterministic path from an image to noise is (Heng et al. 2024)."""

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
from farout.detectors.settings import check_words
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.base import Evaluation
from farout.diffusion.solvers.ddim import DDIM
from farout.features.densities import GaussianMixture, KernelDensity, pack_arrays, unpack_arrays

__all__ = ["DiffPath"]


class DiffPath(Detector):
    """Density of the rate and curvature of an image's deterministic path to noise.

    Heng, Thiery and Soh, "Out-of-distribution detection with a single unconditional diffusion model" (NeurIPS 2024,
    arXiv 2405.11881), section 3. DDIM is run upwards from the image, x' = x + (sigma' - sigma) eps(x, sigma); with
    eps_1 … eps_n the noise predicted on the way at even steps of time, and eps'_i = n (eps_(i+1) - eps_i) its
    derivative by finite differences (time from 0 to 1; the paper's eq. 10, n - 1 of them),

        rate      = sqrt(sum_i |eps_i|^2)                                               (table 1)
        curvature = sqrt(sum_i |eps'_i|^2)                                              (DiffPath-1D, section 3.3)
        six       = sums over i and pixels of eps, eps^2, eps^3, eps', eps'^2, eps'^3   (DiffPath-6D, section 3.5)

    with means in place of sums, which the densities do not feel: they standardize every number. The scores are -log
    densities of these, fitted to good images, so that what lies below is as odd as what lies above: a mixture of
    Gaussians for `six`, kernels for the other two. The paper's model is trained on other images than the good ones;
    any diffusion model serves, one without condition or with a null condition.

    Levels are 0, T/n, 2 T/n, …, and the image is taken for a sample of the lowest, as in the authors' code. Theirs also
    clamps the denoised image to what images can be before eps is formed, which the paper does not mention: `clamp`, the
    default because `six` gains by it on dev sources (docs/results.md, section 16).
    The paper's kernels have a width of 5 in its statistic's own unit, which goes with its image size; here it follows
    Scott's rule. Its mixture has 50 or 100 components, fitted to 50,000 images and cross-validated; here 1 to
    `components` by the Bayesian information criterion, and no more than the statistics images allow (60 rows each).

    Args:
        steps: number of steps n of the path, one network evaluation each.
        clamp: clamp the denoised image to the valid pixel range (not for latents).
        components: maximum number of Gaussians of the mixture.
        score: indicator used as score: `six` (mixture of six statistics), or `curvature` or `rate` alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    statistics_suffice: ClassVar[bool] = True
    diffusion: DiffusionModel | None = None
    choices: ClassVar[frozenset[str]] = frozenset({"components", "score"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"steps": 10, "clamp": False, "components": 100, "score": "six"},
        "released": {"steps": 10, "clamp": True, "components": 100, "score": "six"},
        "paper-1d": {"steps": 10, "clamp": False, "score": "curvature"},
    }

    def __init__(
        self,
        *,
        steps: int = 10,
        clamp: bool = True,
        components: int = 10,
        score: Literal["six", "curvature", "rate"] = "six",
    ) -> None:
        check_words(self)
        if steps < 2 or components < 1:
            raise FaroutError(f"steps must be at least 2, components at least 1, got {steps} and {components}")
        self.path = torch.zeros(0)
        self.mixture: GaussianMixture | None = None
        self.kernels: dict[str, KernelDensity] = {}

    @classmethod
    def tiny(cls, resources: Any) -> DiffPath:
        """Three steps."""
        return cls(steps=3)

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Refuses more steps than the schedule has."""
        assert diffusion is not None
        self._path(diffusion)

    def _path(self, model: DiffusionModel) -> Tensor:
        """sigmas (steps + 1,); the last one, the schedule's largest, is where the last step ends, unevaluated."""
        count, steps = model.schedule.steps, int(self.config["steps"])
        if steps >= count:
            raise FaroutError(f"steps must be 2 to {count - 1}, the levels of the schedule less one, got {steps}")
        levels = [*(count * number // steps for number in range(steps)), count - 1]
        return model.schedule.sigma_of(torch.tensor(levels)).float()

    def prepare(self) -> None:
        """Builds the path and the denoiser."""
        if self.diffusion is None:
            raise FaroutError("DiffPath requires a diffusion model")
        self.path = self._path(self.diffusion)
        self.network: NetworkDenoiser = self.diffusion.denoiser(self.runtime.batch_size, self.precision)
        self.denoiser = self.diffusion.clamp_x0(self.network) if self.config["clamp"] else self.network

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.network.evaluations

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `rate` and `curvature`, each (B, 3): means over path and pixels of the first, second and third powers
        of eps and of its derivative.
        """
        assert self.diffusion is not None
        steps, clean = int(self.config["steps"]), self.diffusion.encode(batch.images)
        means = {name: torch.zeros(len(clean), 3, dtype=torch.float64) for name in ("rate", "curvature")}
        last: list[Tensor] = []

        def add(evaluation: Evaluation) -> None:
            eps = (evaluation.x - evaluation.x0) / expand_dims(evaluation.sigma, evaluation.x)
            means["rate"] += _powers(eps) / steps
            if last:
                means["curvature"] += _powers(steps * (eps - last.pop())) / (steps - 1)
            last.append(eps)

        DDIM()(self.denoiser, clean, self.path.expand(len(clean), -1), callback=add)
        return Measurements(batch.keys, vectors={name: value.float() for name, value in means.items()})

    @staticmethod
    def _six(measurements: Measurements) -> np.ndarray:
        """The six means of powers (B, 6), float64."""
        return torch.cat([measurements.vectors[name] for name in ("rate", "curvature")], dim=1).double().numpy()

    @staticmethod
    def _norm(measurements: Measurements, name: str) -> np.ndarray:
        """The root of a mean of squares, (B, 1) float64."""
        return measurements.vectors[name][:, 1:2].double().sqrt().numpy()

    def fit_statistics(self, measurements: Measurements) -> None:
        """The densities of the good images' statistics."""
        self.mixture = GaussianMixture.fit(self._six(measurements), seed=self.seed, most=self.config["components"])
        self.kernels = {name: KernelDensity.fit(self._norm(measurements, name)) for name in ("curvature", "rate")}

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`six`, `curvature` and `rate`."""
        assert self.mixture is not None
        found = {"six": self.mixture.score(self._six(measurements))}
        found |= {name: kernels.score(self._norm(measurements, name)) for name, kernels in self.kernels.items()}
        return {name: torch.from_numpy(score) for name, score in found.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.mixture is None else pack_arrays({"six": self.mixture, **self.kernels})

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "six"))
        self.kernels = {name: KernelDensity.from_arrays(unpack_arrays(state, name)) for name in ("curvature", "rate")}


def _powers(values: Tensor) -> Tensor:
    """(B, …) -> the means of the first, second and third powers of each row, (B, 3) float64 on the CPU."""
    flat = in_float64(values).flatten(1)
    return torch.stack([flat.mean(1), flat.square().mean(1), flat.pow(3).mean(1)], dim=1).cpu()
