"""Weights of classifiers in files: other programs' names for them, what does not fit, and the card beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from farout.classifiers.networks import OUTLIER, find_head
from farout.core.errors import StoreError

__all__ = ["HOW", "fit_names", "load_weights", "misfits", "model_card"]

HOW = "give a .safetensors, .pt or .pth file with a state dict, or the folder of a farout classifier"
"""What is advised where weights are missing."""
_HEADS = ("fc", "linear", "classifier", "head", "last_linear")


def fit_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """The entries of another program's state dict under the names of a network's own.

    A prefix `module.` is left out; `shortcut` (OpenOOD's ResNets) is torchvision's `downsample`; the last layer may be
    called fc, linear, classifier, head or last_linear. Entries that do not fit keep their names.
    """
    prefixed = bool(tensors) and all(name.startswith("module.") for name in tensors)
    plain = {name.removeprefix("module.") if prefixed else name: tensor for name, tensor in tensors.items()}
    return {_own_name(name, wanted, head): tensor for name, tensor in plain.items()}


def _own_name(name: str, wanted: Mapping[str, Tensor], head: str) -> str:
    if name in wanted:
        return name
    layer, _, leaf = name.rpartition(".")
    renamed = f"{head}.{leaf}" if layer in _HEADS else name.replace(".shortcut.", ".downsample.")
    return renamed if renamed in wanted else name


def misfits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from fitting, in words; empty where it fits."""
    # a counter that only training without momentum reads; old checkpoints lack it
    missing = sorted(name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked"))
    unexpected = sorted(name for name in tensors if name not in wanted)
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    counts = {"missing": missing, "unexpected": unexpected}
    return [*(f"{len(names)} {kind}, first {names[0]}" for kind, names in counts.items() if names), *wrong[:2]]


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str, name: str) -> None:
    """Puts a state dict, whose names may be another program's, into a network.

    Raises StoreError that names what is missing, not expected, of another shape, or not a number.
    """
    wanted = module.state_dict()
    named = fit_names(tensors, wanted, find_head(module))
    wrong = misfits(named, wanted)
    if wrong:
        raise StoreError(
            f"the weights in {origin} do not fit {name}: {'; '.join(wrong)}. Give the network, stem, channels and "
            "number of classes that they were trained with"
        )
    bad = [key for key, value in named.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise StoreError(f"the weights in {origin} are not all numbers: {bad[0]} and {len(bad) - 1} others")
    module.load_state_dict(named, strict=False)


def model_card(parameters: int, config: Mapping[str, Any]) -> str:
    """A short README for the folder."""
    network, preprocessing = config["network"], config["preprocessing"]
    stem = f", stem {network['stem']}" if network["stem"] else ""
    names = [name for name in config["class_names"] if name != OUTLIER]
    last = "; one more, the last, is of outliers" * (len(names) < len(config["class_names"]))
    lines = [
        "# A farout classifier",
        "",
        f"- network: {network['name']}{stem}, {parameters:,} parameters",
        f"- classes: {', '.join(names)}{last}",
        f"- images: {preprocessing['channels']} x {preprocessing['size'][0]} x {preprocessing['size'][1]}, "
        f"mean {config['mean']}, std {config['std']}",
        f"- content hash: {config['content_hash']}",
        *[f"- {name}: {value}" for name, value in config["provenance"].items()],
        "",
        "Load it with `farout.Classifier.load(folder)`.",
    ]
    return "\n".join(lines) + "\n"
