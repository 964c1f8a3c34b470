"""Noise the features of several layers a little, denoise, compare (Yang et al. 2024); minutes on a CPU."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.core.devices import in_float64
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.feature_detector import FeatureDetector
from farout.detectors.fit_settings import FitSettings
from farout.detectors.results import Measurements
from farout.detectors.semantic import indicators, sampling
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import LevelSampling
from farout.diffusion.noise import NoiseKind, noise_table
from farout.features.densities import Mahalanobis
from farout.features.encoding import FeatureEncoding, Standardize
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.features.train import train_features
from farout.training.config import TrainingConfig

__all__ = ["Semantic"]


class Semantic(FeatureDetector):
    """Error between an image's features and their reconstructions by diffusion.

    Pooled features of several layers of a frozen backbone, standardised layer by layer, are noised a little and
    denoised by a small residual network that predicts the clean vector; features like those of good images come back.
    Yang, Cheng, Fang, Wang, Jiao, Cheng, Wang and Gao, "Diffusion-based layer-wise semantic reconstruction for
    unsupervised out-of-distribution detection" (NeurIPS 2024, arXiv 2411.10701).

    Args:
        levels: noise levels t, 0 to 99, to which features are noised; several are measured in one batch.
        draws: noise samples per level; every second one is the negative of the one before (antithetic).
        noise: `shared`: the same noise for all images; `image`: noise per image, as published. Noise that a sampler
            adds is always shared.
        sampler: `oneshot` (one evaluation), `ddim` (several steps) or `released` (the arithmetic of the released code,
            with the level as its K).
        steps: number of steps of `ddim`.
        eta: share of fresh noise in the steps of `ddim`: 0 is deterministic, 1 as published.
        score: indicator used as score: `mfsim_released` (without the first layer; highest AUROC on dev sources),
            `mfsim` or `mse` (the paper's), `lr`, `calibrated_mse`, `calibrated_mfsim`, `distance` (no diffusion) or
            `fused`.
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

    needs: ClassVar[frozenset[str]] = frozenset({"features", "diffusion"})
    diffusion_of = "features"
    diffusion: FeatureDiffusion | None = None
    statistics_minimum: ClassVar[int] = 200
    statistics_suffice: ClassVar[bool] = True
    companions: ClassVar[tuple[str, ...]] = ("mahalanobis", "knn", "pca", "gmm", "autoencoder")
    choices: ClassVar[frozenset[str]] = frozenset({"score", "lr_sign"})
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

    def __init__(
        self,
        *,
        levels: tuple[int, ...] = (20,),
        draws: int = 2,
        noise: NoiseKind = "shared",
        sampler: sampling.Sampler = "oneshot",
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
        if score not in indicators.names(regret):
            known = ", ".join(indicators.names(regret))
            raise FaroutError(
                f"there is no score {score!r}{'' if regret else ' without regret'}; expected one of {known}"
            )
        if min(draws, updates, batch, epochs or 1) < 1 or lr_sign not in (1, -1):
            given = f"{draws}, {updates}, {batch}, {epochs} and {lr_sign}"
            raise FaroutError(f"draws, updates, batch and epochs must be at least 1, lr_sign 1 or -1; got {given}")
        self._training(1)  # refuses what is out of range
        sampling.check_sampler(sampler, levels, steps, paper_schedule())
        if sampler != "ddim":
            self._refuse_idle(f"with the sampler {sampler}; give sampler ddim", "steps", "eta")
        if epochs is not None:
            self._refuse_idle("with epochs; leave epochs out", "updates")
        self.levels, self.draws, self.regret = tuple(sorted(levels)), draws, regret
        self.scorer: indicators.Scorer | None = None
        self.denoisers: list[NetworkDenoiser] = []

    @classmethod
    def tiny(cls, resources: Any) -> Semantic:
        """A small denoiser on small images."""
        return cls(size=32, hidden=64, bottleneck=64, embedding=32, blocks=2, updates=8, batch=16)

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """A denoiser of the images' features, and their mean and covariance beside it."""
        if len(images) < 2:
            hint = "give more images, fewer for the statistics, or a larger alpha"
            raise FaroutError(f"{len(images)} images are left to train the denoiser on; {hint}")
        training = settings.training or self._training(len(images))
        first_pass = math.ceil(len(images) / training.batch_size)
        regret = self.regret and first_pass < training.steps
        self._check_regret(regret)
        features = self.all_features(images)
        names = ("hidden", "bottleneck", "embedding", "blocks", "input_activation", "scale_shift")
        model = train_features(
            features,
            [images.content_hash(i) for i in range(len(images))],
            backbone=self.backbone.content_hash,
            encoding=FeatureEncoding(self.backbone.channels, self.config["standardize"], self.config["summaries"]),
            network={name: self.config[name] for name in names},
            training=settings.resolve_training(training),
            levels=self.config["time_sampling"],
            first_step=first_pass if regret else None,
            out=settings.checkpoints,
            resume=settings.resume,
            fingerprint=images.fingerprint(),
        )
        model.gaussian = Mahalanobis.fit(model.encode(features).cpu().double().numpy())
        return model

    def _check_regret(self, there: bool) -> None:
        if self.config["score"] == "lr" and not there:
            raise FaroutError("the score lr requires the denoiser after the first of several passes; train for longer")

    def _training(self, count: int) -> TrainingConfig:
        names = ("learning_rate", "weight_decay", "decay", "ema")
        epochs, pass_steps = self.config["epochs"], math.ceil(count / self.config["batch"])
        return TrainingConfig(
            steps=self.config["updates"] if epochs is None else epochs * pass_steps,
            batch_size=self.config["batch"],
            warmup=0 if self.config["decay"] == "constant" else 100,
            clip=None,
            **{name: self.config[name] for name in names},
        )

    # -- measuring -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Checks the model against the backbone, and builds denoisers and scorer."""
        model = self.diffusion
        if model is None:
            return
        self.check_backbone(model.backbone)
        sampling.check_sampler(self.config["sampler"], self.levels, self.config["steps"], model.schedule)
        regret = self.regret and model.first is not None
        self._check_regret(regret)
        self.denoisers = model.denoisers(self.runtime.batch_size, self.precision)[: 2 if regret else 1]
        learnt = self.state()
        self.scorer = indicators.Scorer(model.encoding.groups, regret, self.config["lr_sign"])
        self.restore(learnt)

    def begin(self) -> None:
        """Forgets the statistics of an earlier fit."""
        self.scorer = None

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
        """Errors of every level, draw and layer: values (B, level, draw, metric)."""
        model = self.diffusion
        assert model is not None
        regret = len(self.denoisers) > 1
        names = indicators.metric_names(len(model.encoding.groups), regret)
        features = self.features_of(batch)
        shape = (len(batch.keys), len(self.levels), self.draws)
        values = torch.empty(*shape, len(names))
        if batch.keys:
            x0 = model.encode(features)
            restored = [self._restored(denoiser, x0, batch.identities) for denoiser in self.denoisers]
            values[..., :-1] = self._compared(x0, restored).cpu()
            values[..., -1] = self._distances(x0)[:, None, None]
        return Measurements(batch.keys, values, tuple(float(t) for t in self.levels), names)

    def _restored(self, denoiser: NetworkDenoiser, x0: Tensor, keys: tuple[str, ...]) -> Tensor:
        """(B, level, draw, width)"""
        width, kind = x0.shape[1], self.config["noise"]
        noise = noise_table(kind, keys, (width,), self.seed, self.levels, self.draws, antithetic=True).to(x0.device)
        sampler, steps, eta = (self.config[name] for name in ("sampler", "steps", "eta"))
        if sampler == "oneshot":
            sigma = denoiser.schedule.sigma_of(torch.tensor(self.levels)).float().to(x0.device)
            sigmas = sigma[None, :, None].expand(noise.shape[:3])
            x = x0[:, None, None] + sigmas[..., None] * noise
            return denoiser(x.flatten(0, 2), sigmas.flatten()).reshape(noise.shape)
        restored = torch.empty_like(noise)
        for row, level in enumerate(self.levels):
            for draw in range(self.draws):
                fresh = sampling.fresh_noise(width, self.seed, level, draw)
                start = noise[:, row, draw]
                restored[:, row, draw] = sampling.reconstruct(denoiser, x0, start, level, sampler, steps, eta, fresh)
        return restored

    def _compared(self, x0: Tensor, restored: list[Tensor]) -> Tensor:
        """(B, level, draw, metrics but the last), in the order of `metric_names`."""
        assert self.diffusion is not None
        groups = list(self.diffusion.encoding.groups)
        # 1 - cos of nearly parallel vectors loses digits in float32
        clean = in_float64(x0[:, None, None]).split(groups, dim=-1)
        back = [in_float64(whole).split(groups, dim=-1) for whole in restored]
        errors = [[(a - b).square().mean(-1) for a, b in zip(clean, parts)] for parts in back]
        angles = [1 - functional.cosine_similarity(a, b, dim=-1) for a, b in zip(clean, back[0])]
        return torch.stack([*errors[0], *angles, *(errors[1] if len(errors) > 1 else [])], dim=-1).float()

    def _distances(self, x0: Tensor) -> Tensor:
        """Squared Mahalanobis distances (B,) of encoded features."""
        assert self.diffusion is not None
        gaussian = self.diffusion.gaussian
        if gaussian is None:
            raise FaroutError("this feature diffusion model holds no mean and covariance of features; train it again")
        return torch.from_numpy(gaussian.score(x0.cpu().double().numpy())).float()

    # -- scoring -------------------------------------------------------------------------------------------------

    def fit_statistics(self, measurements: Measurements) -> None:
        """z statistics and a density of log-errors."""
        assert self.scorer is not None
        self.scorer.fit(measurements)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every score by name; see `farout.detectors.semantic.indicators.Scorer`."""
        assert self.scorer is not None
        return self.scorer(measurements)

    def state(self) -> dict[str, np.ndarray]:
        """The scorer's arrays."""
        return {} if self.scorer is None else self.scorer.to_arrays()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""
        if self.scorer is not None and state:
            self.scorer.restore(state)
