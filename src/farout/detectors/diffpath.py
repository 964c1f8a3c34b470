"""Rate and curvature of the deterministic path from an image to noise (Heng et al. 2024)."""

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
from farout.detectors.argument_checks import check_literals
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import Requirements
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.solvers.base import Evaluation
from farout.diffusion.solvers.ddim import DDIM
from farout.features.densities import GaussianMixture, KernelDensity, pack_arrays, unpack_arrays

if TYPE_CHECKING:  # importing classifiers takes seconds, and the method uses none
    from farout.classifiers.model import Classifier

__all__ = ["DiffPath"]


class DiffPath(Detector):
    """Density of the rate and curvature of an image's deterministic path to noise.

    Heng, Thiery and Soh, "Out-of-distribution detection with a single unconditional diffusion model" (NeurIPS 2024,
    arXiv 2405.11881), section 3. DDIM is run upwards from the image, x' = x + (sigma' - sigma) eps(x, sigma). With
    eps_1 … eps_n the noise predicted at the n steps, evenly spaced in time from 0 to 1, and
    eps'_i = n (eps_(i+1) - eps_i) its derivative by finite differences (eq. 10; n - 1 of them),

        rate      = sqrt(sum_i ||eps_i||^2)                                             (table 1)
        curvature = sqrt(sum_i ||eps'_i||^2)                                            (DiffPath-1D, section 3.3)
        six       = sums over i and pixels of eps, eps^2, eps^3, eps', eps'^2, eps'^3   (DiffPath-6D, section 3.5)

    with means in place of sums, which changes no score: the densities standardize every number. The OOD scores are
    negative log densities of these numbers, fitted to normal images, so that values below the normal ones are anomalous
    too: a Gaussian mixture for `six`, kernel densities for the other two. The paper's model is trained on images of
    another kind than the normal ones; any diffusion model works that is unconditional or has a null condition.

    Levels are 0, T/n, 2 T/n, …, and the image is the sample at the lowest level, as in the authors' code. That code
    also clamps the denoised image to the range of images before eps is formed, which the paper does not mention:
    `clamp`, the default because it raises the AUROC of `six` on dev sources (docs/results.md, section 16).
    The paper's kernels have a width of 5 in the unit of its statistic, which depends on the image size; here the width
    follows Scott's rule. Its mixture has 50 or 100 components, fitted to 50,000 images and cross-validated; here 1 to
    `components` by the Bayesian information criterion, at most one per 60 statistics images.

    Args:
        steps: number of steps n of the path, one network evaluation each.
        clamp: clamp the denoised image to the valid pixel range (not for latents).
        components: maximum number of Gaussians of the mixture.
        score: indicator used as score: `six` (mixture of six statistics), or `curvature` or `rate` alone.
    """

    requirements: ClassVar[Requirements] = Requirements(diffusion="images", more_statistics=False)
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"components", "score"})
    test_arguments: ClassVar[Mapping[str, Any]] = {"steps": 3}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"steps": 10, "clamp": False, "components": 100, "score": "six"},
        "released": {"steps": 10, "clamp": True, "components": 100, "score": "six"},
        "paper-1d": {"steps": 10, "clamp": False, "score": "curvature"},
    }
    diffusion: DiffusionModel | None = None

    def __init__(
        self,
        *,
        steps: int = 10,
        clamp: bool = True,
        components: int = 10,
        score: Literal["six", "curvature", "rate"] = "six",
    ) -> None:
        check_literals(self)
        if steps < 2 or components < 1:
            raise FaroutError(f"steps must be at least 2, components at least 1, got {steps} and {components}")
        self.mixture: GaussianMixture | None = None
        self.kernels: dict[str, KernelDensity] = {}

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Reject more steps than the schedule has."""
        assert diffusion is not None
        levels, steps = diffusion.schedule.num_levels, self.config["steps"]
        if steps >= levels:
            raise FaroutError(f"steps must be 2 to {levels - 1}, one less than the schedule's levels, got {steps}")

    def prepare_networks(self) -> None:
        """Build the path and the denoiser."""
        model = self.diffusion
        if model is None:
            raise FaroutError("DiffPath requires a diffusion model")
        steps, last = int(self.config["steps"]), model.schedule.num_levels
        # The last step ends at the schedule's largest sigma, where the network is not evaluated.
        levels = [*(last * step // steps for step in range(steps)), last - 1]
        self.path = model.schedule.sigma_of(torch.tensor(levels)).float().to(model.device)
        self.network: NetworkDenoiser = model.denoiser(self.runtime.batch_size, self.precision, self.backend)
        self.denoiser = model.clamp_x0(self.network) if self.config["clamp"] else self.network

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.network.evaluations

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `rate` and `curvature`, each (B, 3): means of the first three powers of eps and of its derivative."""
        assert self.diffusion is not None
        n, count = int(self.config["steps"]), len(batch.keys)
        x = self.diffusion.encode(batch.images)
        rate, curvature = torch.zeros(2, count, 3, dtype=torch.float64)
        previous: list[Tensor] = []

        def accumulate(evaluation: Evaluation) -> None:
            eps = (evaluation.x - evaluation.x0) / expand_dims(evaluation.sigma, evaluation.x)
            rate.add_(_mean_powers(eps) / n)
            if previous:
                derivative = n * (eps - previous.pop())  # eq. 10
                curvature.add_(_mean_powers(derivative) / (n - 1))
            previous.append(eps)

        DDIM()(self.denoiser, x, self.path.expand(count, -1), callback=accumulate)
        return Measurements(batch.keys, vectors={"rate": rate.float(), "curvature": curvature.float()})

    def _statistics(self, measurements: Measurements) -> dict[str, np.ndarray]:
        """`six` (B, 6), and `curvature` and `rate` (B, 1), the roots of the means of squares; float64."""
        rate, curvature = (measurements.vectors[name].double() for name in ("rate", "curvature"))
        return {
            "six": torch.cat([rate, curvature], dim=1).numpy(),
            "curvature": curvature[:, 1:2].sqrt().numpy(),
            "rate": rate[:, 1:2].sqrt().numpy(),
        }

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit the densities of the statistics of normal images."""
        statistics = self._statistics(measurements)
        self.mixture = GaussianMixture.fit(statistics["six"], seed=self.seed, max_components=self.config["components"])
        self.kernels = {name: KernelDensity.fit(statistics[name]) for name in ("curvature", "rate")}

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`six`, `curvature` and `rate`."""
        assert self.mixture is not None
        statistics = self._statistics(measurements)
        return {
            "six": torch.from_numpy(self.mixture.score(statistics["six"])),
            "curvature": torch.from_numpy(self.kernels["curvature"].score(statistics["curvature"])),
            "rate": torch.from_numpy(self.kernels["rate"].score(statistics["rate"])),
        }

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted densities."""
        return {} if self.mixture is None else pack_arrays({"six": self.mixture, **self.kernels})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted densities."""
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "six"))
        self.kernels = {name: KernelDensity.from_arrays(unpack_arrays(state, name)) for name in ("curvature", "rate")}


def _mean_powers(values: Tensor) -> Tensor:
    """(B, …) -> means of the first, second and third powers of each row, (B, 3) float64 on the CPU."""
    flat = in_float64(values).flatten(1)
    return torch.stack([flat.mean(1), flat.square().mean(1), flat.pow(3).mean(1)], dim=1).cpu()
