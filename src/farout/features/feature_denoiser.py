"""The latent feature denoiser: a time-conditioned residual network on vectors (Yang et al. 2024, section 3.3)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from farout.core.errors import FaroutError

__all__ = ["FeatureDenoiser", "initialize_with_zeros"]

M = TypeVar("M", bound=nn.Module)


class FeatureDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as in diffusers
    """Denoises feature vectors (B, width) at levels t; the output is zero before training.

    h = Linear(SiLU(x)); in each block u = Linear(SiLU(LN(h))), shifted by Linear(SiLU(e(t))), and
    h = h + Linear0(Dropout(SiLU(LN(u)))); the output is Linear0(SiLU(LN(h))). Linear0 starts at zero, LN is a group
    norm with one group. e(t) = Linear(SiLU(Linear([cos, sin](t f_k)))), f_k = 10000^(-k / (hidden / 2)).

    Args:
        width: number of features c.
        hidden: width of the residual stream; None: 2 c, as in the paper.
        bottleneck: width inside a block; None: 2 c, as in the paper.
        embedding: width of the time embedding; None: c, as in the paper.
        blocks: number of blocks; 16 in the paper.
        dropout: dropout rate; 0 in the paper.
        input_activation: SiLU on the input, as in the released code; it is not monotone below zero, so part of the
            information in negative features is lost.
        scale_shift: time also scales u, (1 + s) LN(u) + b, instead of shifting it before its norm.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        bottleneck: int | None = None,
        embedding: int | None = None,
        blocks: int = 16,
        dropout: float = 0.0,
        input_activation: bool = True,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        inner, narrow, time = hidden or 2 * width, bottleneck or 2 * width, embedding or width
        given = [n for n in (width, hidden, bottleneck, embedding, blocks) if n is not None]
        if min(given) < 1 or inner % 2:
            raise FaroutError(
                f"widths and blocks must be at least 1 and hidden an even number, got {dict(self.config)}"
            )
        self.num_frequencies = inner // 2
        self.enter = nn.Linear(width, inner)
        self.time = nn.Sequential(nn.Linear(inner, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stack = nn.ModuleList(_Block(inner, narrow, time, dropout, scale_shift) for _ in range(blocks))
        self.leave = nn.Sequential(nn.GroupNorm(1, inner), nn.SiLU(), initialize_with_zeros(nn.Linear(inner, width)))
        self.activation = nn.SiLU() if input_activation else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, width), t (B,) -> (B, width)."""
        e = self.time(self._time_embedding(t))
        h = self.enter(self.activation(x))
        for block in self.stack:
            h = block(h, e)
        return self.leave(h)

    def _time_embedding(self, t: Tensor) -> Tensor:
        k = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / self.num_frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Block(nn.Module):
    def __init__(self, inner: int, narrow: int, time: int, dropout: float, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.narrow = nn.Sequential(nn.GroupNorm(1, inner), nn.SiLU(), nn.Linear(inner, narrow))
        self.time = nn.Linear(time, 2 * narrow if scale_shift else narrow)
        self.norm = nn.GroupNorm(1, narrow)
        self.widen = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), initialize_with_zeros(nn.Linear(narrow, inner)))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        u, shift = self.narrow(h), self.time(e)
        if not self.scale_shift:
            return h + self.widen(self.norm(u + shift))
        scale, shift = shift.chunk(2, dim=1)
        return h + self.widen(self.norm(u) * (1 + scale) + shift)


def initialize_with_zeros(layer: M) -> M:
    """Set all parameters of a layer to zero; returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
