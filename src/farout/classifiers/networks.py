"""Networks of classifiers by name, and functions that find the last linear layer and the last pooling of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.compiler_import import defer_compiler_import
from farout.core.errors import FaroutError
from farout.features.backbones import get_input_config

with defer_compiler_import():
    import timm
    import torchvision

__all__ = [
    "NETWORKS",
    "OUTLIER",
    "RESNETS",
    "CosineNetwork",
    "NetworkSpec",
    "Stem",
    "capture_inputs",
    "find_head",
    "find_pool",
    "linear_layer",
]

Stem = Literal["small", "imagenet"]

RESNETS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
}
"""The networks that have a choice of stems."""

_WIDE_RESNETS = {"wrn40_2": (40, 2), "wrn16_2": (16, 2), "wrn16_1": (16, 1)}  # depth and width factor

NETWORKS = (*RESNETS, *_WIDE_RESNETS)
"""torchvision's ResNets and pytorch-ood's WideResNets; any other name is looked up in timm."""

OUTLIER = "(outlier)"
"""Name of the class that the loss `k+1` adds for outliers, as the last one; no folder has this name."""


@dataclass(frozen=True)
class NetworkSpec:
    """The configuration of a network; the network can be built again from it.

    Args:
        name: `resnet18`, `resnet34`, `resnet50` (He et al. 2016, from torchvision), `wrn40_2` (2.2 M parameters),
            `wrn16_2` (0.7 M), `wrn16_1` (0.2 M, for CPUs; Zagoruyko and Komodakis 2016, from pytorch-ood), or the name
            of a timm model.
        classes: number of classes, at least 2.
        channels: 1 or 3.
        size: (height, width) in pixels; used only by transformers with a fixed grid.
        stem: first layers of a ResNet: `small`, a 3x3 convolution of stride 1 without max-pooling, for small images, or
            `imagenet`; None: `small` for ResNets. Other networks have one stem only.
        space: number of dimensions of a space in which classes are fixed directions (see `CosineNetwork`); None: the
            last layer of the network is used.

    Raises:
        FaroutError: for an unknown name, and for values out of range.
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
            try:
                get_input_config(self.name)
            except FaroutError as error:
                raise FaroutError(f"{error}; networks of classifiers are {', '.join(NETWORKS)} and timm's") from error

    def build(self) -> nn.Module:
        """The network with random weights: normalized images (B, C, H, W) -> logits (B, classes)."""
        if self.space is not None:
            return CosineNetwork(replace(self, classes=self.space, space=None).build(), self.space, self.classes)
        if self.name in RESNETS:
            return _resnet(self.name, self.classes, self.channels, self.stem or "small")
        if self.name in _WIDE_RESNETS:
            return _wide_resnet(*_WIDE_RESNETS[self.name], self.classes, self.channels)
        return _timm(self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `space` is left out if it is None."""
        values = {**asdict(self), "size": list(self.size)}
        return values if self.space is not None else {name: values[name] for name in values if name != "space"}


class CosineNetwork(nn.Module):
    """A network whose classes are fixed directions of a space: logits = W u, u = z / |z|, z = body(x).

    If row k of W has the direction of class k and the length 1 / T, the logits are cosines divided by the temperature
    T. W is the last linear layer, so u are the features of such a classifier. W is not trained.

    Args:
        body: images (B, C, H, W) -> z (B, space).
        space: number of entries of z.
        classes: number of rows of W.
    """

    def __init__(self, body: nn.Module, space: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(space, classes, bias=False)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.head(functional.normalize(self.body(x).float(), dim=1))
        return logits


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
    from pytorch_ood.model import WideResNet  # slow to import: the package imports all its detectors

    class AnySize(WideResNet):  # type: ignore[misc, unused-ignore]  # the library has no types
        """WideResNet for images of any size; the library's own pools 8 x 8 maps only, those of 32 x 32 images."""

        def __init__(self) -> None:
            super().__init__(classes, depth=depth, widen_factor=width, drop_rate=0.0, in_channels=channels)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.feature_maps(x)).flatten(1))

    return AnySize()


def _timm(spec: NetworkSpec) -> nn.Module:
    resized: dict[str, Any] = {"img_size": spec.size} if get_input_config(spec.name).fixed_input_size else {}
    try:
        return timm.create_model(
            spec.name, pretrained=False, num_classes=spec.classes, in_chans=spec.channels, **resized
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        size = f"{spec.size[0]}x{spec.size[1]}"
        raise FaroutError(f"timm's {spec.name} cannot be built for {spec.channels} x {size} ({error})") from error


@contextmanager
def capture_inputs(module: nn.Module, **layers: str) -> Iterator[dict[str, Tensor]]:
    """Inside this context, every call of `module` stores the inputs of named layers in the dict.

    Args:
        module: the network.
        layers: names of layers, by the key under which their input is stored.
    """
    captured: dict[str, Tensor] = {}

    def capture(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: captured.update({key: inputs[0]})

    handles = [module.get_submodule(name).register_forward_pre_hook(capture(key)) for key, name in layers.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def linear_layer(module: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name, see `find_head`."""
    return cast("nn.Linear", module.get_submodule(name))


def find_head(module: nn.Module, name: str | None = None) -> str:
    """The name of the last linear layer: as given, or that of timm's `get_classifier`, or the last one registered.

    Raises:
        FaroutError: if there is none, or the given name is that of another layer.
    """
    linear = [layer_name for layer_name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if name is not None:
        if name not in linear:
            raise FaroutError(f"{name!r} is not a linear layer of the network; it has {', '.join(linear) or 'none'}")
        return name
    if not linear:
        raise FaroutError("the network has no linear layer; expected one that gives the logits from the features")
    classifier = getattr(module, "get_classifier", lambda: None)()
    return ([layer_name for layer_name in linear if module.get_submodule(layer_name) is classifier] or linear)[-1]


@torch.no_grad()
def find_pool(module: nn.Module, head: str, probe: Tensor) -> str | None:
    """The name of the layer that pools maps (D, h, w) to the D features, the input of the head.

    None if no layer does: some networks call a function, and the features of a `CosineNetwork` are not pooled maps.

    Args:
        module: the network, in eval mode.
        head: name of the last linear layer.
        probe: one normalized image (1, C, H, W).

    Raises:
        FaroutError: if the output of the head is not that of the network.
    """
    width = linear_layer(module, head).in_features
    pools: list[str] = []
    head_calls: list[tuple[Tensor, Tensor]] = []  # features and logits

    def record_pool(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            maps = inputs[0] if inputs else None
            if not isinstance(maps, Tensor) or not isinstance(output, Tensor):
                return
            if maps.ndim == 4 and maps.shape[1] == width and output.numel() == width:
                pools.append(name)

        return hook

    handles = [module.get_submodule(head).register_forward_hook(lambda _, x, y: head_calls.append((x[0], y)))]
    for name, layer in module.named_modules():
        if "Pool" in type(layer).__name__ and "Max" not in type(layer).__name__:
            handles.append(layer.register_forward_hook(record_pool(name)))
    try:
        logits = module(probe)
    finally:
        for handle in handles:
            handle.remove()

    if not isinstance(logits, Tensor) or logits.ndim != 2:
        output = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise FaroutError(f"the network returns {output}; expected logits (B, classes)")
    if not head_calls or not torch.equal(head_calls[-1][1], logits):
        raise FaroutError(f"the network's output is not that of its layer {head!r}; name the last linear layer")
    features = head_calls[-1][0]
    if features.ndim != 2:
        raise FaroutError(f"the layer {head!r} is given {tuple(features.shape)}; expected features (B, D)")
    return pools[-1] if pools and not isinstance(module, CosineNetwork) else None
