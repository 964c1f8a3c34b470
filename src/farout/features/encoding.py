"""How pooled features become the vectors that a feature denoiser sees."""

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
    """Features (B, sum of channels), layer by layer -> encoded vectors (B, width), in `groups` of one layer each.

    `image`: each layer of each image to mean 0 and standard deviation 1 over its channels, the paper's (Yang et al.
    2024, section 3.2; unbiased deviation, + 1e-5, as released): what a layer's mean and size say is lost. `channel`:
    each channel by its mean and deviation over good images. With `summaries`, each layer's mean and log deviation over
    its channels, standardised over good images, are one group more.

    Args:
        channels: features per layer.
        standardize: `image` or `channel`.
        summaries: whether the layers' means and log deviations are appended.
        shift, scale: (channels + 2 layers,) statistics of good images, set by `fitted`.
    """

    channels: tuple[int, ...]
    standardize: Standardize = "image"
    summaries: bool = False
    shift: Tensor = field(default_factory=lambda: torch.zeros(0))
    scale: Tensor = field(default_factory=lambda: torch.ones(0))

    def __post_init__(self) -> None:
        if self.standardize not in ("image", "channel"):
            raise FaroutError(f"features are standardised by 'image' or 'channel', got {self.standardize!r}")
        if min(self.channels, default=0) < 2:
            raise FaroutError(f"every layer requires two channels or more for a deviation, got {list(self.channels)}")

    @property
    def groups(self) -> tuple[int, ...]:
        """Widths of the encoded groups, one per layer, and one for the summaries."""
        return (*self.channels, 2 * len(self.channels)) if self.summaries else self.channels

    @property
    def width(self) -> int:
        """Numbers of an encoded image."""
        return sum(self.groups)

    def fit(self, features: Tensor) -> FeatureEncoding:
        """The encoding with the statistics of good images' features (n, sum of channels)."""
        whole = torch.cat([features.double(), self._summarised(features.double())], dim=1)
        scale = whole.std(0) if len(whole) > 1 else torch.ones(whole.shape[1])
        # a channel that never varies has no scale of its own
        scale = torch.where(scale > 1e-6 * whole.abs().amax(0).clamp(min=1e-6), scale, torch.ones_like(scale))
        return FeatureEncoding(self.channels, self.standardize, self.summaries, whole.mean(0).float(), scale.float())

    def _summarised(self, features: Tensor) -> Tensor:
        parts = features.split(self.channels, dim=1)
        means = torch.stack([part.mean(1) for part in parts], dim=1)
        stds = torch.stack([part.std(1) for part in parts], dim=1)
        return torch.cat([means, (stds + 1e-5).log()], dim=1)

    def __call__(self, features: Tensor) -> Tensor:
        """Encoded vectors, float32.

        Raises FaroutError for another number of features, and where statistics of good images are wanted and lacking.
        """
        if features.ndim != 2 or features.shape[1] != sum(self.channels):
            raise FaroutError(f"expected features (B, {sum(self.channels)}), got {tuple(features.shape)}")
        if not len(self.shift) and (self.summaries or self.standardize == "channel"):
            raise FaroutError("this encoding is not fitted; call fitted(features) first")
        count = sum(self.channels)
        shift, scale = self.shift.to(features.device), self.scale.to(features.device)
        if self.standardize == "image":
            parts = features.split(self.channels, dim=1)
            whole = [(p - p.mean(1, keepdim=True)) / (p.std(1, keepdim=True) + 1e-5) for p in parts]
        else:
            whole = [(features - shift[:count]) / scale[:count]]
        if self.summaries:
            whole.append((self._summarised(features) - shift[count:]) / scale[count:])
        return torch.cat(whole, dim=1).float()
