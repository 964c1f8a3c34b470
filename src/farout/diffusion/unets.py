"""Networks by preset: diffusers' U-Nets, with or without classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens

__all__ = ["NETWORKS", "NetworkName", "build_network", "create_conditioning"]

NetworkName = Literal["tiny", "small", "paper", "cifar", "iddpm", "tokens"]

CLASS_TOKENS = 4
"""Tokens of a class in the network `tokens`."""


@dataclass(frozen=True)
class _UNet:
    channels: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    groups: int = 32
    eps: float = 1e-6
    dropout: float = 0.0
    variances: bool = False
    """Whether there are twice the output channels; the second half (variances) is dropped."""
    cross: bool = False
    """Whether attention is to the tokens of a class: a `UNet2DConditionModel`."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"attention_head_dim": None})


NETWORKS: dict[str, _UNet] = {
    "tiny": _UNet((32, 64, 64), 1, (False, False, True), groups=8),
    "small": _UNet((128, 256, 256), 1, (False, False, True)),
    "paper": _UNet((256, 512, 768), 2, (False, True, True)),
    "cifar": _UNet(
        (128, 256, 256, 256),
        2,
        (False, True, False, False),
        dropout=0.1,
        settings={
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
        },
    ),
    "iddpm": _UNet(
        (128, 256, 256, 256),
        3,
        (False, True, True, False),
        eps=1e-5,
        dropout=0.3,
        variances=True,
        settings={"attention_head_dim": 64, "resnet_time_scale_shift": "scale_shift"},
    ),
    "tokens": _UNet(
        (32, 64, 64),
        1,
        (False, False, True),
        groups=8,
        cross=True,
        settings={"attention_head_dim": 4, "cross_attention_dim": 64},  # diffusers calls the number of heads so here
    ),
}
"""`tiny`: 1.1 M parameters, for CPUs; `small`: 17.7 M, the reconstruction paper's released code; `paper`: 171 M, the
configuration behind its published numbers; `cifar`: 35.75 M, the network of Ho et al. 2020 for 32 x 32 pixels, which
the denoising paper trains; `iddpm`: 52.5 M, that of Nichol & Dhariwal 2021 with attention at 16 x 16 and 8 x 8 in 4
heads; `tokens`: 1.4 M, for CPUs, told its classes by cross-attention. Where nothing else is said, attention has one
head, and norms are group norms with eps 1e-6."""


def build_network(
    name: NetworkName, channels: int, size: int, *, classes: int | None = None, dropout: float | None = None
) -> nn.Module:
    """A fresh U-Net for images of `channels` channels; `size` is what its configuration says, not a limit.

    With `classes` a `UNet2DModel` has a table of that many class embeddings and a null row; the network `tokens` is a
    `UNet2DConditionModel`, whose tokens `create_conditioning` makes. `dropout` is the network's own where None.

    Raises FaroutError for an unknown name, a dropout outside [0, 1), or `tokens` without classes.
    """
    if name not in NETWORKS:
        raise FaroutError(f"there is no network {name!r}; expected one of {', '.join(NETWORKS)}")
    sizes = NETWORKS[name]
    if dropout is not None and not 0 <= dropout < 1:
        raise FaroutError(f"the network's dropout is {dropout}; expected a number in [0, 1)")
    if sizes.cross and classes is None:
        raise FaroutError(f"the network {name!r} attends to classes; train it with classes, or take another")
    common = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels * (2 if sizes.variances else 1),
        "layers_per_block": sizes.blocks,
        "block_out_channels": sizes.channels,
        "norm_num_groups": sizes.groups,
        "norm_eps": sizes.eps,
        "dropout": sizes.dropout if dropout is None else dropout,
        **_blocks(sizes),
        **sizes.settings,
    }
    import diffusers  # takes seconds; a `DiffusionConfig` requires only the names of the networks

    if sizes.cross:
        return diffusers.UNet2DConditionModel(**common)
    return diffusers.UNet2DModel(**common, num_class_embeds=None if classes is None else classes + 1)


def _blocks(sizes: _UNet) -> dict[str, tuple[str, ...]]:
    """Names of the blocks on the way down and up."""
    kind = "CrossAttn" if sizes.cross else "Attn"
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" if wanted else "DownBlock2D" for wanted in sizes.attention),
        "up_block_types": tuple(f"{kind}UpBlock2D" if w else "UpBlock2D" for w in reversed(sizes.attention)),
    }


def create_conditioning(network: nn.Module, class_names: Sequence[str], *, has_null: bool) -> Conditioning:
    """The conditioning of a network that `build_network` made with these classes."""
    import diffusers

    if isinstance(network, diffusers.UNet2DConditionModel):
        width = int(network.config["cross_attention_dim"])
        return ClassTokens.create_random(class_names, CLASS_TOKENS, width, has_null=has_null)
    return ClassVectors(network, class_names, has_null=has_null)
