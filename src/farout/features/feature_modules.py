"""Features of a backbone, and their reconstruction, as torch modules for exported graphs: fp32, on the CPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.diffusion.schedule import NoiseSchedule
from farout.features.encoding import FeatureEncoding
from farout.features.extractor import FeatureExtractor
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.feature_maps import NormalizedMaps

__all__ = ["EncodedFeatures", "FeatureGrid", "FixedLevelDenoiser", "PooledFeatures"]


def _copy_maps(extractor: FeatureExtractor) -> NormalizedMaps:
    network = copy.deepcopy(extractor.evaluated_network).cpu().eval()
    return NormalizedMaps(network, extractor.mean, extractor.std, extractor.is_channels_last, extractor.normalize)


class PooledFeatures(nn.Module):
    """`FeatureExtractor.pooled_features` as a module: images (B, 3, size, size) in [0, 1] -> float32 (B, width)."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.maps = _copy_maps(extractor)

    def forward(self, images: Tensor) -> Tensor:
        """Means over positions, layer by layer."""
        return torch.cat([level.mean((2, 3)) for level in self.maps(images)], dim=1)


class FeatureGrid(nn.Module):
    """`FeatureExtractor.feature_grid` as a module: images -> float32 (B, side * side, width), row by row.

    Averages and enlargements of each layer are products with constant matrices, which every runtime has.
    """

    def __init__(self, extractor: FeatureExtractor, side: int) -> None:
        super().__init__()
        self.maps = _copy_maps(extractor)
        with torch.no_grad():
            levels = self.maps(torch.zeros(1, 3, extractor.size, extractor.size))
        self.count = len(levels)
        for number, level in enumerate(levels):
            height, width = level.shape[2:]
            enlarges = min(height, width) < side
            self.register_buffer(f"rows{number}", _resizing_matrix(height, side, enlarges))
            self.register_buffer(f"columns{number}", _resizing_matrix(width, side, enlarges))

    def forward(self, images: Tensor) -> Tensor:
        """All layers, averaged or enlarged bilinearly to one grid."""
        grids = []
        for number, level in enumerate(self.maps(images)):
            rows, columns = self.get_buffer(f"rows{number}"), self.get_buffer(f"columns{number}")
            grids.append(functional.linear(functional.linear(level, columns).transpose(2, 3), rows).transpose(2, 3))
        return torch.cat(grids, dim=1).flatten(2).transpose(1, 2)


def _resizing_matrix(size: int, side: int, enlarges: bool) -> Tensor:
    """The matrix (side, size) of one direction of the resizing in `FeatureExtractor.feature_grid`."""
    unit_vectors = torch.eye(size)[None]
    if enlarges:
        return functional.interpolate(unit_vectors, size=side, mode="linear", align_corners=False)[0].T
    return functional.adaptive_avg_pool1d(unit_vectors, side)[0].T


class EncodedFeatures(nn.Module):
    """`FeatureEncoding` as a module: features (..., sum of channels) -> float32 (..., width)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, encoding: FeatureEncoding) -> None:
        super().__init__()
        self.channels, self.standardize, self.summaries = encoding.channels, encoding.standardize, encoding.summaries
        self.register_buffer("shift", encoding.shift.cpu().float().clone())
        self.register_buffer("scale", encoding.scale.cpu().float().clone())

    def forward(self, features: Tensor) -> Tensor:
        """Encoded vectors, as `FeatureEncoding` computes them."""
        count = sum(self.channels)
        parts = torch.split(features, list(self.channels), dim=-1)
        means = [part.mean(-1, keepdim=True) for part in parts]
        # the sample standard deviation, written out: not every runtime has it
        stds = [
            ((part - mean).square().sum(-1, keepdim=True) / (part.shape[-1] - 1)).sqrt()
            for part, mean in zip(parts, means, strict=True)
        ]
        if self.standardize == "image":
            groups = [(part - mean) / (std + 1e-5) for part, mean, std in zip(parts, means, stds, strict=True)]
        else:
            groups = [(features - self.shift[:count]) / self.scale[:count]]
        if self.summaries:
            summaries = torch.cat([*means, *[(std + 1e-5).log() for std in stds]], dim=-1)
            groups.append((summaries - self.shift[count:]) / self.scale[count:])
        return torch.cat(groups, dim=-1)


class FixedLevelDenoiser(nn.Module):
    """A denoiser of encoded features at noise levels that are fixed when the graph is built.

    Args:
        network: predicts x0.
        schedule: the schedule of its training.
    """

    def __init__(self, network: FeatureDenoiser, schedule: NoiseSchedule) -> None:
        super().__init__()
        copied: nn.Module = copy.deepcopy(network)
        self.network, self.schedule = copied.cpu().float().eval(), schedule
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, nn.GroupNorm):  # one group of vectors; OpenVINO normalizes only groups of maps
                normalization = nn.LayerNorm(layer.num_channels, eps=layer.eps)
                normalization.load_state_dict(layer.state_dict())
                self.network.set_submodule(name, normalization.eval())
        self._known: dict[float, tuple[float, float]] = {}

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        """x = x0 + sigma noise (N, width) -> x0."""
        if sigma not in self._known:  # tracing cannot compute numbers: the module is called once before
            given = torch.tensor(sigma, dtype=torch.float32)  # as `NetworkDenoiser` is given it
            self._known[sigma] = float(self.schedule.t_of(given)), float((1 + given**2).sqrt())
        t, scale = self._known[sigma]
        return self.network(x / scale, x.new_full((x.shape[0],), t))
