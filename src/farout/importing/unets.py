"""U-Nets of other programs as diffusers' `UNet2DModel`, which computes the same function."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError, StoreError
from farout.core.network_size import limit_parameters
from farout.data.preprocessing import Preprocessing
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.importing.checkpoint import Checkpoint, check_shapes
from farout.importing.imported import FormulaSchedule, Imported, ImportSettings, describe_origin

__all__ = ["convert_ddim", "convert_guided_diffusion", "convert_monai"]

_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.0015, 0.0195), "sigmoid": (1e-4, 0.02), "cosine": (1e-4, 0.02)}
_NETWORK_LEVELS = 1000
"""Largest time that the published networks were trained with; more noise levels are rescaled to it."""
_MAX_LEVELS, _MAX_BLOCKS = 16, 64


def convert_monai(checkpoint: Checkpoint, settings: ImportSettings, ema: bool) -> Imported:
    """MONAI's `DiffusionModelUNet` without cross-attention, as ddpm-ood trains it.

    Released versions create the output projection of every attention and do not apply it, so the projection is the
    identity here. MONAI core (from 1.4) calls it `out_proj` and applies it.
    """
    names = (
        (r"\.(conv1|conv2)\.conv\.", r".\1."),
        (r"\.skip_connection\.conv\.", ".conv_shortcut."),
        (r"\.downsampler\.op\.conv\.", ".downsamplers.0.conv."),
        (r"\.downsampler\.", ".downsamplers.0."),
        (r"\.upsampler\.(?:conv|postconv)\.conv\.", ".upsamplers.0.conv."),
        (r"\.upsampler\.", ".upsamplers.0."),
        (r"^middle_block\.resnet_1\.", "mid_block.resnets.0."),
        (r"^middle_block\.resnet_2\.", "mid_block.resnets.1."),
        (r"^middle_block\.attention\.", "mid_block.attentions.0."),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.attn\.(to_[qkv])\.", r"\1.\2."),
        (r"(\.attentions\.\d+)\.attn\.out_proj\.", r"\1.to_out.0."),
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^conv_in\.conv\.", "conv_in."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.conv\.", "conv_out."),
    )
    tensors = {_rename(name, names): value for name, value in checkpoint.tensors.items() if ".proj_attn." not in name}
    for name in [name for name in tensors if name.endswith(".to_q.weight")]:
        attention, width = name.removesuffix("to_q.weight"), len(tensors[name])
        tensors.setdefault(f"{attention}to_out.0.weight", torch.eye(width))
        tensors.setdefault(f"{attention}to_out.0.bias", torch.zeros(width))
    gray = len(_get(tensors, "conv_out.weight", checkpoint)) == 1
    return _create_model(
        checkpoint,
        settings,
        "monai",
        tensors,
        {"norm_eps": 1e-6, "attention_head_dim": 256},
        schedule="scaled_linear",
        size=28 if gray else 32,
        has_null=False,
        unit_range=True,
    )


def convert_ddim(checkpoint: Checkpoint, settings: ImportSettings, ema: bool) -> Imported:
    """The PyTorch version of Ho et al.'s U-Net: one attention head, asymmetric padding; DiffOOD adds a class table."""
    levels = 1 + max((int(m[1]) for name in checkpoint.tensors if (m := re.match(r"up\.(\d+)\.", name))), default=0)
    names = (
        (r"^down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
        (r"^down\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
        (r"^down\.(\d+)\.downsample\.conv\.", r"down_blocks.\1.downsamplers.0.conv."),
        (r"^up\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
        (r"^up\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
        (r"^up\.(\d+)\.upsample\.conv\.", r"up_blocks.\1.upsamplers.0.conv."),
        (r"^mid\.block_1\.", "mid_block.resnets.0."),
        (r"^mid\.block_2\.", "mid_block.resnets.1."),
        (r"^mid\.attn_1\.", "mid_block.attentions.0."),
        (r"\.temb_proj\.", ".time_emb_proj."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
        (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
        (r"^norm_out\.", "conv_norm_out."),
        (r"^label_emb\.", "class_embedding."),
    )
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        if name == "logvar":  # of the variant `bayesian`, which the network does not use
            continue
        renamed = _rename(name, names)
        # up blocks are numbered from the highest resolution, those of diffusers from the lowest
        renamed = re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", renamed)
        tensors[renamed] = value.flatten(1) if ".to_" in renamed and value.ndim == 4 else value
    return _create_model(
        checkpoint,
        settings,
        "ddim",
        tensors,
        {
            "norm_eps": 1e-6,
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
        },
        schedule="linear",
        size=32,
        has_null=True,
    )


def convert_guided_diffusion(checkpoint: Checkpoint, settings: ImportSettings, ema: bool) -> Imported:
    """OpenAI's U-Net, with scale and shift by time, resampling by convolutions or residual blocks, and variances."""
    given = checkpoint.tensors
    if any("transformer_blocks" in name for name in given):
        raise StoreError(f"{checkpoint.path} is a U-Net with cross-attention, as of Stable Diffusion")
    blocks = 1 + max((int(m[1]) for name in given if (m := re.match(r"output_blocks\.(\d+)\.", name))), default=0)
    upsampling = re.compile(r"output_blocks\.(\d+)\.(?:[12]\.conv|[12]\.in_layers\.0)\.weight")
    first = min((int(m[1]) for name in given if (m := upsampling.match(name))), default=blocks - 1)
    per_level = first + 1  # residual blocks of a level of the way up, one more than on the way down
    levels = blocks // per_level
    if levels * per_level != blocks or levels > _MAX_LEVELS or per_level > _MAX_BLOCKS:
        raise StoreError(
            f"{checkpoint.path} has {blocks} output blocks with the first upsampling in block {first}; expected the "
            "same number of blocks at every resolution"
        )
    places = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    for level in range(levels):
        for block in range(per_level):
            down, up = f"input_blocks.{1 + level * per_level + block}", f"output_blocks.{level * per_level + block}"
            last = block == per_level - 1
            places[f"{down}.0"] = f"down_blocks.{level}." + ("downsamplers.0" if last else f"resnets.{block}")
            attentions[f"{down}.1"] = f"down_blocks.{level}.attentions.{block}"
            places[f"{up}.0"] = f"up_blocks.{level}.resnets.{block}"
            attentions[f"{up}.1"] = f"up_blocks.{level}.attentions.{block}"
            if last:
                is_attention = f"{up}.1.qkv.weight" in given
                places[f"{up}.{2 if is_attention else 1}"] = f"up_blocks.{level}.upsamplers.0"
    inner = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
        "op": "conv",
        "conv": "conv",
    }
    moved = {f"{old}.{a}": f"{new}.{b}" for old, new in places.items() for a, b in inner.items()}
    moved |= {f"{old}.norm": f"{new}.group_norm" for old, new in attentions.items()}
    moved |= {f"{old}.proj_out": f"{new}.to_out.0" for old, new in attentions.items()}
    moved |= {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    widths = {len(value) // 3 for name, value in given.items() if name.endswith(".qkv.weight")}
    head_width = _resolve_head_width(settings, widths, 64, checkpoint)
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".qkv"):
            own = attentions.get(layer.removesuffix(".qkv"), layer)
            # rows are ordered by head, and within a head by query, key and value
            rows = value.reshape(len(value) // (3 * head_width), 3, head_width, *value.shape[1:2])
            for number, letter in enumerate("qkv"):
                tensors[f"{own}.to_{letter}.{leaf}"] = rows[:, number].flatten(0, 1)
        else:
            renamed = f"{moved.get(layer, layer)}.{leaf}"
            tensors[renamed] = value.flatten(1) if renamed.endswith(".to_out.0.weight") else value
    learned = (
        len(_get(tensors, "conv_out.weight", checkpoint)) == 2 * _get(tensors, "conv_in.weight", checkpoint).shape[1]
    )
    by_blocks = any(name.endswith("downsamplers.0.norm1.weight") for name in tensors)
    return _create_model(
        checkpoint,
        settings,
        "guided-diffusion",
        tensors,
        {"norm_eps": 1e-5, "attention_head_dim": head_width},
        schedule="cosine" if learned and not by_blocks else "linear",
        size=32 if not by_blocks else 64 * 2 ** max(0, levels - 4),
        has_null=False,
    )


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def _get(tensors: Mapping[str, Tensor], name: str, checkpoint: Checkpoint) -> Tensor:
    if name not in tensors or tensors[name].ndim < 2:
        raise StoreError(f"{checkpoint.path} lacks the weights of {name}; the file is incomplete")
    return tensors[name]


def _resolve_head_width(settings: ImportSettings, widths: set[int], published: int, checkpoint: Checkpoint) -> int:
    """Channels per attention head, the same in all attentions of these widths."""
    if settings.heads is not None and settings.head_width is not None:
        raise FaroutError("heads and head_width exclude each other; give one of them")
    per_head = {width // settings.heads for width in widths} if settings.heads else {settings.head_width or published}
    if len(per_head) > 1:
        raise FaroutError(
            f"{settings.heads} heads for attentions of {sorted(widths)} channels are heads of different widths, which "
            "diffusers' UNet2DModel does not support"
        )
    width = per_head.pop()
    if width < 1 or any(each % width for each in widths):
        raise FaroutError(
            f"{checkpoint.path}: attentions of {sorted(widths)} channels have no heads of {width} channels; the file "
            "does not contain their number: give --head-width, or --heads"
        )
    return width


def _create_model(
    checkpoint: Checkpoint,
    settings: ImportSettings,
    layout: str,
    tensors: dict[str, Tensor],
    fixed: dict[str, Any],
    *,
    schedule: FormulaSchedule,
    size: int,
    has_null: bool,
    unit_range: bool = False,
) -> Imported:
    """The diffusion model of tensors with diffusers' names.

    Args:
        checkpoint: where the tensors come from.
        settings: what replaces the assumptions.
        layout: name of the layout.
        tensors: the tensors.
        fixed: settings of `UNet2DModel` that belong to the layout.
        schedule: schedule of the published models.
        size: image size of the published models.
        has_null: whether the class table of the published models has a null row.
        unit_range: images in [0, 1], each scaled by its own minimum and maximum (ddpm-ood), instead of [-1, 1].
    """
    side = settings.size or size
    kind = settings.schedule or schedule
    if layout == "monai":
        widths = {len(value) for name, value in tensors.items() if name.endswith(".to_q.weight")}
        fixed = {**fixed, "attention_head_dim": _resolve_head_width(settings, widths, 256, checkpoint)}
    noise = _create_schedule(kind, settings)
    network = _build_network(tensors, fixed, side, checkpoint)
    channels = int(tensors["conv_in.weight"].shape[1])
    if channels not in (1, 3):
        raise StoreError(
            f"{checkpoint.path} is a U-Net of {channels} channels; models of latents are imported with their "
            "autoencoder, which this file does not contain"
        )
    assumed = {
        "noise schedule": f"{kind}, {settings.train_steps or noise.num_levels} levels"
        + ("" if kind == "cosine" else f", betas {noise.beta_start:g} to {noise.beta_end:g}"),
        "image size": f"{side} x {side}",
        "pixel values": "0 to 1, min-max per image" if unit_range else "-1 to 1",
        "prediction": "epsilon",
    }
    if fixed["attention_head_dim"] is not None:
        assumed["attention heads"] = f"{fixed['attention_head_dim']} channels each"
    conditioning = None
    if "class_embedding.weight" in tensors:
        rows = len(tensors["class_embedding.weight"])
        null = has_null if settings.null_class is None else settings.null_class
        names = settings.classes or tuple(map(str, range(rows - null)))
        conditioning = ClassVectors(network, names, has_null=null)
        assumed["null condition"] = "the last row of the class table" if null else "none"
    elif settings.classes or settings.null_class is not None:
        raise FaroutError(f"{checkpoint.path} is an unconditional U-Net, without classes; leave classes out")
    model = DiffusionModel(
        network,
        noise,
        Preprocessing(
            size=(side, side), channels=channels, native=(side, side), scaling="minmax" if unit_range else "fixed"
        ),
        data_range=(0.0, 1.0) if unit_range else (-1.0, 1.0),
        conditioning=conditioning,
        provenance=describe_origin(checkpoint, layout, assumed),
    )
    classes = "unconditional" if conditioning is None else f"{conditioning.num_classes} classes"
    widths_text = ", ".join(map(str, network.config["block_out_channels"]))  # type: ignore[index]
    command = (
        "farout fit reconstruction NORMAL_IMAGES --diffusion {out} --out detector/"
        if conditioning is None
        else "farout sample {out} --count 16 --classes all --out samples/"
    )
    return Imported(model, f"U-Net of {widths_text} channels, {classes}", assumed, command)


def _create_schedule(kind: FormulaSchedule, settings: ImportSettings) -> NoiseSchedule:
    """The schedule in levels of the network's time, 0 to 999."""
    low, high = _BETAS[kind]
    low = low if settings.beta_start is None else settings.beta_start
    high = high if settings.beta_end is None else settings.beta_end
    steps = settings.train_steps or _NETWORK_LEVELS
    schedule = NoiseSchedule(kind, low, high, num_levels=steps)
    if steps <= _NETWORK_LEVELS:
        return schedule
    if steps % _NETWORK_LEVELS:
        raise FaroutError(f"train_steps above 1000 must be a multiple of 1000, got {steps}")
    # the network is given t * 1000 / steps; every (steps / 1000)th level is one of its integer times
    abar = schedule.abar[:: steps // _NETWORK_LEVELS]
    ratio = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return NoiseSchedule("trained", low, high, num_levels=_NETWORK_LEVELS, betas=tuple((1 - ratio).tolist()))


def _build_network(tensors: dict[str, Tensor], fixed: dict[str, Any], side: int, checkpoint: Checkpoint) -> nn.Module:
    """`UNet2DModel` with these tensors; raises StoreError for missing and unexpected ones, and for other shapes."""
    path = checkpoint.path
    channels, attends = [], []
    for level in range(_MAX_LEVELS):
        if f"down_blocks.{level}.resnets.0.conv1.weight" not in tensors:
            break
        channels.append(len(tensors[f"down_blocks.{level}.resnets.0.conv1.weight"]))
        attends.append(f"down_blocks.{level}.attentions.0.to_q.weight" in tensors)
    blocks = sum(f"down_blocks.0.resnets.{number}.conv1.weight" in tensors for number in range(_MAX_BLOCKS))
    by_blocks = any(".downsamplers.0.norm1." in name for name in tensors)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if by_blocks else ("DownBlock2D", "UpBlock2D")
    projected = len(_get(tensors, "down_blocks.0.resnets.0.time_emb_proj.weight", checkpoint))
    classes = tensors.get("class_embedding.weight")
    config = {
        "sample_size": side,
        "in_channels": _get(tensors, "conv_in.weight", checkpoint).shape[1],
        "out_channels": len(_get(tensors, "conv_out.weight", checkpoint)),
        "layers_per_block": blocks,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("AttnDownBlock2D" if each else plain[0] for each in attends),
        "up_block_types": tuple("AttnUpBlock2D" if each else plain[1] for each in reversed(attends)),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,  # by default, a middle attention has no norm if time scales and shifts
        "num_class_embeds": None if classes is None else len(classes),
        "resnet_time_scale_shift": "scale_shift" if projected == 2 * channels[0] else "default",
        **({"downsample_type": "resnet", "upsample_type": "resnet"} if by_blocks else {}),
        **fixed,
    }
    import diffusers  # takes seconds

    unet: Any = diffusers.UNet2DModel
    try:
        with limit_parameters(4 * sum(value.numel() for value in tensors.values()), "the U-Net of this layout", path):
            network: nn.Module = unet(**config)
    except StoreError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: no U-Net has these weights ({str(error).splitlines()[0]})") from error
    check_shapes(tensors, network.state_dict(), path, "the whole U-Net", "diffusers")
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return network
