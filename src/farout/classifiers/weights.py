"""Weights of classifiers in files: the names that other programs give them, and what does not fit a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from farout.classifiers.networks import OUTLIER, find_head
from farout.core.errors import StoreError

__all__ = ["WEIGHTS_HINT", "describe_mismatches", "load_weights", "model_card", "rename_weights"]

WEIGHTS_HINT = "give a .safetensors, .pt or .pth file with a state dict, or the folder of a farout classifier"
"""Advice if weights are missing."""

_HEAD_NAMES = ("fc", "linear", "classifier", "head", "last_linear")


def rename_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """The tensors of another program's state dict under the names of a network.

    A prefix `module.` is removed, `shortcut` (ResNets of OpenOOD) becomes torchvision's `downsample`, and the last
    layer may be called fc, linear, classifier, head or last_linear. Other names are kept.

    Args:
        tensors: the state dict.
        expected: the state dict of the network.
        head: name of the network's last layer.
    """
    has_prefix = bool(tensors) and all(name.startswith("module.") for name in tensors)
    renamed = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("module.") if has_prefix else name
        layer, _, leaf = own.rpartition(".")
        candidate = f"{head}.{leaf}" if layer in _HEAD_NAMES else own.replace(".shortcut.", ".downsample.")
        renamed[own if own in expected or candidate not in expected else candidate] = tensor
    return renamed


def describe_mismatches(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The differences between a state dict and that of a network, as text; empty if it fits."""
    # Only training without momentum reads num_batches_tracked, and old checkpoints lack it.
    missing = sorted(name for name in expected if name not in tensors and not name.endswith("num_batches_tracked"))
    unexpected = sorted(name for name in tensors if name not in expected)
    shapes = [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected}
    return [*(f"{len(names)} {kind}, first {names[0]}" for kind, names in lists.items() if names), *shapes[:2]]


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str, name: str) -> None:
    """Load a state dict, possibly with another program's names, into a network.

    Args:
        module: the network.
        tensors: the state dict.
        origin: where it comes from, for messages.
        name: name of the network, for messages.

    Raises:
        StoreError: for weights that are missing, unexpected, of another shape, or not finite.
    """
    expected = module.state_dict()
    renamed = rename_weights(tensors, expected, find_head(module))
    mismatches = describe_mismatches(renamed, expected)
    if mismatches:
        raise StoreError(
            f"the weights in {origin} do not fit {name}: {'; '.join(mismatches)}. Give the network, stem, channels and "
            "number of classes that they were trained with"
        )
    bad = [key for key, value in renamed.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise StoreError(f"the weights in {origin} are not all numbers: {bad[0]} and {len(bad) - 1} others")
    module.load_state_dict(renamed, strict=False)


def model_card(parameters: int, config: Mapping[str, Any]) -> str:
    """The text of the README in a classifier's folder."""
    network, preprocessing = config["network"], config["preprocessing"]
    stem = f", stem {network['stem']}" if network["stem"] else ""
    names = [name for name in config["class_names"] if name != OUTLIER]
    outlier_class = "; one more, the last, is of outliers" * (len(names) < len(config["class_names"]))
    lines = [
        "# A farout classifier",
        "",
        f"- network: {network['name']}{stem}, {parameters:,} parameters",
        f"- classes: {', '.join(names)}{outlier_class}",
        f"- images: {preprocessing['channels']} x {preprocessing['size'][0]} x {preprocessing['size'][1]}, "
        f"mean {config['mean']}, std {config['std']}",
        f"- content hash: {config['content_hash']}",
        *[f"- {name}: {value}" for name, value in config["provenance"].items()],
        "",
        "Load it with `farout.Classifier.load(folder)`.",
    ]
    return "\n".join(lines) + "\n"
