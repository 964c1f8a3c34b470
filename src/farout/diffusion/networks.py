"""Networks by preset: diffusers' U-Net at three sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import diffusers
from torch import nn

from farout.errors import FaroutError

__all__ = ["NETWORKS", "NetworkName", "build_network"]

NetworkName = Literal["tiny", "small", "paper"]


@dataclass(frozen=True)
class _UNet:
    channels: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    groups: int = 32


NETWORKS: dict[str, _UNet] = {
    "tiny": _UNet((32, 64, 64), 1, (False, False, True), groups=8),
    "small": _UNet((128, 256, 256), 1, (False, False, True)),
    "paper": _UNet((256, 512, 768), 2, (False, True, True)),
}
"""`tiny`: 1.1 M parameters, for CPUs; `small`: 17.7 M, the reconstruction paper's released code; `paper`: 171 M, the
configuration behind its published numbers. Attention has one head; norms are group norms with eps 1e-6."""


def build_network(name: NetworkName, channels: int, size: int) -> nn.Module:
    """A fresh `UNet2DModel` for images of `channels` channels; `size` is what its configuration says, not a limit.

    Raises FaroutError for an unknown name.
    """
    if name not in NETWORKS:
        raise FaroutError(f"there is no network {name!r}; expected one of {', '.join(NETWORKS)}")
    sizes = NETWORKS[name]
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=sizes.blocks,
        block_out_channels=sizes.channels,
        down_block_types=tuple("AttnDownBlock2D" if wanted else "DownBlock2D" for wanted in sizes.attention),
        up_block_types=tuple("AttnUpBlock2D" if wanted else "UpBlock2D" for wanted in reversed(sizes.attention)),
        attention_head_dim=None,
        norm_num_groups=sizes.groups,
        norm_eps=1e-6,
    )
