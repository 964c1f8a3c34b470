"""The score of `semantic` with the residual denoiser as a torch module, for exported graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from farout.diffusion.noise import shared_noise
from farout.features.densities import ZScore
from farout.features.density_modules import MahalanobisModule, ZScoreModule, add_array
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion
from farout.features.feature_modules import EncodedFeatures, PooledFeatures

__all__ = ["ResidualScore"]


class ResidualScore(nn.Module):
    """Images (B, 3, size, size) in [0, 1] -> the configured score of a `Semantic` detector, float64 (B,).

    Args:
        backbone: the backbone.
        model: the diffusion model of its features, with a residual denoiser.
        config: the arguments of `Semantic`.
        score: the indicator that is the score.
        seed: seed of the noise of `residual_error`.
        combined_z: mean and deviation of the parts of `combined`.
        smallest_empirical_norm: lower bound of the mean square inside `empirical_norm`.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    vectors: Tensor
    squares: Tensor
    bandwidths: Tensor
    noise: Tensor

    def __init__(
        self,
        backbone: FeatureExtractor,
        model: FeatureDiffusion,
        config: Mapping[str, Any],
        score: str,
        seed: int,
        combined_z: ZScore,
        smallest_empirical_norm: float,
    ) -> None:
        super().__init__()
        assert model.gaussian is not None
        assert model.axes is not None
        assert model.vectors is not None
        assert model.neighbor_distances is not None
        self.score, self.sigmas = score, tuple(config["sigmas"])
        self.smallest_empirical_norm = smallest_empirical_norm
        self.features, self.encode = PooledFeatures(backbone), EncodedFeatures(model.encoding)
        network: nn.Module = copy.deepcopy(model.network)
        self.network = network.cpu().float().eval()
        add_array(self, "mean", model.axes.mean)
        add_array(self, "axes", model.axes.axes * model.axes.scale)
        add_array(self, "variances", model.axes.variances)
        add_array(self, "vectors", model.vectors.cpu())
        add_array(self, "squares", self.vectors.square().sum(1))
        add_array(self, "bandwidths", config["bandwidth"] * model.neighbor_distances.cpu())
        self.register_buffer("noise", shared_noise((model.encoding.width,), seed, 0, 0))
        self.gaussian = MahalanobisModule(model.gaussian)
        self.combined_z = ZScoreModule(combined_z.mean, combined_z.std)
        add_array(self, "weights", torch.tensor(config["denoiser_weights"]).double() / sum(config["denoiser_weights"]))

    def forward(self, images: Tensor) -> Tensor:
        """The score, as `Semantic.measure` and `Semantic.compute_scores` compute it."""
        x0 = self.encode(self.features(images))
        if self.score == "distance":
            return self.gaussian(x0).float().double()
        if self.score == "residual_error":
            return self._residual_error(x0)
        empirical, residual = self._empirical_norm(x0.double()), self._residual_norm(x0)
        if self.score == "combined":
            z = self.combined_z(torch.stack([empirical, residual], dim=1))
            return torch.mm(z, self.get_buffer("weights")[:, None])[:, 0]
        return empirical if self.score == "empirical_norm" else residual

    def _empirical_norm(self, x: Tensor) -> Tensor:
        distances = x.square().sum(1, keepdim=True) - 2 * torch.mm(x, self.vectors.T) + self.squares
        weights = (-distances.clamp(min=0) / (2 * self.bandwidths**2)).softmax(1)
        norms = (torch.mm(weights, self.vectors) - x).square().mean(1)
        return _log(norms.clamp(min=self.smallest_empirical_norm))

    def _coordinates(self, x0: Tensor) -> Tensor:
        return torch.mm(x0.double() - self.mean, self.axes).float()

    def _denoise(self, y: Tensor, sigma: float) -> Tensor:
        v = self.variances.float()
        total = v + sigma**2
        log_sigma = y.new_full((y.shape[0],), sigma).log()
        learned = self.network(y / total.sqrt(), log_sigma)
        return v / total * y + sigma * (v / total).sqrt() * learned

    def _residual_norm(self, x0: Tensor) -> Tensor:
        y = self._coordinates(x0)
        moved = [(self._denoise(y, sigma).double() - y.double()).square() for sigma in self.sigmas]
        norms = [(m / self.variances).mean(1) / sigma**2 for m, sigma in zip(moved, self.sigmas, strict=True)]
        return torch.stack([_log(norm) for norm in norms], dim=1).mean(1)

    def _residual_error(self, x0: Tensor) -> Tensor:
        y = self._coordinates(x0)
        logs = []
        for sigma in self.sigmas:
            pair = [self._denoise(y + sign * sigma * self.noise, sigma).double() - y.double() for sign in (1, -1)]
            logs.append(_log((pair[0].square() + pair[1].square()).mean(1) / 2))
        return torch.stack(logs, dim=1).mean(1)


def _log(values: Tensor) -> Tensor:
    # measurements are stored in float32
    return values.float().double().clamp(min=1e-12).log()
