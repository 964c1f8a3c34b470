"""Noise an image to many levels, denoise it, and compare the reconstructions with it (Graham et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.argument_checks import check_literals
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import HeatMaps, Requirements
from farout.detectors.reconstruction.denoising_paths import DenoisingPaths, build_denoising_paths
from farout.detectors.reconstruction.difficulty import (
    IMAGE_STATISTICS,
    AdjustedErrors,
    compute_image_statistics,
    one_sided_evidence,
)
from farout.detectors.reconstruction.metrics import METRICS, compute_metrics
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import noise_table
from farout.diffusion.solvers.base import Evaluation
from farout.features.densities import (
    FittedStatistics,
    GaussianMixture,
    Mahalanobis,
    ZScore,
    pack_arrays,
    unpack_arrays,
)
from farout.features.perceptual import PerceptualName, perceptual_distance

if TYPE_CHECKING:  # importing classifiers takes seconds, and the method uses none
    from farout.classifiers.model import Classifier

__all__ = ["Reconstruction"]

_INDICATORS = (
    "combined",
    "adjusted_error",
    "mean_z",
    "two_sided",
    "mahalanobis",
    "mixture",
    *(f"mean_z_{metric}" for metric in METRICS),
)


class Reconstruction(Detector):
    """Error between an image and its reconstructions by diffusion.

    Graham, Pinaya, Tudosiu, Nachev, Ourselin and Cardoso, "Denoising diffusion models for out-of-distribution
    detection" (CVPRW 2023, arXiv 2211.07740), section 3. An image x0 is noised to several levels t,
    x_t = x0 + sigma_t eps, and denoised to a reconstruction x0hat_t. With m_t a metric between x0 and x0hat_t, averaged
    over noise samples, and z(m_t) standardized by the mean and deviation of the statistics images,

        mean_z      = mean over t of z(mse_t) + z(perceptual_t)     (section 3.3; the paper's score)
        two_sided   = mean over t and metrics of |z(m_t)|
        mahalanobis, mixture = negative log densities of log m_t, all levels and `density_metrics` together
        adjusted_error = mean over t of the residual of log mse_t after a regression on statistics of the image
            (see `farout.detectors.reconstruction.difficulty`), standardized
        combined    = -log p(adjusted_error) - log p(distance), Fisher's combination of two one-sided p-values.

    All but the first are ours. Images with little contrast are reconstructed better than normal ones, so that a low
    error can be anomalous too: the densities are two-sided. But a density of many values hardly detects images whose
    errors are all slightly too large, such as flipped ones; the adjusted error does. `distance` is the logarithm of the
    Mahalanobis distance of log m_t and the image statistics together; p is a tail probability of the normal
    distribution with the mean and deviation of the statistics images.

    Args:
        mode: `oneshot`: one evaluation per level and draw; `fast`: a solver with few steps; `exact`: PLMS as in the
            paper, down to the schedule's lowest level.
        levels: noise levels t; default: those of the mode (`exact`: the paper's grid with `skip`).
        skip: use every skip-th start level of the paper's grid of 100 (`exact` without `levels`).
        grid: start levels of that grid: `paper` (1, 11, …, 991) or `released` (10, 20, …, 990, as in the released
            code).
        draws: noise samples per level; in `oneshot` every second one is the negative of the one before (antithetic).
        noise: `shared`: the same noise for all images; `image`: noise per image, as in the paper.
        steps: number of solver steps per level in mode `fast`; low levels use fewer (one per 40 levels, at least 1).
        solver: solver of mode `fast`.
        perceptual: perceptual distance: `lite0` (built in) or `lpips` (the paper's).
        metrics: metrics whose z-scores are averaged: mse, perceptual, ssim (1 - SSIM), eps_error (error of the
            predicted noise), score_norm (mean square of the predicted noise).
        density_metrics: metrics whose logarithms `mahalanobis` and `mixture` use.
        score: indicator used as score: `combined`, `adjusted_error`, `mean_z` (the paper's), `two_sided` (mean of
            |z|), `mahalanobis` or `mixture` (of log-metrics), or `mean_z_<metric>`.
        min_t: use only levels above this t.
        max_t: use only levels below this t.
        t_skip: use every t_skip-th of the remaining levels.
        scaling: scaling of the images of a network trained in this fit: `fixed` ([-1, 1]) or `minmax` (each image
            in [0, 1], the paper).
    """

    requirements: ClassVar[Requirements] = Requirements(diffusion="images", statistics=400, more_statistics=False)
    heat_maps: ClassVar[HeatMaps] = HeatMaps()
    scoring_arguments: ClassVar[frozenset[str]] = frozenset(
        {"metrics", "density_metrics", "score", "min_t", "max_t", "t_skip"}
    )
    test_arguments: ClassVar[Mapping[str, Any]] = {"levels": (50, 200), "draws": 2}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "mode": "exact",
            "skip": 16,
            "draws": 1,
            "noise": "image",
            "perceptual": "lpips",
            "metrics": ("mse", "perceptual"),
            "score": "mean_z",
            "scaling": "minmax",
        },
        "exact": {"mode": "exact", "skip": 16, "draws": 1, "score": "mean_z"},
        "fast": {"mode": "fast", "draws": 1, "score": "mean_z"},
        "oneshot": {"mode": "oneshot", "draws": 2},
    }

    diffusion: DiffusionModel | None = None

    def __init__(
        self,
        *,
        mode: Literal["oneshot", "fast", "exact"] = "oneshot",
        levels: tuple[int, ...] | None = None,
        skip: int = 16,
        grid: Literal["paper", "released"] = "paper",
        draws: int = 2,
        noise: Literal["shared", "image"] = "shared",
        steps: int = 5,
        solver: Literal["dpm_solver_2m", "ddim", "heun"] = "dpm_solver_2m",
        perceptual: PerceptualName = "lite0",
        metrics: tuple[str, ...] = ("mse", "perceptual"),
        density_metrics: tuple[str, ...] = ("mse", "perceptual", "eps_error", "score_norm"),
        score: str = "combined",
        min_t: int = -1,
        max_t: int = 1000,
        t_skip: int = 1,
        scaling: Literal["fixed", "minmax"] = "fixed",
    ) -> None:
        check_literals(self)
        unknown = sorted({*metrics, *density_metrics} - set(METRICS))
        if unknown or not metrics or not density_metrics:
            raise FaroutError(f"metrics are chosen among {', '.join(METRICS)}; got {unknown or 'none'}")
        if min(draws, steps, skip, t_skip) < 1:
            raise FaroutError(
                f"draws, steps, skip and t_skip must be at least 1, got {draws}, {steps}, {skip}, {t_skip}"
            )
        if score not in _INDICATORS:
            raise FaroutError(f"there is no score {score!r}; expected one of {', '.join(_INDICATORS)}")
        if mode != "exact" or levels is not None:
            self._check_unused("in mode exact without levels", "skip", "grid")
        if mode != "fast":
            self._check_unused("in mode fast", "steps", "solver")
        self.draws = draws
        self.z: ZScore | None = None
        self.mahalanobis: Mahalanobis | None = None
        self.mixture: GaussianMixture | None = None
        self.adjustment: AdjustedErrors | None = None
        self.distance_with_statistics: Mahalanobis | None = None
        self.evidence: ZScore | None = None  # of the adjusted error and the log distance, before they are combined
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Discard the error maps of an earlier fit."""
        self.error_count = 0
        self.error_mean: Tensor | None = None  # of the squared-error maps of normal images, (level, H, W)
        self.error_square: Tensor | None = None

    def configure_diffusion(self, config: DiffusionConfig) -> DiffusionConfig:
        """Set the scaling and the data range that `scaling` requires."""
        if self.config["scaling"] == "minmax":
            return replace(config, scaling="minmax", data_range="unit")
        return config

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Reject levels that the schedule lacks and a perceptual distance that is not installed.

        Warns of a diffusion model with another scaling.
        """
        assert diffusion is not None
        self._check_scored_levels(self._build_paths(diffusion).levels)
        perceptual_distance(self.config["perceptual"])
        scaling, own = self.config["scaling"], diffusion.preprocessing.scaling
        if scaling != own:
            message = f"scaling is {scaling!r}, but the diffusion model has {own!r}, which is used"
            warnings.warn(message, MisleadingResultWarning, stacklevel=5)

    def _build_paths(self, model: DiffusionModel) -> DenoisingPaths:
        names = ("mode", "levels", "skip", "grid", "steps", "solver")
        return build_denoising_paths(model.schedule, **{name: self.config[name] for name in names})

    def prepare_networks(self) -> None:
        """Build the paths of all levels, the denoiser and the perceptual distance."""
        model = self.diffusion
        if model is None:
            raise FaroutError("Reconstruction requires a diffusion model")
        self.paths = self._build_paths(model)
        self._check_scored_levels(self.paths.levels)
        self.denoiser: NetworkDenoiser = model.denoiser(self.runtime.batch_size, self.precision, self.backend)
        self.distance = perceptual_distance(self.config["perceptual"])
        self.distance.to(model.device)
        self.shared_noise: Tensor | None = None

    @property
    def rows_per_image(self) -> int:
        """Levels times draws."""
        return len(self.paths.levels) * self.draws

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.denoiser.evaluations

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """The metrics and image statistics at every level and draw: values (B, level, draw, metric).

        With `maps`: the mean over levels of the standardized squared errors (B, H, W), and the picture
        `reconstruction` (B, C, H, W) of the middle level.
        """
        measurements, reconstructions = self._measure(batch)
        if not maps:
            return measurements
        heat = self._squared_errors(batch, reconstructions)
        if self.error_mean is not None and self.error_square is not None:
            deviation = (self.error_square - self.error_mean**2).clamp(min=1e-12).sqrt()
            # Positions without errors, such as a constant border, have no scale of their own: a share of the map's mean
            # deviation keeps them from dominating.
            deviation = deviation + 0.1 * deviation.mean((1, 2), keepdim=True)
            heat = (heat - self.error_mean) / deviation
        middle = reconstructions[:, reconstructions.shape[1] // 2, 0].cpu()
        return replace(measurements, maps=heat.mean(1), pictures={"reconstruction": middle})

    def measure_statistics(self, batch: Batch) -> Measurements:
        """Also update the mean and mean square of the squared-error maps of normal images."""
        measurements, reconstructions = self._measure(batch)
        errors = self._squared_errors(batch, reconstructions).double()
        count = self.error_count + len(errors)
        mean = 0.0 if self.error_mean is None else self.error_mean * self.error_count
        square = 0.0 if self.error_square is None else self.error_square * self.error_count
        self.error_mean, self.error_square = (mean + errors.sum(0)) / count, (square + errors.square().sum(0)) / count
        self.error_count = count
        return measurements

    @torch.no_grad()
    def _measure(self, batch: Batch) -> tuple[Measurements, Tensor]:
        """Measurements, and reconstructions (B, level, draw, C, H, W) in [0, 1]."""
        model, paths = self.diffusion, self.paths
        assert model is not None
        grid = (len(batch.keys), len(paths.levels), self.draws)
        images = batch.images.to(model.device)
        noise = self._noise(batch.identities, model.shape).flatten(0, 2).to(model.device)

        # Every image, level and draw is one row of the batch: x_t = x0 + sigma_t eps.
        x0 = model.encode(images).repeat_interleave(len(paths.levels) * self.draws, 0)
        sigmas = paths.sigmas.repeat_interleave(self.draws, 0).repeat(len(images), 1).to(model.device)
        x_t = x0 + expand_dims(sigmas[:, 0], x0) * noise

        predicted_noise = torch.empty_like(noise)

        def keep_first_prediction(evaluation: Evaluation) -> None:
            if evaluation.index == 0:
                predicted_noise.copy_((evaluation.x - evaluation.x0) / expand_dims(evaluation.sigma, x0))

        x0hat = paths.solver(self.denoiser, x_t, sigmas, callback=keep_first_prediction)
        reconstructions = model.decode(x0hat * paths.final_scale)
        values = compute_metrics(
            images, reconstructions, predicted_noise, noise, self.distance, self.runtime.batch_size
        )
        low, high = (-1.0, 1.0) if model.x0_range is None else model.x0_range
        statistics = compute_image_statistics(images, paths.sigmas[:, 0] / (high - low))
        values = torch.cat([values.reshape(*grid, -1).cpu(), statistics[:, :, None].expand(*grid, -1)], dim=3)
        levels = tuple(float(t) for t in paths.levels)
        measurements = Measurements(batch.keys, values, levels, (*METRICS, *IMAGE_STATISTICS))
        return measurements, reconstructions.reshape(*grid, *reconstructions.shape[1:])

    def _noise(self, identities: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """(B, level, draw, C, H, W); in mode `oneshot`, every second draw is the negative of the one before."""
        antithetic, levels = self.config["mode"] == "oneshot", self.paths.levels
        if self.config["noise"] == "image":
            return noise_table("image", identities, shape, self.seed, levels, self.draws, antithetic=antithetic)
        if self.shared_noise is None:
            self.shared_noise = noise_table(
                "shared", ("",), shape, self.seed, levels, self.draws, antithetic=antithetic
            )
        return self.shared_noise.expand(len(identities), *self.shared_noise.shape[1:])

    @staticmethod
    def _squared_errors(batch: Batch, reconstructions: Tensor) -> Tensor:
        """Maps (B, level, H, W) on the CPU, mean over draws and channels."""
        images = batch.images.to(reconstructions.device)[:, None, None]
        return (reconstructions - images).square().mean((2, 3)).cpu()

    def _scored_level_indices(self, levels: tuple[float, ...]) -> list[int]:
        """Indices of the levels that count in the scores."""
        min_t, max_t, t_skip = (self.config[name] for name in ("min_t", "max_t", "t_skip"))
        return [index for index, t in enumerate(levels) if min_t < t < max_t][::t_skip]

    def _check_scored_levels(self, levels: tuple[float, ...]) -> None:
        """Raise FaroutError if no level counts in the scores."""
        if not self._scored_level_indices(levels):
            given = ", ".join(f"{name}={self.config[name]}" for name in ("min_t", "max_t", "t_skip"))
            raise FaroutError(f"{given} leave none of the levels {list(levels)}")

    def _metrics(self, measurements: Measurements) -> np.ndarray:
        """m_t: (B, level, metric) float64, draws averaged, for the levels that count in the scores."""
        assert measurements.values is not None
        values = measurements.values[..., : len(METRICS)]
        return values[:, self._scored_level_indices(measurements.levels)].double().mean(2).numpy()

    def _image_statistics(self, measurements: Measurements) -> np.ndarray | None:
        """The linear error at every level that counts, then the other image statistics: (B, level + 5) float64.

        None for measurements of earlier versions, which do not have them.
        """
        assert measurements.values is not None
        if len(measurements.metrics) == len(METRICS):
            return None
        values = measurements.values[:, self._scored_level_indices(measurements.levels), 0, len(METRICS) :]
        return torch.cat([values[:, :, 0], values[:, 0, 1:]], dim=1).double().numpy()

    def _log_metrics(self, metrics: np.ndarray) -> np.ndarray:
        """log m_t: (B, level * density metric)."""
        chosen = metrics[..., [METRICS.index(metric) for metric in self.config["density_metrics"]]]
        # A perfect reconstruction has no logarithm; 1e-12 is far below the resolution of float32 pixels.
        return np.log(np.maximum(chosen, 1e-12)).reshape(len(metrics), -1)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit mean and deviation of every (level, metric), and the densities of log metrics."""
        metrics = self._metrics(measurements)
        self.z = ZScore.fit(metrics.reshape(len(metrics), -1))
        self.mahalanobis = Mahalanobis.fit(self._log_metrics(metrics))
        self.mixture = GaussianMixture.fit(self._log_metrics(metrics), seed=self.seed)
        statistics = self._image_statistics(measurements)
        if statistics is None:
            if self.config["score"] in ("combined", "adjusted_error"):
                raise FaroutError(
                    f"score {self.config['score']!r} requires image statistics, which measurements of earlier versions "
                    "do not have; fit the detector again, or choose another score"
                )
            return
        self.adjustment = AdjustedErrors.fit(statistics, self._log_mse(metrics))
        self.distance_with_statistics = Mahalanobis.fit(self._log_metrics_and_statistics(metrics, statistics))
        self.evidence = ZScore.fit(self._evidence(metrics, statistics))

    @staticmethod
    def _log_mse(metrics: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(metrics[..., METRICS.index("mse")], 1e-12))

    def _log_metrics_and_statistics(self, metrics: np.ndarray, statistics: np.ndarray) -> np.ndarray:
        return np.concatenate([self._log_metrics(metrics), statistics], axis=1)

    def _evidence(self, metrics: np.ndarray, statistics: np.ndarray) -> np.ndarray:
        """The adjusted error and the logarithm of the distance: (B, 2)."""
        assert self.adjustment is not None
        assert self.distance_with_statistics is not None
        adjusted = self.adjustment.transform(statistics, self._log_mse(metrics)).mean(1)
        distance = self.distance_with_statistics.score(self._log_metrics_and_statistics(metrics, statistics))
        return np.stack([adjusted, np.log(np.maximum(distance, 1e-12))], axis=1)

    def compute_z(self, measurements: Measurements) -> Tensor:
        """z(m_t): (B, level, metric) float64, for the levels that count in the scores."""
        if self.z is None:
            raise FaroutError("the statistics have not been fitted; call fit first")
        metrics = self._metrics(measurements)
        return torch.from_numpy(self.z.transform(metrics.reshape(len(metrics), -1)).reshape(metrics.shape))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """All indicators; `combined` and `adjusted_error` only if the detector was fitted with image statistics."""
        assert self.mahalanobis is not None
        assert self.mixture is not None
        metrics, statistics = self._metrics(measurements), self._image_statistics(measurements)
        z, log_metrics = self.compute_z(measurements), self._log_metrics(metrics)
        chosen = z[..., [METRICS.index(metric) for metric in self.config["metrics"]]]
        adjusted: dict[str, Tensor] = {}
        if self.evidence is not None and statistics is not None:
            evidence = torch.from_numpy(self.evidence.transform(self._evidence(metrics, statistics)))
            adjusted = {"combined": one_sided_evidence(evidence).sum(1), "adjusted_error": evidence[:, 0]}
        return {
            **adjusted,
            "mean_z": chosen.sum(2).mean(1),  # section 3.3
            "two_sided": chosen.abs().mean((1, 2)),
            "mahalanobis": torch.from_numpy(self.mahalanobis.score(log_metrics)),
            "mixture": torch.from_numpy(self.mixture.score(log_metrics)),
            **{f"mean_z_{metric}": z[..., column].mean(1) for column, metric in enumerate(METRICS)},
        }

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted statistics, and mean and mean square of the error maps."""
        fitted: dict[str, FittedStatistics | None] = {
            "z": self.z,
            "mahalanobis": self.mahalanobis,
            "mixture": self.mixture,
            "adjustment": self.adjustment,
            "distance_with_statistics": self.distance_with_statistics,
            "evidence": self.evidence,
        }
        state = pack_arrays({name: part for name, part in fitted.items() if part is not None})
        if self.error_mean is not None and self.error_square is not None:
            state |= {"error_mean": self.error_mean.numpy(), "error_square": self.error_square.numpy()}
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the arrays of `get_state`."""
        self.z = ZScore.from_arrays(unpack_arrays(state, "z"))
        self.mahalanobis = Mahalanobis.from_arrays(unpack_arrays(state, "mahalanobis"))
        self.mixture = GaussianMixture.from_arrays(unpack_arrays(state, "mixture"))
        if unpack_arrays(state, "evidence"):  # detectors of earlier versions do not have it
            self.adjustment = AdjustedErrors.from_arrays(unpack_arrays(state, "adjustment"))
            self.distance_with_statistics = Mahalanobis.from_arrays(unpack_arrays(state, "distance_with_statistics"))
            self.evidence = ZScore.from_arrays(unpack_arrays(state, "evidence"))
        if "error_mean" in state:
            self.error_mean = torch.as_tensor(state["error_mean"])
            self.error_square = torch.as_tensor(state["error_square"])
