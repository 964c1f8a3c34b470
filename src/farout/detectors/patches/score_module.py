"""The score of `patches` as a torch module, for exported graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from farout.detectors.patches.positions import PositionStatistics, average_highest, equal_layer_weights
from farout.features.density_modules import ZScoreModule
from farout.features.extractor import FeatureExtractor
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.feature_diffusion import FeatureDiffusion
from farout.features.feature_modules import EncodedFeatures, FeatureGrid, FixedLevelDenoiser

__all__ = ["PatchScore"]


class PatchScore(nn.Module):
    """Images (B, 3, size, size) in [0, 1] -> the configured score of a `Patches` detector, float64 (B,).

    Args:
        backbone: the backbone.
        model: the diffusion model of features at positions.
        bank: encoded and weighted features of normal positions.
        statistics: statistics of normal positions.
        noise: (level, draw, c), shared by all images.
        sigmas: the noise levels.
        score: name of the score.
        side: number of positions along one side.
        share: share of the positions that a score named `…_top` averages.
    """

    weights: Tensor
    noise: Tensor
    roots: Tensor
    bank: Tensor

    def __init__(
        self,
        backbone: FeatureExtractor,
        model: FeatureDiffusion,
        bank: Tensor,
        statistics: PositionStatistics,
        noise: Tensor,
        sigmas: Sequence[float],
        score: str,
        side: int,
        share: float,
    ) -> None:
        super().__init__()
        self.method, self.average = score.split("_")
        self.share, self.positions, self.sigmas = share, side**2, list(sigmas)
        self.grid = FeatureGrid(backbone, side)
        self.encode = EncodedFeatures(model.encoding)
        weights = equal_layer_weights(model.encoding.groups)
        if self.method == "diffusion":
            assert isinstance(model.network, FeatureDenoiser)
            self.denoiser = FixedLevelDenoiser(model.network, model.schedule)
            self.register_buffer("weights", weights)
            self.register_buffer("noise", noise.cpu().clone())
            self.errors = ZScoreModule(statistics.errors.mean, statistics.errors.std)
            self.mean_error = ZScoreModule(statistics.mean_error.mean, statistics.mean_error.std)
        else:
            self.register_buffer("roots", weights.sqrt())
            self.register_buffer("bank", bank.clone())
            self.distances = ZScoreModule(statistics.distances.mean, statistics.distances.std)
        with torch.no_grad():  # computes the levels, which tracing cannot
            self(torch.zeros(1, 3, backbone.size, backbone.size))

    def forward(self, images: Tensor) -> Tensor:
        """The score, as `Patches.measure` computes it."""
        z = self.encode(self.grid(images)).flatten(0, 1)  # (B * position, c)
        values = self._reconstruction_z(z) if self.method == "diffusion" else self._distance_z(z)
        values = values.reshape(-1, self.positions)
        score = average_highest(values, self.share) if self.average == "top" else values.mean(1)
        return score.float().double()  # measurements are stored in float32

    def _reconstruction_z(self, z: Tensor) -> Tensor:
        errors = []
        for number, sigma in enumerate(self.sigmas):
            draws = [self.denoiser(z + sigma * noise, sigma) for noise in self.noise[number]]
            errors.append(torch.stack([((x0 - z).square() * self.weights).sum(1) for x0 in draws]).mean(0))
        mean = self.errors(torch.stack(errors, dim=1)).mean(1, keepdim=True)
        return self.mean_error(mean)[:, 0]

    def _distance_z(self, z: Tensor) -> Tensor:
        vectors = self.roots * z
        nearest = (self.bank.square().sum(1) - 2 * torch.mm(vectors, self.bank.T)).argmin(1)
        distances = (vectors - self.bank[nearest]).square().sum(1).sqrt()
        return self.distances(distances[:, None])[:, 0]
