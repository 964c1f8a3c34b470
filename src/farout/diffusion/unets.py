"""U-Nets of diffusers by preset, with or without classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens

__all__ = ["NETWORKS", "NetworkName", "UNetConfig", "build_network", "create_conditioning", "network_config"]

NetworkName = Literal["tiny", "compact", "mini", "small", "paper", "cifar", "iddpm", "tokens"]

CLASS_TOKENS = 4
"""Number of tokens per class of the network `tokens`."""


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    groups: int = 32
    eps: float = 1e-6
    dropout: float = 0.0
    variances: bool = False
    """Whether the output has twice the channels; the second half (variances) is not used."""
    cross_attention: bool = False
    """Whether the network attends to class tokens: a `UNet2DConditionModel`."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"attention_head_dim": None})


NETWORKS: dict[str, UNetConfig] = {
    "tiny": UNetConfig((32, 64, 64), 1, (False, False, True), groups=8),
    "compact": UNetConfig((64, 128), 1, (False, False), groups=8),
    "mini": UNetConfig((64, 64), 1, (False, False), groups=8),
    "small": UNetConfig((128, 256, 256), 1, (False, False, True)),
    "paper": UNetConfig((256, 512, 768), 2, (False, True, True)),
    "cifar": UNetConfig(
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
    "iddpm": UNetConfig(
        (128, 256, 256, 256),
        3,
        (False, True, True, False),
        eps=1e-5,
        dropout=0.3,
        variances=True,
        settings={"attention_head_dim": 64, "resnet_time_scale_shift": "scale_shift"},
    ),
    "tokens": UNetConfig(
        (32, 64, 64),
        1,
        (False, False, True),
        groups=8,
        cross_attention=True,
        settings={
            "attention_head_dim": 4,
            "cross_attention_dim": 64,
        },  # the number of heads, despite its name in diffusers
    ),
}
"""`tiny`: 1.1 M parameters, for CPUs; `compact`: 2.6 M, for patches of 2 x 2 pixels, a third of the time of `tiny` per
image on a CPU with bf16 (docs/results.md, section 22); `mini`: 1.1 M, likewise, for small files; `small`: 17.7 M, the
reconstruction paper's released code; `paper`: 171 M, the configuration of its published numbers; `cifar`: 35.75 M, the
network of Ho et al. 2020 for 32 x 32 pixels, which the denoising paper trains; `iddpm`: 52.5 M, that of Nichol &
Dhariwal 2021 with attention at 16 x 16 and 8 x 8 in 4 heads; `tokens`: 1.4 M, for CPUs, with classes by
cross-attention. By default attention has one head, and norms are group norms with eps 1e-6."""


def build_network(
    name: NetworkName, channels: int, size: int, *, classes: int | None = None, dropout: float | None = None
) -> nn.Module:
    """Builds a U-Net with random weights.

    Args:
        name: a name in `NETWORKS`.
        channels: channels of the images.
        size: side of the images, written to the network's configuration; other sizes work too.
        classes: number of classes: a `UNet2DModel` has a table of that many class embeddings and a null row; the
            network `tokens` is a `UNet2DConditionModel`, whose tokens `create_conditioning` creates.
        dropout: dropout rate; None: that of the preset.

    Raises FaroutError for an unknown name, a dropout outside [0, 1), or `tokens` without classes.
    """
    if name not in NETWORKS:
        raise FaroutError(f"there is no network {name!r}; expected one of {', '.join(NETWORKS)}")
    preset = NETWORKS[name]
    if dropout is not None and not 0 <= dropout < 1:
        raise FaroutError(f"the network's dropout is {dropout}; expected a number in [0, 1)")
    if preset.cross_attention and classes is None:
        raise FaroutError(f"the network {name!r} requires classes; train it with classes, or choose another network")
    common = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels * (2 if preset.variances else 1),
        "layers_per_block": preset.blocks,
        "block_out_channels": preset.channels,
        "norm_num_groups": preset.groups,
        "norm_eps": preset.eps,
        "dropout": preset.dropout if dropout is None else dropout,
        **_block_types(preset),
        **preset.settings,
    }
    import diffusers  # takes seconds; a `DiffusionConfig` requires only the names of the networks

    network: nn.Module
    if preset.cross_attention:
        conditional_unet: Any = diffusers.UNet2DConditionModel
        network = conditional_unet(**common)
    else:
        unet: Any = diffusers.UNet2DModel
        network = unet(**common, num_class_embeds=None if classes is None else classes + 1)
    return network


def network_config(network: nn.Module) -> Any:
    """The configuration of a network or autoencoder of diffusers, a mapping that also has attributes."""
    return network.config


def _block_types(preset: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Names of the down and up blocks."""
    kind = "CrossAttn" if preset.cross_attention else "Attn"
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" if attends else "DownBlock2D" for attends in preset.attention),
        "up_block_types": tuple(
            f"{kind}UpBlock2D" if attends else "UpBlock2D" for attends in reversed(preset.attention)
        ),
    }


def create_conditioning(network: nn.Module, class_names: Sequence[str], *, has_null: bool) -> Conditioning:
    """The conditioning of a network that `build_network` built with these classes."""
    import diffusers  # takes seconds, see `build_network`

    if isinstance(network, diffusers.UNet2DConditionModel):
        width = int(network_config(network)["cross_attention_dim"])
        return ClassTokens.create_random(class_names, CLASS_TOKENS, width, has_null=has_null)
    return ClassVectors(network, class_names, has_null=has_null)
