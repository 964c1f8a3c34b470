"""The encoding of pooled features as input vectors of a feature denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from farout.core.errors import FaroutError

__all__ = ["FeatureEncoding", "Standardize"]

Standardize = Literal["image", "channel"]


@dataclass(frozen=True)
class FeatureEncoding:
    """Encodes features (B, sum of channels), layer by layer, as vectors (B, width) in `groups`, one per layer.

    `image` scales each layer of each image to mean 0 and standard deviation 1 over its channels, as in the paper (Yang
    et al. 2024, section 3.2; unbiased standard deviation + 1e-5, as released), which discards a layer's mean and
    magnitude. `channel` standardizes each channel over normal images. With `summaries`, the mean and log standard
    deviation of each layer over its channels, standardized over normal images, are an additional group.

    Args:
        channels: features per layer.
        standardize: `image` or `channel`.
        summaries: whether the layers' means and log standard deviations are appended.
        shift: means over normal images, (channels + 2 layers,), set by `fit`.
        scale: standard deviations over normal images, (channels + 2 layers,), set by `fit`.
    """

    channels: tuple[int, ...]
    standardize: Standardize = "image"
    summaries: bool = False
    shift: Tensor = field(default_factory=lambda: torch.zeros(0))
    scale: Tensor = field(default_factory=lambda: torch.ones(0))

    def __post_init__(self) -> None:
        if self.standardize not in ("image", "channel"):
            raise FaroutError(f"standardize must be 'image' or 'channel', got {self.standardize!r}")
        if min(self.channels, default=0) < 2:
            raise FaroutError(
                f"every layer requires at least two channels for a standard deviation, got {list(self.channels)}"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """Widths of the encoded groups, one per layer, and one for the summaries."""
        return (*self.channels, 2 * len(self.channels)) if self.summaries else self.channels

    @property
    def width(self) -> int:
        """Length of an encoded vector."""
        return sum(self.groups)

    def fit(self, features: Tensor) -> FeatureEncoding:
        """The same encoding with the statistics of normal images' features (n, sum of channels)."""
        values = torch.cat([features.double(), self._summarize(features.double())], dim=1)
        scale = values.std(0) if len(values) > 1 else torch.ones(values.shape[1])
        # a constant channel is not scaled
        scale = torch.where(scale > 1e-6 * values.abs().amax(0).clamp(min=1e-6), scale, torch.ones_like(scale))
        return FeatureEncoding(self.channels, self.standardize, self.summaries, values.mean(0).float(), scale.float())

    def _summarize(self, features: Tensor) -> Tensor:
        parts = torch.split(features, list(self.channels), dim=1)
        means = torch.stack([part.mean(1) for part in parts], dim=1)
        stds = torch.stack([part.std(1) for part in parts], dim=1)
        return torch.cat([means, (stds + 1e-5).log()], dim=1)

    def __call__(self, features: Tensor) -> Tensor:
        """Encoded vectors, float32.

        Raises FaroutError for another number of features, and for an encoding that requires `fit` first.
        """
        if features.ndim != 2 or features.shape[1] != sum(self.channels):
            raise FaroutError(f"expected features (B, {sum(self.channels)}), got {tuple(features.shape)}")
        if not len(self.shift) and (self.summaries or self.standardize == "channel"):
            raise FaroutError("this encoding is not fitted; call fit(features) first")
        count = sum(self.channels)
        shift, scale = self.shift.to(features.device), self.scale.to(features.device)
        if self.standardize == "image":
            parts = torch.split(features, list(self.channels), dim=1)
            groups = [(p - p.mean(1, keepdim=True)) / (p.std(1, keepdim=True) + 1e-5) for p in parts]
        else:
            groups = [(features - shift[:count]) / scale[:count]]
        if self.summaries:
            groups.append((self._summarize(features) - shift[count:]) / scale[count:])
        return torch.cat(groups, dim=1).float()
