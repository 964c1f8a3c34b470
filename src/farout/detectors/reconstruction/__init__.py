"""Noise to many levels, denoise, compare with the input (Graham et al. 2023)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core.errors import FaroutError, TrapWarning
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.reconstruction import indicators
from farout.detectors.reconstruction.comparison import METRICS, Comparison
from farout.detectors.reconstruction.noise_levels import Plan, make_plan
from farout.detectors.settings import check_words
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import noise_table
from farout.diffusion.solvers.base import Evaluation
from farout.features.perceptual import PerceptualName, perceptual_distance

__all__ = ["Reconstruction"]


class Reconstruction(Detector):
    """Error between an image and its reconstructions by diffusion.

    Each image is noised to several levels t and denoised; every reconstruction is compared with the image. With the
    statistics images' mean and deviation of every (level, metric), `mean_z` is the mean over levels of
    z_mse + z_perceptual: the score of Graham, Pinaya, Tudosiu, Nachev, Ourselin and Cardoso, "Denoising diffusion
    models for out-of-distribution detection" (CVPRW 2023, arXiv 2211.07740), section 3.

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
        score: indicator used as score: `mean_z` (the paper's), `two_sided` (mean of |z|), `mahalanobis` or `mixture`
            (of log-metrics), or `mean_z_<metric>`.
        min_t: use only levels above this t.
        max_t: use only levels below this t.
        t_skip: use every t_skip-th of the remaining levels.
        normalisation: value range of a network trained in this fit: `fixed` (images in [-1, 1]) or `minmax` (each image
            in [0, 1], the paper).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    makes_maps: ClassVar[bool] = True
    statistics_minimum: ClassVar[int] = 400
    statistics_suffice: ClassVar[bool] = True
    diffusion: DiffusionModel | None = None
    choices: ClassVar[frozenset[str]] = frozenset({"metrics", "density_metrics", "score", "min_t", "max_t", "t_skip"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "mode": "exact",
            "skip": 16,
            "draws": 1,
            "noise": "image",
            "perceptual": "lpips",
            "metrics": ("mse", "perceptual"),
            "score": "mean_z",
            "normalisation": "minmax",
        },
        "exact": {"mode": "exact", "skip": 16, "draws": 1, "score": "mean_z"},
        "fast": {"mode": "fast", "draws": 1, "score": "mean_z"},
        "oneshot": {"mode": "oneshot", "draws": 2},
    }

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
        score: str = "mahalanobis",
        min_t: int = -1,
        max_t: int = 1000,
        t_skip: int = 1,
        normalisation: Literal["fixed", "minmax"] = "fixed",
    ) -> None:
        check_words(self)
        unknown = sorted({*metrics, *density_metrics} - set(METRICS))
        if unknown or not metrics or not density_metrics:
            raise FaroutError(f"metrics are chosen among {', '.join(METRICS)}; got {unknown or 'none'}")
        if draws < 1 or steps < 1 or skip < 1 or t_skip < 1:
            raise FaroutError(
                f"draws, steps, skip and t_skip must be at least 1, got {draws}, {steps}, {skip}, {t_skip}"
            )
        if score not in indicators.names():
            raise FaroutError(f"there is no score {score!r}; expected one of {', '.join(indicators.names())}")
        if mode != "exact" or levels is not None:
            self._refuse_idle("but on the paper's grid; give mode exact without levels", "skip", "grid")
        if mode != "fast":
            self._refuse_idle(f"in the mode {mode}; give mode fast", "steps", "solver")
        self.perceptual, self.draws = perceptual, draws
        self.scorer = indicators.Scorer(metrics, density_metrics, min_t, max_t, t_skip)
        self.plan: Plan | None = None
        self.error_mean: Tensor | None = None
        self.error_square: Tensor | None = None
        self.watched = 0

    @classmethod
    def tiny(cls, resources: Any) -> Reconstruction:
        """Two levels, one evaluation each."""
        return cls(levels=(50, 200), draws=2)

    # -- measuring -----------------------------------------------------------------------------------------------

    def network_config(self, config: DiffusionConfig) -> DiffusionConfig:
        """With the value range that the method wants."""
        if self.config["normalisation"] != "minmax":
            return config
        return replace(config, value_range="minmax", data_range="unit")

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Refuses levels that the schedule cannot have, and a perceptual distance that is not installed; warns of a
        diffusion model of another value range.
        """
        assert diffusion is not None
        self.scorer.check_levels(self._make_plan(diffusion).levels)
        perceptual_distance(self.perceptual)
        wanted, own = self.config["normalisation"], diffusion.preprocessing.value_range
        if wanted != own:
            message = f"the method requires value range {wanted!r}, the diffusion model has {own!r}; its own is used"
            warnings.warn(message, TrapWarning, stacklevel=5)

    def _make_plan(self, model: DiffusionModel) -> Plan:
        names = ("mode", "levels", "skip", "grid", "steps", "solver")
        return make_plan(model.schedule, **{name: self.config[name] for name in names})

    def prepare(self) -> None:
        """Builds the paths of all levels, the denoiser, the noise and the metrics' network."""
        model = self.diffusion
        if model is None:
            raise FaroutError("Reconstruction requires a diffusion model")
        self.plan = self._make_plan(model)
        self.scorer.check_levels(self.plan.levels)
        self.denoiser: NetworkDenoiser = model.denoiser(self.runtime.batch_size, self.precision)
        self.comparison = Comparison(self.perceptual, self.runtime.batch_size, model.device)
        self.shared: Tensor | None = None

    def _noise(self, keys: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """(B, levels, draws, C, H, W); in `oneshot`, every second draw mirrors the one before."""
        assert self.plan is not None
        kind, antithetic = self.config["noise"], self.config["mode"] == "oneshot"
        how = (shape, self.seed, self.plan.levels, self.draws)
        if kind == "image":
            return noise_table(kind, keys, *how, antithetic=antithetic)
        if self.shared is None:
            self.shared = noise_table(kind, ("",), *how, antithetic=antithetic)
        return self.shared.expand(len(keys), *self.shared.shape[1:])

    @property
    def rows_per_image(self) -> int:
        """Levels times draws."""
        return (len(self.plan.levels) if self.plan is not None else 1) * self.draws

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has evaluated."""
        return self.denoiser.evaluations

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Metrics of every level and draw: values (B, level, draw, metric).

        With `maps`: the mean over levels of standardised squared errors (B, H, W), and the pictures `_errors`
        (B, level, H, W) and `reconstruction` (B, C, H, W), of the middle level.
        """
        assert self.plan is not None
        assert self.diffusion is not None
        count, levels = len(batch.keys), len(self.plan.levels)
        shape = (count, levels, self.draws)
        images = batch.images.to(self.diffusion.device)
        if not count:
            empty = torch.empty(*shape, len(METRICS))
            return Measurements((), empty, tuple(float(t) for t in self.plan.levels), METRICS)
        noise = self._noise(batch.identities, self.diffusion.shape).flatten(0, 2).to(images.device)
        restored, predicted = self._restore(images, noise)
        flat = self.comparison(images, restored, predicted, noise)
        measured = Measurements(
            batch.keys, flat.reshape(*shape, -1).cpu(), tuple(float(t) for t in self.plan.levels), METRICS
        )
        if maps:
            self._add_maps(measured, images, restored.reshape(*shape, *restored.shape[1:]))
        return measured

    def _restore(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (B * levels * draws, C, H, W) in [0, 1], and the noise predicted at the starts."""
        assert self.plan is not None
        assert self.diffusion is not None
        per_image = len(noise) // len(images)
        sigmas = self.plan.paths.repeat_interleave(self.draws, 0).repeat(len(images), 1).to(images.device)
        x0 = self.diffusion.encode(images).repeat_interleave(per_image, 0)
        x = x0 + sigmas[:, 0].reshape(-1, *[1] * (x0.ndim - 1)) * noise
        first: list[Tensor] = []

        def keep(evaluation: Evaluation) -> None:
            if evaluation.index == 0:
                sigma = evaluation.sigma.reshape(-1, *[1] * (x0.ndim - 1))
                first.append((evaluation.x - evaluation.x0) / sigma)

        end = self.plan.solver(self.denoiser, x, sigmas, callback=keep)
        return self.diffusion.decode(end * self.plan.final_scale), first[0]

    def _add_maps(self, measured: Measurements, images: Tensor, restored: Tensor) -> None:
        errors = (restored - images[:, None, None]).square().mean((2, 3)).cpu()
        measured.pictures = {"_errors": errors, "reconstruction": restored[:, restored.shape[1] // 2, 0].cpu()}
        measured.maps = errors.mean(1)
        if self.error_mean is not None and self.error_square is not None:
            deviation = (self.error_square - self.error_mean**2).clamp(min=1e-12).sqrt()
            # a border that never errs has no scale of its own; a share of the map's keeps it from dominating
            deviation = deviation + 0.1 * deviation.mean((1, 2), keepdim=True)
            measured.maps = ((errors - self.error_mean) / deviation).mean(1)

    def begin(self) -> None:
        """Forgets the error maps of an earlier fit."""
        self.error_mean, self.error_square, self.watched = None, None, 0

    def watch(self, measurements: Measurements) -> None:
        """Running mean and mean square of the error maps (level, H, W)."""
        errors = measurements.pictures["_errors"].double()
        total = self.watched + len(errors)
        mean = errors.sum(0) if self.error_mean is None else self.error_mean * self.watched + errors.sum(0)
        square = errors.square().sum(0)
        square = square if self.error_square is None else self.error_square * self.watched + square
        self.error_mean, self.error_square, self.watched = mean / total, square / total, total

    # -- scoring -------------------------------------------------------------------------------------------------

    def fit_statistics(self, measurements: Measurements) -> None:
        """z statistics of every (level, metric) and densities of log-metrics."""
        self.scorer.fit(measurements, self.seed)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`mean_z`, `two_sided`, `mahalanobis`, `mixture`, and `mean_z_<metric>` for every metric measured."""
        return self.scorer(measurements)

    def curves(self, measurements: Measurements) -> Tensor:
        """z against level: (B, level, metric), draws averaged."""
        return self.scorer.curves(measurements)

    def state(self) -> dict[str, np.ndarray]:
        """The scorer's arrays and the error maps' statistics."""
        arrays = self.scorer.to_arrays()
        if self.error_mean is not None and self.error_square is not None:
            arrays["error_mean"] = self.error_mean.numpy()
            arrays["error_square"] = self.error_square.numpy()
        return arrays

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        arrays = dict(state)
        for name in ("error_mean", "error_square"):
            setattr(self, name, torch.as_tensor(arrays.pop(name)) if name in arrays else None)
        self.scorer.restore(arrays)
