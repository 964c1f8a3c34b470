"""Networks of classifiers by name, and where in a network its last layer and its last pooling are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.features.backbones import get_input_config

__all__ = [
    "NETWORKS",
    "OUTLIER",
    "RESNETS",
    "CosineNetwork",
    "NetworkSpec",
    "Stem",
    "find_head",
    "find_pool",
    "watched",
]

Stem = Literal["small", "imagenet"]

RESNETS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
}
"""The networks that have a choice of stems."""
_WIDE = {"wrn40_2": (40, 2), "wrn16_2": (16, 2), "wrn16_1": (16, 1)}
"""Depth and width factor."""

NETWORKS = (*RESNETS, *_WIDE)
"""torchvision's ResNets and pytorch-ood's WideResNets; any other name is looked up in timm."""

OUTLIER = "(outlier)"
"""Name of the class that the loss `k+1` adds for outliers, the last one; no folder is called that."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network that can be built again from a few plain values.

    Args:
        name: `resnet18`, `resnet34`, `resnet50` (He et al. 2016, torchvision's), `wrn40_2` (2.2 M parameters),
            `wrn16_2` (0.7 M) or `wrn16_1` (0.2 M, for CPUs; Zagoruyko and Komodakis 2016, pytorch-ood's), or a name
            of timm's.
        classes: number of classes, at least 2.
        channels: 1 or 3.
        size: (height, width) in pixels; only transformers with a fixed grid look at it.
        stem: of ResNets: `small`, a 3x3 convolution of stride 1 without max-pooling, for small images, or `imagenet`;
            None: `small` for ResNets. Other networks have one stem only.
        space: dimensions of a space in which classes are fixed directions (see `CosineNetwork`); None: the last layer
            is the network's own.

    Raises FaroutError for a name that is not known, and for values out of range.
    """

    name: str
    classes: int
    channels: int = 3
    size: tuple[int, int] = (32, 32)
    stem: Stem | None = None
    space: int | None = None

    def __post_init__(self) -> None:
        if self.classes < 2 or self.channels not in (1, 3):
            raise FaroutError(f"classes {self.classes} (expected 2 or more), channels {self.channels} (1 or 3)")
        if self.space is not None and self.space < 2:
            raise FaroutError(f"classes as directions require a space of 2 or more dimensions, got {self.space}")
        if self.stem is not None and (self.name not in RESNETS or self.stem not in get_args(Stem)):
            known = f"stems are {' and '.join(get_args(Stem))}, and only {', '.join(RESNETS)} have a choice"
            raise FaroutError(f"{self.name} has no stem {self.stem!r}; {known}")
        if self.name not in NETWORKS:
            _check_timm(self.name)

    def build(self) -> nn.Module:
        """The network with fresh weights: normalised images (B, C, H, W) -> logits (B, classes)."""
        if self.space is not None:
            return CosineNetwork(replace(self, classes=self.space, space=None).build(), self.space, self.classes)
        if self.name in RESNETS:
            return _resnet(self.name, self.classes, self.channels, self.stem or "small")
        if self.name in _WIDE:
            return _wide_resnet(*_WIDE[self.name], self.classes, self.channels)
        return _timm(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`; the rare `space` only where there is one."""
        values = {**asdict(self), "size": list(self.size)}
        return values if self.space is not None else {name: values[name] for name in values if name != "space"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """The inverse of `to_dict`."""
        return cls(**{**values, "size": tuple(values["size"])})


class CosineNetwork(nn.Module):
    """A network whose classes are fixed directions of a space: logits = W u, u = z / |z|, z the answer of `body`.

    With rows of length 1 / T in W, row k along the vector of class k, the logits are cosines divided by the temperature
    T. W is the last linear layer, so the features of such a classifier are u. It is not trained.

    Args:
        body: images (B, C, H, W) -> z (B, space).
        space: length of z.
        classes: rows of W.
    """

    def __init__(self, body: nn.Module, space: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(space, classes, bias=False)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(functional.normalize(self.body(x).float(), dim=1))


def _check_timm(name: str) -> None:
    try:
        get_input_config(name)
    except FaroutError as error:
        raise FaroutError(f"{error}; networks of classifiers are {', '.join(NETWORKS)} and timm's") from error


def _resnet(name: str, classes: int, channels: int, stem: Stem) -> nn.Module:
    network = RESNETS[name](weights=None, num_classes=classes)
    if stem == "small":
        network.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def _wide_resnet(depth: int, width: int, classes: int, channels: int) -> nn.Module:
    from pytorch_ood.model import WideResNet  # brings SciPy and all of its detectors: seconds

    class AnySize(WideResNet):
        """The library's network pools 8 x 8 maps, those of 32 x 32 images, only."""

        def __init__(self) -> None:
            super().__init__(classes, depth=depth, widen_factor=width, drop_rate=0.0, in_channels=channels)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.feature_maps(x)).flatten(1))

    return AnySize()


def _timm(spec: NetworkSpec) -> nn.Module:
    resized = {"img_size": spec.size} if get_input_config(spec.name).fixed_input_size else {}
    try:
        return timm.create_model(
            spec.name, pretrained=False, num_classes=spec.classes, in_chans=spec.channels, **resized
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        size = f"{spec.size[0]}x{spec.size[1]}"
        raise FaroutError(f"timm's {spec.name} cannot be built for {spec.channels} x {size} ({error})") from error


@contextmanager
def watched(module: nn.Module, **layers: str) -> Iterator[dict[str, Tensor]]:
    """Inside it each call of `module` leaves in the dict what the layers were given, under the words of their names."""
    seen: dict[str, Tensor] = {}

    def keep(kind: str) -> Any:
        return lambda _, inputs: seen.update({kind: inputs[0]})

    handles = [module.get_submodule(name).register_forward_pre_hook(keep(kind)) for kind, name in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_head(module: nn.Module, name: str | None = None) -> str:
    """The name of the last linear layer: as given, what timm's `get_classifier` gives, or the last one registered.

    Raises FaroutError where there is none, or the name is another layer's.
    """
    linear = [found for found, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if name is not None:
        if name not in linear:
            raise FaroutError(f"{name!r} is not a linear layer of the network; it has {', '.join(linear) or 'none'}")
        return name
    known = module.get_classifier() if hasattr(module, "get_classifier") else None
    same = [found for found in linear if module.get_submodule(found) is known]
    if not linear:
        raise FaroutError("the network has no linear layer; expected one that gives the logits from the features")
    return (same or linear)[-1]


@torch.no_grad()
def find_pool(module: nn.Module, head: str, probe: Tensor) -> str | None:
    """The name of the layer that pools maps (D, h, w) to the D features of the head; None where no layer of the
    network is one (some call a function, and those of a `CosineNetwork` are not pooled maps).

    Args:
        module: the network, in eval mode.
        head: name of the last linear layer.
        probe: one normalised image (1, C, H, W).

    Raises FaroutError where the head is not what gives the network's answer.
    """
    width, pools = module.get_submodule(head).in_features, list[str]()
    ends: dict[str, Tensor] = {}

    def pooled(name: str) -> Any:
        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            maps = inputs[0] if inputs else None
            if isinstance(maps, Tensor) and isinstance(output, Tensor) and maps.ndim == 4 and output.numel() == width:
                pools.extend([name] if maps.shape[1] == width else [])

        return look

    def last(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        ends.update(features=inputs[0], logits=output)

    handles = [
        layer.register_forward_hook(pooled(name)) for name, layer in module.named_modules() if _is_pool(layer)
    ] + [module.get_submodule(head).register_forward_hook(last)]
    try:
        answer = module(probe)
    finally:
        for handle in handles:
            handle.remove()
    _check_ends(ends, answer, head)
    return pools[-1] if pools and not isinstance(module, CosineNetwork) else None


def _is_pool(layer: nn.Module) -> bool:
    return "Pool" in type(layer).__name__ and "Max" not in type(layer).__name__


def _check_ends(ends: dict[str, Tensor], answer: Any, head: str) -> None:
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        given = f"a tensor {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise FaroutError(f"the network answers {given}; expected logits (B, classes)")
    features = ends.get("features")
    if features is None or not torch.equal(ends["logits"], answer):
        raise FaroutError(f"the network's answer is not what its layer {head!r} gives; name the last linear layer")
    if features.ndim != 2:
        raise FaroutError(f"the layer {head!r} is given {tuple(features.shape)}; expected features (B, D)")
