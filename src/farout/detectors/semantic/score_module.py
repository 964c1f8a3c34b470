"""The score of `semantic` as a torch module, for exported graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.detectors.semantic.sampling import reconstruct, shared_step_noise
from farout.diffusion.noise import noise_table
from farout.diffusion.schedule import NoiseSchedule
from farout.features.densities import ZScore
from farout.features.density_modules import MahalanobisModule, ZScoreModule
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion
from farout.features.feature_modules import EncodedFeatures, FixedLevelDenoiser, PooledFeatures

__all__ = ["SemanticScore"]


class SemanticScore(nn.Module):
    """Images (B, 3, size, size) in [0, 1] -> the configured score of a `Semantic` detector, float64 (B,).

    All noise is constant, so it has to be shared by all images.

    Args:
        backbone: the backbone.
        model: the diffusion model of its features.
        config: the arguments of `Semantic`.
        score: the indicator that is the score.
        seed: seed of the noise.
        log_z: mean and deviation of the log errors.
        fused_z: mean and deviation of the parts of `fused`.
    """

    noise: Tensor

    def __init__(
        self,
        backbone: FeatureExtractor,
        model: FeatureDiffusion,
        config: Mapping[str, Any],
        score: str,
        seed: int,
        log_z: ZScore,
        fused_z: ZScore,
    ) -> None:
        super().__init__()
        assert model.gaussian is not None
        if config["noise"] != "shared":
            raise FaroutError(
                "Semantic with noise=image cannot be exported: its noise depends on the hash of each image file; fit "
                "with noise=shared"
            )
        self.score, self.levels, self.draws = score, tuple(sorted(config["levels"])), config["draws"]
        self.sampler, self.steps, self.eta, self.seed = config["sampler"], config["steps"], config["eta"], seed
        self.sign, self.layer_widths = config["lr_sign"], list(model.encoding.groups)
        self.schedule: Any = _PlainSchedule(model.schedule)
        self.step_noise: dict[tuple[int, int, int], Tensor] = {}
        self.features, self.encode = PooledFeatures(backbone), EncodedFeatures(model.encoding)
        networks: Sequence[Any] = [model.network, model.first] if self.score == "lr" else [model.network]
        self.denoisers = nn.ModuleList(FixedLevelDenoiser(network, model.schedule) for network in networks)
        width = model.encoding.width
        noise = noise_table("shared", ("",), (width,), seed, self.levels, self.draws, antithetic=True)[0]
        self.register_buffer("noise", noise.clone())  # (level, draw, width)
        self.gaussian = MahalanobisModule(model.gaussian)
        self.log_z = ZScoreModule(log_z.mean, log_z.std)
        self.fused_z = ZScoreModule(fused_z.mean, fused_z.std)
        with torch.no_grad():  # computes all levels and noise, which tracing cannot
            self(torch.zeros(1, 3, backbone.size, backbone.size))

    def forward(self, images: Tensor) -> Tensor:
        """The score, as `Semantic.measure` and `Semantic.compute_scores` compute it."""
        x0 = self.encode(self.features(images))
        if self.score == "distance":
            return self.gaussian(x0).float().double()
        errors, angles = self._compare(x0, self._reconstruct(self.denoisers[0], x0))
        widths = errors.new_tensor(self.layer_widths)
        mse = (errors * widths).sum(2).mean(1) / sum(self.layer_widths)
        if self.score == "mse":
            return mse
        if self.score == "lr":
            first, _ = self._compare(x0, self._reconstruct(self.denoisers[1], x0))
            return self.sign * ((first * widths).sum(2).mean(1) / sum(self.layer_widths) - mse)
        if self.score == "mfsim":
            return angles.mean((1, 2)) - 1
        if self.score == "mfsim_released":
            return angles[..., 1 if len(self.layer_widths) > 1 else 0 :].mean((1, 2)) - 1
        logs = torch.cat([errors.flatten(1), angles.flatten(1)], dim=1).clamp(min=1e-9).log()
        z_error, z_angle = self.log_z(logs).chunk(2, dim=1)
        if self.score == "calibrated_mse":
            return z_error.mean(1)
        if self.score == "calibrated_mfsim":
            return z_angle.mean(1)
        log_mse, log_distance = (value.clamp(min=1e-12).log() for value in (mse, self.gaussian(x0).float().double()))
        return self.fused_z(torch.stack([log_mse, z_error.mean(1), log_distance], dim=1)).mean(1)

    def _reconstruct(self, denoiser: nn.Module, x0: Tensor) -> list[list[Tensor]]:
        """Reconstructions (B, width) by level and draw."""
        return [
            [
                reconstruct(
                    denoiser,
                    self.schedule,
                    x0,
                    self.noise[row, draw],
                    level,
                    self.sampler,
                    self.steps,
                    self.eta,
                    partial(self._noise_of_step, level, draw),
                )
                for draw in range(self.draws)
            ]
            for row, level in enumerate(self.levels)
        ]

    def _noise_of_step(self, level: int, draw: int, step: int) -> Tensor:
        key = (level, draw, step)
        if key not in self.step_noise:
            self.step_noise[key] = shared_step_noise(self.noise.shape[-1], self.seed, level, draw)(step)
        return self.step_noise[key]

    def _compare(self, x0: Tensor, reconstructions: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Squared errors and 1 - cosine of each layer, draws averaged: (B, level, layer) float64."""
        layers = torch.split(x0.double(), self.layer_widths, dim=1)
        errors, angles = [], []
        for draws in reconstructions:
            for each in draws:
                pairs = list(zip(layers, torch.split(each.double(), self.layer_widths, dim=1), strict=True))
                # measurements are stored in float32
                errors.append(torch.stack([(a - b).square().mean(1).float().double() for a, b in pairs], dim=1))
                cosines = [1 - functional.cosine_similarity(a, b, dim=1) for a, b in pairs]
                angles.append(torch.stack([angle.float().double() for angle in cosines], dim=1))
        shape = (-1, len(self.levels), self.draws, len(self.layer_widths))
        return tuple(torch.stack(each, dim=1).reshape(shape).mean(2) for each in (errors, angles))  # type: ignore[return-value]


class _PlainSchedule:
    """A noise schedule as numbers instead of tensors, for the tracing of a graph."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.abar, self.sigma = schedule, schedule.abar.tolist(), schedule.sigma.tolist()
        self._known: dict[float, float] = {}

    def sigma_of(self, t: float) -> float:
        if t not in self._known:
            self._known[t] = float(self.schedule.sigma_of(t))
        return self._known[t]
