"""Noise the features of several layers a little, denoise them, and compare (Yang et al. 2024); minutes on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.declarations import Requirements
from farout.detectors.feature_detector import FeatureDetector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.results import Measurements
from farout.detectors.semantic.sampling import Sampler, check_sampler, reconstruct, shared_step_noise
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import LevelSampling
from farout.diffusion.noise import NoiseKind, noise_table
from farout.features.densities import Mahalanobis, ZScore, pack_arrays, unpack_arrays
from farout.features.encoding import FeatureEncoding, Standardize
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.features.train import train_features
from farout.training.config import TrainingConfig

__all__ = ["Semantic"]

_INDICATORS = ("mse", "mfsim", "mfsim_released", "lr", "calibrated_mse", "calibrated_mfsim", "distance", "fused")


class Semantic(FeatureDetector):
    """Error between an image's features and their reconstructions by diffusion.

    Pooled features of several layers of a frozen backbone, standardized layer by layer, are noised a little and
    denoised by a small residual network that predicts the clean vector; features like those of normal images are
    reconstructed. Yang, Cheng, Fang, Wang, Jiao, Cheng, Wang and Gao, "Diffusion-based layer-wise semantic
    reconstruction for unsupervised out-of-distribution detection" (NeurIPS 2024, arXiv 2411.10701).

    With x0 the encoded features, x0hat their reconstruction, and for each layer g of width w_g the mean squared error
    e_g and c_g = 1 - cos(x0_g, x0hat_g), averaged over levels and draws:

        mse   = sum_g w_g e_g / sum_g w_g         (section 3.4)
        mfsim = mean_g c_g - 1                    (section 3.4); `mfsim_released` without the first layer, as released
        lr    = sign (mse of the denoiser after the first epoch - mse)
        calibrated_mse, calibrated_mfsim = mean over levels and layers of z(log e_g) and of z(log c_g)
        distance = Mahalanobis distance of x0 to the training images
        fused    = mean of z(log mse), z(calibrated_mse) and z(log distance),

    z standardized by the statistics images. `calibrated_…`, `distance` and `fused` are ours.

    Args:
        levels: noise levels t, 0 to 99, to which features are noised; several are measured in one batch.
        draws: noise samples per level; every second one is the negative of the one before (antithetic).
        noise: `shared`: the same noise for all images; `image`: noise per image, as published. Noise that a sampler
            adds is always shared.
        sampler: `oneshot` (one evaluation), `ddim` (several steps) or `released` (the arithmetic of the released code,
            with the level as its K).
        steps: number of steps of `ddim`.
        eta: share of fresh noise in the steps of `ddim`: 0 is deterministic, 1 as published.
        score: indicator used as score: `mfsim_released` (without the first layer; highest AUROC on changed training
            images), `mfsim` or `mse` (the paper's), `lr`, `calibrated_mse`, `calibrated_mfsim`, `distance` (no
            diffusion) or `fused`.
        lr_sign: sign of the indicator `lr`: 1: errors that fall more in training score higher, as released; -1: they
            score lower, as in the paper. Neither is reliable.
        regret: keep the denoiser of the first training epoch too, for the indicator `lr` only; doubles the evaluations.
        standardize: `image`: scale each layer of each image to mean 0 and standard deviation 1 over channels (the
            paper); `channel`: scale each channel over normal images.
        summaries: append the mean and log standard deviation of each layer, which `image` scaling removes.
        hidden: width of the denoiser's hidden layers; None: twice the number of features, as in the paper.
        bottleneck: width of the denoiser's bottleneck; None: twice the number of features, as in the paper.
        embedding: width of the denoiser's time embedding; None: the number of features, as in the paper.
        blocks: number of residual blocks of the denoiser (16 in the paper).
        input_activation: apply SiLU to the noisy features, as in the released code.
        scale_shift: let the time embedding scale the features of each block, in addition to shifting them.
        time_sampling: distribution of t in training: `uniform` (the paper), `low_noise` (more low t) or `antithetic`
            (mirrored pairs).
        updates: number of training updates.
        epochs: passes over the training images, instead of `updates`; default: use `updates`.
        batch: images per update.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        decay: learning-rate schedule: `constant` (the paper) or `cosine`.
        ema: decay of the moving average of the weights.
    """

    requirements: ClassVar[Requirements] = Requirements(
        diffusion="features", backbone=True, statistics=200, more_statistics=False
    )
    baselines: ClassVar[tuple[str, ...]] = ("mahalanobis", "knn", "pca", "gmm", "autoencoder")
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"score", "lr_sign"})
    test_arguments: ClassVar[Mapping[str, Any]] = {
        "size": 32,
        "hidden": 64,
        "bottleneck": 64,
        "embedding": 32,
        "blocks": 2,
        "updates": 8,
        "batch": 16,
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "backbone": "b4",
            "levels": (3,),
            "draws": 1,
            "noise": "image",
            "sampler": "ddim",
            "steps": 3,
            "score": "mfsim",
            "regret": True,
            "hidden": None,
            "bottleneck": None,
            "embedding": None,
            "blocks": 16,
            "epochs": 150,
            "batch": 128,
            "learning_rate": 1e-4,
            "decay": "constant",
            "ema": 0.9999,
        },
        "released": {
            "levels": (3,),
            "draws": 1,
            "noise": "image",
            "sampler": "released",
            "score": "mfsim_released",
            "regret": True,
        },
    }
    diffusion: FeatureDiffusion | None = None

    def __init__(
        self,
        *,
        levels: tuple[int, ...] = (20,),
        draws: int = 2,
        noise: NoiseKind = "shared",
        sampler: Sampler = "oneshot",
        steps: int = 3,
        eta: float = 1.0,
        score: str = "mfsim_released",
        lr_sign: int = 1,
        regret: bool = False,
        standardize: Standardize = "image",
        summaries: bool = False,
        hidden: int | None = 512,
        bottleneck: int | None = 512,
        embedding: int | None = 128,
        blocks: int = 6,
        input_activation: bool = True,
        scale_shift: bool = False,
        time_sampling: LevelSampling = "uniform",
        updates: int = 600,
        epochs: int | None = None,
        batch: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        decay: Literal["constant", "cosine"] = "cosine",
        ema: float = 0.995,
        **features: Any,
    ) -> None:
        super().__init__(**features)
        known = [name for name in _INDICATORS if regret or name != "lr"]
        if score not in known:
            without = "" if regret else " without regret"
            raise FaroutError(f"there is no score {score!r}{without}; expected one of {', '.join(known)}")
        if min(draws, updates, batch, epochs or 1) < 1 or lr_sign not in (1, -1):
            given = f"{draws}, {updates}, {batch}, {epochs} and {lr_sign}"
            raise FaroutError(f"draws, updates, batch and epochs must be at least 1, lr_sign 1 or -1; got {given}")
        self._training_config(1)  # rejects values out of range
        check_sampler(sampler, levels, steps, paper_schedule())
        if sampler != "ddim":
            self._check_unused("with sampler ddim", "steps", "eta")
        if epochs is not None:
            self._check_unused("without epochs", "updates")
        self.levels, self.draws = tuple(sorted(levels)), draws
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Discard the statistics of an earlier fit."""
        self.log_z: ZScore | None = None  # of log e_g and log c_g at every level
        self.fused_z: ZScore | None = None  # of the three parts of `fused`

    # Training.

    def train_feature_diffusion(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """Train the denoiser of the images' features, and store their mean and covariance with it."""
        if len(images) < 2:
            hint = "give more images, fewer for the statistics, or a larger alpha"
            raise FaroutError(f"{len(images)} images are left to train the denoiser on; {hint}")
        training = settings.training or self._training_config(len(images))
        updates_per_epoch = math.ceil(len(images) / training.batch_size)
        keep_first = self.config["regret"] and updates_per_epoch < training.steps
        self._check_regret(keep_first)
        features = self.pooled_features_of_source(images)
        names = ("hidden", "bottleneck", "embedding", "blocks", "input_activation", "scale_shift")
        model = train_features(
            features,
            [images.content_hash(i) for i in range(len(images))],
            backbone=self.backbone.content_hash,
            encoding=FeatureEncoding(self.backbone.channels, self.config["standardize"], self.config["summaries"]),
            network={name: self.config[name] for name in names},
            training=settings.resolve_training(training),
            levels=self.config["time_sampling"],
            first_step=updates_per_epoch if keep_first else None,
            out=settings.checkpoints,
            resume=settings.resume,
            fingerprint=images.fingerprint(),
        )
        model.gaussian = Mahalanobis.fit(model.encode(features).cpu().double().numpy())
        return model

    def _check_regret(self, has_first: bool) -> None:
        if self.config["score"] == "lr" and not has_first:
            raise FaroutError("the score lr requires the denoiser after the first of several epochs; train for longer")

    def _training_config(self, images: int) -> TrainingConfig:
        epochs, updates_per_epoch = self.config["epochs"], math.ceil(images / self.config["batch"])
        return TrainingConfig(
            steps=self.config["updates"] if epochs is None else epochs * updates_per_epoch,
            batch_size=self.config["batch"],
            learning_rate=self.config["learning_rate"],
            weight_decay=self.config["weight_decay"],
            decay=self.config["decay"],
            warmup=0 if self.config["decay"] == "constant" else 100,
            ema=self.config["ema"],
            clip=None,
        )

    # Measuring.

    def prepare_networks(self) -> None:
        """Check the model against the backbone, and build the denoisers."""
        model = self.diffusion
        if model is None:
            return
        self.check_backbone(model.backbone)
        check_sampler(self.config["sampler"], self.levels, self.config["steps"], model.schedule)
        has_first = self.config["regret"] and model.first is not None
        self._check_regret(has_first)
        # the trained denoiser, and for `lr` the one after the first epoch
        self.denoisers = model.denoisers(self.runtime.batch_size, self.precision)[: 2 if has_first else 1]
        self.layer_widths = list(model.encoding.groups)

    @property
    def rows_per_image(self) -> int:
        """Levels times draws."""
        return len(self.levels) * self.draws

    @property
    def evaluations(self) -> int:
        """Rows that the denoisers have evaluated."""
        return sum(denoiser.evaluations for denoiser in self.denoisers)

    @torch.no_grad()
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Errors at every level and draw: values (B, level, draw, metric).

        Metrics: per layer g `error_g` = e_g, `angle_g` = c_g and, for `lr`, `first_error_g` of the denoiser after the
        first epoch; and `distance`, squared, the same at every level and draw.
        """
        model = self.diffusion
        assert model is not None
        if model.gaussian is None:
            raise FaroutError("this feature diffusion model has no mean and covariance of features; train it again")
        x0 = model.encode(self.pooled_features(batch))
        reconstructions = [self._reconstruct(denoiser, x0, batch.identities) for denoiser in self.denoisers]
        metrics = self._compare_layers(x0, reconstructions)
        errors = torch.stack(list(metrics.values()), dim=-1).cpu()
        distance = torch.from_numpy(model.gaussian.score(x0.cpu().double().numpy()))[:, None, None]
        values = torch.cat([errors, distance.expand(*errors.shape[:3])[..., None]], dim=-1).float()
        return Measurements(batch.keys, values, tuple(map(float, self.levels)), (*metrics, "distance"))

    def _compare_layers(self, x0: Tensor, reconstructions: list[Tensor]) -> dict[str, Tensor]:
        """e_g and c_g of every layer, and e_g of the denoiser after the first epoch: (B, level, draw) by name."""
        # float64, since 1 - cos of nearly parallel vectors cancels in float32
        layers = torch.split(in_float64(x0[:, None, None]), self.layer_widths, dim=-1)
        x0hat, *first_x0hat = [torch.split(in_float64(r), self.layer_widths, dim=-1) for r in reconstructions]
        metrics = {f"error_{g}": (a - b).square().mean(-1) for g, (a, b) in enumerate(zip(layers, x0hat))}
        for g, (a, b) in enumerate(zip(layers, x0hat)):
            metrics[f"angle_{g}"] = 1 - functional.cosine_similarity(a, b, dim=-1)
        for first in first_x0hat:
            metrics |= {f"first_error_{g}": (a - b).square().mean(-1) for g, (a, b) in enumerate(zip(layers, first))}
        return metrics

    def _reconstruct(self, denoiser: NetworkDenoiser, x0: Tensor, identities: tuple[str, ...]) -> Tensor:
        """x0 (B, width) -> (B, level, draw, width)"""
        width = x0.shape[1]
        noise = noise_table(
            self.config["noise"], identities, (width,), self.seed, self.levels, self.draws, antithetic=True
        ).to(x0.device)
        sampler, steps, eta = (self.config[name] for name in ("sampler", "steps", "eta"))
        if sampler == "oneshot":  # all levels and draws in one batch
            sigma = denoiser.schedule.sigma_of(torch.tensor(self.levels)).float().to(x0.device)
            sigmas = sigma[None, :, None].expand(noise.shape[:3])
            x_t = x0[:, None, None] + sigmas[..., None] * noise
            return denoiser(x_t.flatten(0, 2), sigmas.flatten()).reshape(noise.shape)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return denoiser(x, torch.full((len(x),), sigma, device=x.device))

        reconstructions = torch.empty_like(noise)
        for row, level in enumerate(self.levels):
            for draw in range(self.draws):
                step_noise = shared_step_noise(width, self.seed, level, draw)
                reconstructions[:, row, draw] = reconstruct(
                    denoise, denoiser.schedule, x0, noise[:, row, draw], level, sampler, steps, eta, step_noise
                )
        return reconstructions

    # Scores.

    def _layers(self, measurements: Measurements, metric: str) -> np.ndarray:
        """A metric of every layer, draws averaged: (B, level, layer) float64."""
        assert measurements.values is not None
        columns = [measurements.metrics.index(f"{metric}_{g}") for g in range(len(self.layer_widths))]
        return measurements.values[..., columns].double().mean(2).numpy()

    def _log_layers(self, measurements: Measurements) -> np.ndarray:
        """log e_g and log c_g: (B, 2 * level * layer)."""
        both = np.stack([self._layers(measurements, metric) for metric in ("error", "angle")], axis=1)
        # An exact reconstruction has no logarithm; 1e-9 is below the resolution of float32.
        return np.log(np.maximum(both, 1e-9)).reshape(len(measurements), -1)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit mean and deviation of the log errors, and of the parts of `fused`."""
        self.log_z = ZScore.fit(self._log_layers(measurements))
        self.fused_z = ZScore.fit(self._fused_parts(self._compute_unfused(measurements)))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """All indicators; `lr` only with the denoiser after the first epoch."""
        assert self.fused_z is not None
        scores = self._compute_unfused(measurements)
        scores["fused"] = self.fused_z.transform(self._fused_parts(scores)).mean(1)
        return {name: torch.from_numpy(scores[name]) for name in _INDICATORS if name in scores}

    def _compute_unfused(self, measurements: Measurements) -> dict[str, np.ndarray]:
        assert self.log_z is not None
        assert measurements.values is not None
        w, e, c = np.array(self.layer_widths), self._layers(measurements, "error"), self._layers(measurements, "angle")
        z_error, z_angle = np.split(self.log_z.transform(self._log_layers(measurements)), 2, axis=1)
        mse = (e * w).sum(2).mean(1) / w.sum()
        scores = {
            "mse": mse,
            "mfsim": c.mean((1, 2)) - 1,
            "mfsim_released": c[..., 1 if len(w) > 1 else 0 :].mean((1, 2)) - 1,
            "calibrated_mse": z_error.mean(1),
            "calibrated_mfsim": z_angle.mean(1),
            "distance": measurements.values[:, 0, 0, measurements.metrics.index("distance")].double().numpy(),
        }
        if "first_error_0" in measurements.metrics:
            first_mse = (self._layers(measurements, "first_error") * w).sum(2).mean(1) / w.sum()
            scores["lr"] = self.config["lr_sign"] * (first_mse - mse)
        return scores

    @staticmethod
    def _fused_parts(scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """log mse, calibrated_mse and log distance: (B, 3)."""
        log_mse, log_distance = (np.log(np.maximum(scores[name], 1e-12)) for name in ("mse", "distance"))
        return np.stack([log_mse, scores["calibrated_mse"], log_distance], axis=1)

    def build_score_module(self) -> nn.Module:
        """The backbone, the denoisers at the configured levels, and the configured score."""
        from farout.detectors.semantic.score_module import SemanticScore

        assert self.diffusion is not None
        assert self.log_z is not None
        assert self.fused_z is not None
        return SemanticScore(self.backbone, self.diffusion, self.config, self.seed, self.log_z, self.fused_z)

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted means and deviations."""
        fitted = {"log_z": self.log_z, "fused_z": self.fused_z}
        return pack_arrays({name: z for name, z in fitted.items() if z is not None})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted means and deviations."""
        self.log_z = ZScore.from_arrays(unpack_arrays(state, "log_z"))
        self.fused_z = ZScore.from_arrays(unpack_arrays(state, "fused_z"))
