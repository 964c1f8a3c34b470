"""Compare an image's backbone features with their denoised version (after Yang et al. 2024); minutes on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.data.image_source import ImageSource
from farout.detectors.declarations import Requirements
from farout.detectors.feature_detector import PooledFeatureDetector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.results import Measurements
from farout.detectors.semantic.sampling import Sampler, check_sampler, reconstruct, shared_step_noise
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.empirical import EmpiricalDenoiser
from farout.diffusion.losses import LevelSampling
from farout.diffusion.noise import NoiseKind, noise_table, shared_noise
from farout.features.densities import Mahalanobis, ZScore, pack_arrays, unpack_arrays
from farout.features.encoding import FeatureEncoding, Standardize
from farout.features.feature_diffusion import DenoiserKind, FeatureDiffusion, paper_schedule
from farout.features.train import train_features, train_residual
from farout.training.config import TrainingConfig

__all__ = ["Semantic"]

_INDICATORS: Mapping[DenoiserKind, tuple[str, ...]] = {
    "residual": ("combined", "empirical_norm", "residual_norm", "residual_error", "distance"),
    "lfdn": ("mse", "mfsim", "mfsim_released", "lr", "calibrated_mse", "calibrated_mfsim", "distance", "fused"),
}
_DEFAULT_SCORES: Mapping[DenoiserKind, str] = {"residual": "combined", "lfdn": "mfsim_released"}
_LFDN_ONLY = (
    "levels", "draws", "noise", "sampler", "steps", "eta", "lr_sign", "regret",
    "bottleneck", "input_activation", "scale_shift", "time_sampling", "epochs",
)  # fmt: skip
_RESIDUAL_ONLY = ("bandwidth", "sigmas", "whiten", "denoiser_weights", "patience")
_RESIDUAL_METRICS = ("empirical_norm", "residual_norm", "residual_error", "distance")
_VALIDATE_EVERY = 50
"""Updates between validations of the residual denoiser."""
_SMALLEST_EMPIRICAL_NORM = 1e-3
"""Copies of training images are not moved by the empirical denoiser, and the logarithm would multiply their rounding.
Other images have norms of .005 (MNIST) to .4 (Tiny-ImageNet)."""

_SMALL_LFDN: Mapping[str, Any] = {
    "denoiser": "lfdn",
    "score": "mfsim_released",
    "hidden": 512,
    "bottleneck": 512,
    "embedding": 128,
    "blocks": 6,
    "updates": 600,
    "batch": 256,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "decay": "cosine",
    "ema": 0.995,
}
"""The paper's network in a size for two CPU cores, and one evaluation per noise sample: the default of farout 0.1."""


class Semantic(PooledFeatureDetector):
    """Distance of an image's features from their denoised version.

    The pooled features of several layers of a frozen backbone, standardized layer by layer, are the vector x (d). How
    far a denoiser that knows only normal images moves x says how unusual x is. By default two denoisers are used:

        D_e(x, h) = sum_i softmax_i(-||x - x_i||^2 / (2 (h r_i)^2)) x_i, the exact denoiser of the training vectors
                    x_i (Karras et al. 2022, eq. 57) with a noise level for each, h times its distance r_i to its
                    tenth neighbor: less noise where normal images are dense, and
        D_r(y, s) = c_skip y + c_out F(c_in y, log s), with y the coordinates of x along the principal axes of the
                    training vectors: the exact denoiser of a Gaussian with their variances v, and a network F that is
                    trained on what the Gaussian leaves unexplained (preconditioning of the same paper, table 1),

        empirical_norm = log max(0.001, mean (D_e(x, h) - x)^2)
        residual_norm  = mean over s of log mean (D_r(y, s) - y)^2 / (s^2 v)
        residual_error = mean over s of log mean (D_r(y + s noise, s) - y)^2 with antithetic noise
        distance       = Mahalanobis distance of x to the training vectors
        combined       = mean of z(empirical_norm) and z(residual_norm) with `denoiser_weights`,

    z standardized by the statistics images, and the mean inside a logarithm taken over coordinates. (D(x, s) - x) / s^2
    is the estimated score, the gradient of the log density of noised normal images. The training stops when the loss of
    held-out images no longer falls. Before any training (F = 0), residual_norm is the log of a weighted mean of the
    terms y^2 / v of the Mahalanobis distance, with weights s^2 / (v + s^2)^2.

    With `denoiser="lfdn"` this is the method of Yang, Cheng, Fang, Wang, Jiao, Cheng, Wang and Gao, "Diffusion-based
    layer-wise semantic reconstruction for unsupervised out-of-distribution detection" (NeurIPS 2024, arXiv 2411.10701):
    features are noised a little and denoised by a residual network that predicts the clean vector. With x0hat the
    reconstruction of x0, and for each layer g of width w_g the mean squared error e_g and c_g = 1 - cos(x0_g, x0hat_g),
    averaged over levels and draws:

        mse   = sum_g w_g e_g / sum_g w_g         (section 3.4)
        mfsim = mean_g c_g - 1                    (section 3.4); `mfsim_released` without the first layer, as released
        lr    = sign (mse of the denoiser after the first epoch - mse)
        calibrated_mse, calibrated_mfsim = mean over levels and layers of z(log e_g) and of z(log c_g)
        fused    = mean of z(log mse), z(calibrated_mse) and z(log distance).

    Args:
        denoiser: `residual`: the two denoisers above; `lfdn`: the paper's network.
        score: indicator used as score; default: `combined` with residual, `mfsim_released` with lfdn (without the first
            layer; highest AUROC of these on changed training images; the paper's are `mfsim` and `mse`).
        bandwidth: noise level h of the empirical denoiser, as a fraction of each training vector's distance to its
            tenth neighbor.
        sigmas: noise levels s of the residual denoiser, which is trained at levels from 0.1 to 3; the vectors have a
            mean variance of 1.
        whiten: train the residual denoiser in coordinates of variance 1, instead of principal axes with their own
            variances.
        denoiser_weights: weights of the empirical and of the residual denoiser in `combined`.
        patience: end the training of the residual denoiser when this many updates have not lowered the loss of held-out
            images.
        levels: lfdn: noise levels t, 0 to 99, to which features are noised; several are measured in one batch.
        draws: lfdn: noise samples per level; every second one is the negative of the one before (antithetic).
        noise: lfdn: `shared`: the same noise for all images; `image`: noise per image, as published. Noise that a
            sampler adds is always shared.
        sampler: lfdn: `oneshot` (one evaluation), `ddim` (several steps) or `released` (the arithmetic of the released
            code, with the level as its K).
        steps: lfdn: number of steps of `ddim`.
        eta: lfdn: share of fresh noise in the steps of `ddim`: 0 is deterministic, 1 as published.
        lr_sign: lfdn: sign of the indicator `lr`: 1: errors that fall more in training score higher, as released; -1:
            they score lower, as in the paper. Neither is reliable.
        regret: lfdn: keep the denoiser of the first training epoch too, for the indicator `lr` only; doubles the
            evaluations.
        standardize: `image`: scale each layer of each image to mean 0 and standard deviation 1 over channels (the
            paper); `channel`: scale each channel over normal images.
        summaries: append the mean and log standard deviation of each layer, which `image` scaling removes.
        hidden: width of the network's hidden layers; None: twice the number of features, as in the paper.
        bottleneck: lfdn: width of the network's bottleneck; None: twice the number of features, as in the paper.
        embedding: width of the network's embedding of the noise level; None: the number of features, as in the paper.
        blocks: number of residual blocks of the network (16 in the paper).
        input_activation: lfdn: apply SiLU to the noisy features, as in the released code.
        scale_shift: lfdn: let the time embedding scale the features of each block, in addition to shifting them.
        time_sampling: lfdn: distribution of t in training: `uniform` (the paper), `low_noise` (more low t) or
            `antithetic` (mirrored pairs).
        updates: number of training updates; with residual the maximum.
        epochs: lfdn: passes over the training images, instead of `updates`; default: use `updates`.
        batch: images per update.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        decay: learning-rate schedule: `constant` (the paper) or `cosine`.
        ema: decay of the moving average of the weights.
    """

    requirements: ClassVar[Requirements] = Requirements(
        diffusion="features", backbone=True, statistics=100, more_statistics=False
    )
    baselines: ClassVar[tuple[str, ...]] = ("mahalanobis", "knn", "pca", "gmm", "autoencoder")
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"score", "lr_sign", "denoiser_weights"})
    test_arguments: ClassVar[Mapping[str, Any]] = {
        "size": 32,
        "hidden": 64,
        "embedding": 32,
        "blocks": 2,
        "updates": 8,
        "batch": 16,
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "denoiser": "lfdn",
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
            "weight_decay": 1e-4,
            "decay": "constant",
            "ema": 0.9999,
        },
        "released": {
            **_SMALL_LFDN,
            "levels": (3,),
            "draws": 1,
            "noise": "image",
            "sampler": "released",
            "regret": True,
        },
        "small_lfdn": {**_SMALL_LFDN},
    }
    diffusion: FeatureDiffusion | None = None

    def __init__(
        self,
        *,
        denoiser: DenoiserKind = "residual",
        score: str | None = None,
        bandwidth: float = 0.25,
        sigmas: tuple[float, ...] = (0.25,),
        whiten: bool = False,
        denoiser_weights: tuple[float, float] = (2.0, 1.0),
        patience: int = 200,
        levels: tuple[int, ...] = (20,),
        draws: int = 2,
        noise: NoiseKind = "shared",
        sampler: Sampler = "oneshot",
        steps: int = 3,
        eta: float = 1.0,
        lr_sign: int = 1,
        regret: bool = False,
        standardize: Standardize = "image",
        summaries: bool = False,
        hidden: int | None = 512,
        bottleneck: int | None = 512,
        embedding: int | None = 128,
        blocks: int = 3,
        input_activation: bool = True,
        scale_shift: bool = False,
        time_sampling: LevelSampling = "uniform",
        updates: int = 1000,
        epochs: int | None = None,
        batch: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        decay: Literal["constant", "cosine"] = "cosine",
        ema: float = 0.99,
        **features: Any,
    ) -> None:
        super().__init__(**features)
        known = [name for name in _INDICATORS[denoiser] if regret or name != "lr"]
        if self.score_name not in known:
            without = " without regret" if score == "lr" else ""
            raise FaroutError(
                f"there is no score {score!r} with denoiser {denoiser}{without}; expected one of {', '.join(known)}"
            )
        if min(draws, updates, batch, epochs or 1) < 1 or lr_sign not in (1, -1):
            given = f"{draws}, {updates}, {batch}, {epochs} and {lr_sign}"
            raise FaroutError(f"draws, updates, batch and epochs must be at least 1, lr_sign 1 or -1; got {given}")
        if not sigmas or not all(0 < level < math.inf for level in (*sigmas, bandwidth)):
            raise FaroutError(f"bandwidth and sigmas must be positive, got {bandwidth} and {list(sigmas)}")
        if len(denoiser_weights) != 2 or min(denoiser_weights) < 0 or not 0 < sum(denoiser_weights) < math.inf:
            raise FaroutError(
                f"denoiser_weights must be two numbers from 0, one of them positive; got {list(denoiser_weights)}"
            )
        self._training_config(1)  # rejects values out of range
        if denoiser == "lfdn":
            self._check_unused("with denoiser residual", *_RESIDUAL_ONLY)
            check_sampler(sampler, levels, steps, paper_schedule())
            if sampler != "ddim":
                self._check_unused("with sampler ddim", "steps", "eta")
            if epochs is not None:
                self._check_unused("without epochs", "updates")
        else:
            self._check_unused("with denoiser lfdn", *_LFDN_ONLY)
        self.levels, self.draws = tuple(sorted(levels)), draws
        self.reset_statistics()

    @property
    def score_name(self) -> str:
        """As configured, else `combined` with the residual denoiser and `mfsim_released` with lfdn."""
        return self.config["score"] or _DEFAULT_SCORES[self.config["denoiser"]]

    @property
    def is_residual(self) -> bool:
        """Whether the denoisers are those of `residual`."""
        return bool(self.config["denoiser"] == "residual")

    def reset_statistics(self) -> None:
        """Discard the statistics of an earlier fit."""
        self.log_z: ZScore | None = None  # of log e_g and log c_g at every level
        self.fused_z: ZScore | None = None  # of the three parts of `fused`
        self.combined_z: ZScore | None = None  # of the two parts of `combined`

    # Training.

    def train_feature_diffusion(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """Train the denoiser of the images' features, and store their mean and covariance with it."""
        if len(images) < 2:
            hint = "give more images, fewer for the statistics, or a larger alpha"
            raise FaroutError(f"{len(images)} images are left to train the denoiser on; {hint}")
        features = self.pooled_features_of_source(images)
        hashes = [images.content_hash(i) for i in range(len(images))]
        return self._train(features, hashes, settings, self.backbone.content_hash, images.fingerprint())

    def prepare_arrays(self, table: Tensor, rows: np.ndarray) -> np.ndarray:
        """Train the denoiser on all but the rows for the statistics, which are a seeded sample of at most half."""
        if len(rows) < 4:
            raise FaroutError(f"{len(rows)} rows are too few for the training and the statistics, which need two each")
        order = np.random.default_rng(self.seed).permutation(rows)
        count = min(self.requirements.statistics, len(rows) // 2)
        training = np.sort(order[count:])
        settings = FitSettings(seed=self.seed, alpha=self.alpha, runtime=self.runtime)
        hashes = [str(row) for row in training.tolist()]
        self.diffusion = self._train(table[torch.from_numpy(training)], hashes, settings, "", "")
        self.attach_runtime(self.runtime)
        return np.sort(order[:count])

    def _train(
        self, features: Tensor, hashes: Sequence[str], settings: FitSettings, backbone: str, fingerprint: str
    ) -> FeatureDiffusion:
        """Train on features (n, sum of channels)."""
        training = settings.resolve_training(settings.training or self._training_config(len(features)))
        encoding = FeatureEncoding(self.channels, self.config["standardize"], self.config["summaries"])
        common: dict[str, Any] = {
            "backbone": backbone,
            "encoding": encoding,
            "training": training,
            "out": settings.checkpoints,
            "resume": settings.resume,
            "fingerprint": fingerprint,
        }
        if self.is_residual:
            width = encoding.width
            network = {"hidden": self.config["hidden"] or 2 * width, "embedding": self.config["embedding"] or width}
            network["blocks"] = self.config["blocks"]
            return train_residual(features, hashes, whiten=self.config["whiten"], network=network, **common)
        updates_per_epoch = math.ceil(len(features) / training.batch_size)
        keep_first = self.config["regret"] and updates_per_epoch < training.steps
        self._check_regret(keep_first)
        names = ("hidden", "bottleneck", "embedding", "blocks", "input_activation", "scale_shift")
        model = train_features(
            features,
            hashes,
            network={name: self.config[name] for name in names},
            levels=self.config["time_sampling"],
            first_step=updates_per_epoch if keep_first else None,
            **common,
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
            validate_every=_VALIDATE_EVERY if self.is_residual else 0,
            patience=self.config["patience"] if self.is_residual else 0,
            checkpoint="best" if self.is_residual else "last",
        )

    # Measuring.

    def prepare_networks(self) -> None:
        """Check the model against the backbone, and build the denoisers."""
        model = self.diffusion
        if model is None:
            return
        if self.features is not None:
            self.check_backbone(model.backbone)
        if model.denoiser != self.config["denoiser"]:
            raise FaroutError(
                f"this model has the denoiser {model.denoiser}, the detector requires {self.config['denoiser']}; "
                "fit again, or set the detector's denoiser"
            )
        self.layer_widths = list(model.encoding.groups)
        if self.is_residual:
            if model.vectors is None or model.neighbor_distances is None:
                missing = "its training vectors with the distances of their neighbors"
                raise FaroutError(f"this feature diffusion model does not contain {missing}; fit again")
            vectors = in_float64(model.vectors.to(model.device))
            self.empirical = EmpiricalDenoiser(vectors, model.neighbor_distances.to(vectors))
            self.residual = model.residual_denoiser(self.runtime.batch_size, self.precision)
            return
        check_sampler(self.config["sampler"], self.levels, self.config["steps"], model.schedule)
        has_first = self.config["regret"] and model.first is not None
        self._check_regret(has_first)
        # the trained denoiser, and for `lr` the one after the first epoch
        self.denoisers = model.denoisers(self.runtime.batch_size, self.precision)[: 2 if has_first else 1]

    @property
    def rows_per_image(self) -> int:
        """Levels times draws; with the residual denoiser, the vector itself and two noised ones per level."""
        return 3 * len(self.config["sigmas"]) if self.is_residual else len(self.levels) * self.draws

    @property
    def evaluations(self) -> int:
        """Rows that the learned denoisers have evaluated."""
        return self.residual.evaluations if self.is_residual else sum(d.evaluations for d in self.denoisers)

    @torch.no_grad()
    def measure_features(self, keys: tuple[str, ...], features: Tensor, identities: tuple[str, ...]) -> Measurements:
        """Measure features (B, sum of channels) at every level and draw: values (B, level, draw, metric).

        Metrics with the residual denoiser, at its levels and one draw: `empirical_norm`, `residual_norm`,
        `residual_error` and `distance`; the first and the last are the same at every level. With lfdn: per layer g
        `error_g` = e_g, `angle_g` = c_g and, for `lr`, `first_error_g` of the denoiser after the first epoch; and
        `distance`, the same at every level and draw.
        """
        model = self.diffusion
        assert model is not None
        if model.gaussian is None:
            raise FaroutError("this feature diffusion model has no mean and covariance of features; train it again")
        x0 = model.encode(features)
        distance = torch.from_numpy(model.gaussian.score(x0.cpu().double().numpy()))
        if self.is_residual:
            sigmas = tuple(self.config["sigmas"])
            metrics = [*self._measure_residual(x0), distance[:, None].expand(-1, len(sigmas))]
            return Measurements(keys, torch.stack(metrics, dim=-1)[:, :, None].float(), sigmas, _RESIDUAL_METRICS)
        reconstructions = [self._reconstruct(denoiser, x0, identities) for denoiser in self.denoisers]
        by_layer = self._compare_layers(x0, reconstructions)
        errors = torch.stack(list(by_layer.values()), dim=-1).cpu()
        values = torch.cat([errors, distance[:, None, None, None].expand(*errors.shape[:3], 1)], dim=-1).float()
        return Measurements(keys, values, tuple(map(float, self.levels)), (*by_layer, "distance"))

    def _measure_residual(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """empirical_norm, residual_norm and residual_error of vectors (B, width): (B, level) float64 each."""
        model = self.diffusion
        assert model is not None
        assert model.axes is not None
        x = in_float64(x0)
        h = torch.full((len(x),), self.config["bandwidth"], dtype=torch.float64, device=x.device)
        empirical = (self.empirical(x, h) - x).square().mean(1).cpu()
        y = torch.from_numpy(model.axes.transform(x.cpu().numpy())).float().to(x0.device)
        variances = torch.from_numpy(model.axes.variances)
        norms, errors = [], []
        noise = shared_noise((y.shape[1],), self.seed, 0, 0).to(y.device)
        for sigma in self.config["sigmas"]:
            noised = torch.cat([y, y + sigma * noise, y - sigma * noise])
            denoised = self.residual(noised, torch.full((len(noised),), sigma, device=y.device))
            moved = (in_float64(denoised) - in_float64(y).repeat(3, 1)).square().cpu()
            still, above, below = moved.chunk(3)
            norms.append((still / variances).mean(1) / sigma**2)
            errors.append((above + below).mean(1) / 2)
        return empirical[:, None].expand(-1, len(norms)), torch.stack(norms, dim=1), torch.stack(errors, dim=1)

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
        # an exact reconstruction has no logarithm; 1e-9 is below the resolution of float32
        return np.log(np.maximum(both, 1e-9)).reshape(len(measurements), -1)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit mean and deviation of the log errors, and of the parts of `fused` or `combined`."""
        if self.is_residual:
            self.combined_z = ZScore.fit(self._log_norms(measurements))
            return
        self.log_z = ZScore.fit(self._log_layers(measurements))
        self.fused_z = ZScore.fit(self._fused_parts(self._compute_unfused(measurements)))

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """All indicators; `lr` only with the denoiser after the first epoch."""
        if self.is_residual:
            assert self.combined_z is not None
            norms = self._log_norms(measurements)
            weights = np.array(self.config["denoiser_weights"]) / sum(self.config["denoiser_weights"])
            scores = {
                "combined": self.combined_z.transform(norms) @ weights,
                "empirical_norm": norms[:, 0],
                "residual_norm": norms[:, 1],
                "residual_error": _log(self._metric(measurements, "residual_error")).mean(1),
                "distance": self._metric(measurements, "distance")[:, 0],
            }
        else:
            assert self.fused_z is not None
            scores = self._compute_unfused(measurements)
            scores["fused"] = self.fused_z.transform(self._fused_parts(scores)).mean(1)
        known = _INDICATORS[self.config["denoiser"]]
        return {name: torch.from_numpy(scores[name]) for name in known if name in scores}

    @staticmethod
    def _metric(measurements: Measurements, name: str) -> np.ndarray:
        """A metric of the residual denoiser: (B, level) float64."""
        assert measurements.values is not None
        return measurements.values[:, :, 0, measurements.metrics.index(name)].double().numpy()

    def _log_norms(self, measurements: Measurements) -> np.ndarray:
        """Log empirical_norm, and log residual_norm averaged over levels: (B, 2)."""
        empirical, residual = (self._metric(measurements, name) for name in ("empirical_norm", "residual_norm"))
        empirical = np.maximum(empirical, _SMALLEST_EMPIRICAL_NORM)
        return np.stack([_log(empirical)[:, 0], _log(residual).mean(1)], axis=1)

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
        """The backbone, the denoisers, and the configured score."""
        assert self.diffusion is not None
        if self.is_residual:
            from farout.detectors.semantic.residual_score_module import ResidualScore

            assert self.combined_z is not None
            return ResidualScore(
                self.backbone,
                self.diffusion,
                self.config,
                self.score_name,
                self.seed,
                self.combined_z,
                _SMALLEST_EMPIRICAL_NORM,
            )
        from farout.detectors.semantic.score_module import SemanticScore

        assert self.log_z is not None
        assert self.fused_z is not None
        return SemanticScore(
            self.backbone, self.diffusion, self.config, self.score_name, self.seed, self.log_z, self.fused_z
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted means and deviations."""
        fitted = {"log_z": self.log_z, "fused_z": self.fused_z, "combined_z": self.combined_z}
        return pack_arrays({name: z for name, z in fitted.items() if z is not None})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted means and deviations."""
        if self.is_residual:
            self.combined_z = ZScore.from_arrays(unpack_arrays(state, "combined_z"))
            return
        self.log_z = ZScore.from_arrays(unpack_arrays(state, "log_z"))
        self.fused_z = ZScore.from_arrays(unpack_arrays(state, "fused_z"))


def _log(values: np.ndarray) -> np.ndarray:
    """Logarithms; a vector that is not moved at all has none, and 1e-12 is below the resolution of float32."""
    return np.log(np.maximum(values, 1e-12))
