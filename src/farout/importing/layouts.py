"""The layouts that `farout import` knows: how their tensors are called, and which function converts them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from farout.core.errors import FaroutError, StoreError, suggest_names
from farout.importing.checkpoint import Checkpoint

__all__ = ["LAYOUTS", "Layout", "describe_layouts", "recognize_layout"]


@dataclass(frozen=True)
class Layout:
    """A layout of weights.

    Attributes:
        summary: what is published in this layout.
        signature: names of tensors that every file of the layout has, after a common prefix.
        function: "module:function" within `farout.importing`, which converts the tensors.
        absent: parts of names that no file of the layout has.
        settings: settings of `ImportSettings` that the function reads.
    """

    summary: str
    signature: tuple[str, ...]
    function: str
    absent: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def find_prefix(self, names: Iterable[str]) -> str | None:
        """The shortest prefix after which the signature is among the names; None: there is none."""
        known, first = set(names), self.signature[0]
        prefixes = sorted((name[: -len(first)] for name in known if name.endswith(first)), key=len)
        for prefix in prefixes:
            complete = all(prefix + name in known for name in self.signature)
            own = [name for name in known if name.startswith(prefix)]
            if (not prefix or prefix.endswith(".")) and complete and not any(a in n for a in self.absent for n in own):
                return prefix
        return None

    def import_function(self) -> Callable[..., Any]:
        """The function that converts the tensors."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"farout.importing.{module}"), name)
        return function


_UNET = ("size", "classes", "null_class", "schedule", "beta_start", "beta_end")

LAYOUTS = {
    "monai": Layout(
        "DiffusionModelUNet of MONAI, as in ddpm-ood's checkpoint.pth",
        ("down_blocks.0.resnets.0.conv1.conv.weight", "middle_block.resnet_1.conv1.conv.weight", "out.2.conv.weight"),
        "unets:convert_monai",
        settings=(*_UNET, "head_width", "heads"),
    ),
    "ddim": Layout(
        "U-Net of Ho et al. 2020 in PyTorch (ermongroup/ddim), as in DiffOOD's *.ckpt",
        ("temb.dense.0.weight", "down.0.block.0.norm1.weight", "mid.attn_1.q.weight", "conv_out.weight"),
        "unets:convert_ddim",
        settings=_UNET,
    ),
    "guided-diffusion": Layout(
        "U-Net of OpenAI's guided-diffusion and improved-diffusion",
        ("time_embed.0.weight", "input_blocks.1.0.in_layers.0.weight", "middle_block.1.qkv.weight", "out.2.weight"),
        "unets:convert_guided_diffusion",
        settings=(*_UNET, "head_width", "heads", "train_steps"),
    ),
    "lfdn": Layout(
        "LFDN, the denoiser of features of DLSR's checkpoint-*.pth",
        ("input_proj.1.weight", "time_embed.0.weight", "res_blocks.0.in_layers.2.weight", "out.2.weight"),
        "features:convert_lfdn",
        settings=("first", "backbone", "backbone_weights", "images"),
    ),
    "efficientnet": Layout(
        "EfficientNet of efficientnet_pytorch, as in DLSR's efficientnet-b4-6ed6700e.pth",
        ("_conv_stem.weight", "_bn0.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"),
        "features:convert_efficientnet",
    ),
}
"""The layouts by the name that `--kind` takes, in the order in which they are tried."""


def describe_layouts() -> str:
    """One line per layout."""
    return "\n".join(f"  {name}: {layout.summary}" for name, layout in LAYOUTS.items())


def recognize_layout(checkpoint: Checkpoint, kind: str = "auto") -> tuple[str, Checkpoint]:
    """The name of the layout and the tensors that belong to it, without their common prefix.

    Args:
        checkpoint: the weights.
        kind: name of a layout; `auto`: the first one that fits.

    Raises:
        FaroutError: for an unknown kind.
        StoreError: for weights of another layout.
    """
    if kind != "auto" and kind not in LAYOUTS:
        raise FaroutError(f"there is no layout {kind!r}; {suggest_names(kind, LAYOUTS)}")
    for name, layout in LAYOUTS.items():
        prefix = layout.find_prefix(checkpoint.tensors) if kind in ("auto", name) else None
        if prefix is not None:
            return name, checkpoint.select(prefix)
    examples = ", ".join(list(checkpoint.tensors)[:5])
    part = f" in {checkpoint.part!r}" if checkpoint.part else ""
    found = f"{checkpoint.path} has {len(checkpoint.tensors)} tensors{part}, such as {examples}"
    if kind != "auto":
        raise StoreError(f"{found}; these are not weights of the layout {kind} ({LAYOUTS[kind].summary})")
    raise StoreError(f"{found}; known layouts are:\n{describe_layouts()}")
