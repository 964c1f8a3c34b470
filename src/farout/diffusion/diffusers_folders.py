"""Folders of diffusion models in the layout of diffusers, so that each library can read the other's."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from farout.core import store
from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.core.hub import explain_failure, hub_access
from farout.core.names import find_path
from farout.core.network_size import limit_parameters, read_shapes
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens, TextTokens
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompt_tokens import PromptTokens, read_prompts
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.conditioning.text_encoder import TextEncoder, has_text_encoder
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.unets import network_config

__all__ = [
    "class_table_conditioning",
    "is_farout_folder",
    "local_folder",
    "model_card",
    "read_autoencoder",
    "read_conditioning",
    "read_networks",
    "read_sample_size",
    "read_scheduler",
    "requires_class_names",
    "text_conditioning",
    "write_conditioning",
    "write_network",
]

_NETWORKS = ("UNet2DModel", "UNet2DConditionModel")
_CONDITIONING_FILE = "conditioning.safetensors"
_AUTOENCODERS = ("AutoencoderKL", "VQModel")
"""Classes of diffusers, which takes seconds to import; it is imported when a network is read or written."""


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or the local copy of `hf://owner/name`.

    Raises StoreError for a missing folder or an unreachable hub, MissingExtraError without `huggingface_hub`.
    """
    if not str(folder).startswith("hf://"):
        path = find_path(folder)
        if not path.is_dir():
            raise StoreError(f"there is no folder {path}; models on the hub have the form hf://owner/name")
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError('models from the hub require `pip install "farout[hub]"`') from error
    name = str(folder).removeprefix("hf://")
    patterns = ["*.json", "*.safetensors", "*.bin", "tokenizer/*.txt", "trained_on.txt"]
    with hub_access() as obstacle:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = explain_failure(error, obstacle)
            raise StoreError(
                f"{folder} cannot be downloaded ({reason}); download it by other means and give the folder"
            ) from error


def is_farout_folder(folder: Path) -> bool:
    """Whether farout wrote the folder: diffusers writes no `hashes.json`, and nothing of farout to `config.json`."""
    config = folder / "config.json"
    return os.path.lexists(folder / store.HASHES_FILE) or (
        os.path.lexists(config) and "farout" in store.read_json(config)
    )


def requires_class_names(folder: Path) -> bool:
    """Whether a folder is conditioned on text and does not name classes: Stable Diffusion as published."""
    return has_text_encoder(folder) and not is_farout_folder(folder)


def write_network(
    folder: Path, network: Any, schedule: NoiseSchedule, prediction: str, autoencoder: Any | None
) -> None:
    """Writes `unet/`, `scheduler/`, `vae/` and `model_index.json` as diffusers' pipelines do."""
    import diffusers

    network.save_pretrained(folder / "unet")
    scheduler = {
        **schedule.to_diffusers_config(),
        "prediction_type": prediction,
        "_diffusers_version": diffusers.__version__,
    }
    store.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "_diffusers_version": diffusers.__version__}
    index["unet"] = ["diffusers", type(network).__name__]
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    if autoencoder is not None:
        autoencoder.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", type(autoencoder).__name__]
    store.write_json(folder / "model_index.json", index)


def read_networks(folder: Path) -> tuple[nn.Module, nn.Module | None]:
    """The network and the autoencoder (or None) of a diffusers folder, whether in subfolders or at its root.

    Raises StoreError for a part that is missing, truncated, or of an unsupported class.
    """
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    autoencoder = next((folder / name for name in ("vae", "vqvae") if (folder / name).is_dir()), None)
    return _read_module(inner, _NETWORKS), None if autoencoder is None else _read_module(autoencoder, _AUTOENCODERS)


def read_autoencoder(folder: Path) -> nn.Module:
    """The autoencoder of a folder written by diffusers' `save_pretrained`, or of its subfolder `vae/`."""
    return _read_module(folder / "vae" if (folder / "vae").is_dir() else folder, _AUTOENCODERS)


def _read_module(folder: Path, known: Sequence[str]) -> nn.Module:
    config = store.read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in known:
        raise StoreError(
            f"{folder} contains a {name!r}; farout loads {', '.join(known)}, and never runs code from a folder"
        )
    import diffusers

    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not files:
        raise StoreError(f"{folder} has no weights (*.safetensors or *.bin); the folder is incomplete")
    try:
        with limit_parameters(sum(map(_count_parameters, files)), f"the {name} of its config.json", folder):
            network: nn.Module = getattr(diffusers, str(name)).from_pretrained(folder, local_files_only=True)
            return network
    except StoreError:
        raise
    except Exception as error:  # a configuration of another form raises nearly any exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(f"the {name} in {folder} cannot be loaded ({reason})") from error


def _count_parameters(weights: Path) -> int:
    """Number of values in a weights file; for a pickle, whose header is not read, its bytes."""
    if weights.suffix == ".safetensors":
        return sum(map(math.prod, read_shapes(weights).values()))
    return weights.stat().st_size


def write_conditioning(folder: Path, conditioning: Conditioning | None) -> None:
    """Writes the tensors of a conditioning that are not part of the network: a table, or text encoder and tokenizer."""
    if isinstance(conditioning, PromptContexts):
        conditioning.encoder.write(folder)
        return
    tensors = {} if conditioning is None else conditioning.tensors()
    if tensors:
        store.save_tensors(folder / _CONDITIONING_FILE, tensors)


def read_conditioning(folder: Path, network: nn.Module, described: dict[str, Any] | None) -> Conditioning | None:
    """The conditioning that `config.json` of a farout folder describes; None for an unconditional model.

    Raises StoreError for a kind that this version does not support, and for a missing table.
    """
    if described is None:
        return None
    arguments = dict(described)
    kind = arguments.pop("kind", None)
    if kind == ClassVectors.kind:
        return ClassVectors(network, **arguments)
    for table_class in (ClassTokens, TextTokens):
        if kind == table_class.kind:
            return table_class(store.load_tensors(folder / _CONDITIONING_FILE)["tokens"], **arguments)
    for prompt_class in (PromptContexts, PromptTokens):
        if kind == prompt_class.kind:
            arguments.pop("has_null")
            return prompt_class(TextEncoder.read(folder), **arguments)
    raise StoreError(
        f"{folder} contains a conditioning of kind {kind!r}, which this version does not support; upgrade farout"
    )


def text_conditioning(folder: Path, class_names: Sequence[str] | None, prompts: Prompts | None) -> Conditioning | None:
    """The conditioning of a folder with a text encoder that farout did not write; None for one without.

    Without `prompts`, class vectors are contexts. Raises FaroutError for a text-conditional folder without class names,
    names that cannot be used in prompts, and prompts for a folder without a text encoder.
    """
    if not has_text_encoder(folder):
        if prompts is not None:
            raise FaroutError(f"{folder} has no text encoder, so prompts have no effect; leave them out")
        return None
    if not class_names:
        raise FaroutError(
            f"{folder} is conditioned on text: `farout synthesize` and `farout reconstruct` make prompts from the "
            "images' class names; for other commands, save DiffusionModel.load(folder, class_names=[...])"
        )
    return read_prompts(folder, class_names, prompts or Prompts(vector="context"))


def class_table_conditioning(
    folder: Path, network: nn.Module, class_names: Sequence[str] | None
) -> Conditioning | None:
    """The conditioning of a folder without text that farout did not write; None for an unconditional network.

    Each row of a table of class embeddings is taken as a class, because the folder does not say whether the last one is
    a null row. Raises FaroutError for class names that do not match the network.
    """
    table = getattr(network, "class_embedding", None)
    if isinstance(table, nn.Embedding):
        names = [str(row) for row in range(table.num_embeddings)] if class_names is None else class_names
        return ClassVectors(network, names, has_null=False)
    if class_names is not None:
        raise FaroutError(f"{folder} is an unconditional model, so class_names have no effect; leave them out")
    return None


def read_sample_size(folder: Path, network: nn.Module) -> tuple[int, int]:
    """Height and width of a network's input; raises StoreError if its configuration does not have them."""
    size: Any = network_config(network)["sample_size"]
    if size is None:
        raise StoreError(f"{folder}: the network's config.json has no sample_size, the side of its input; add it")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise StoreError(
            f"{folder}: sample_size in the network's config.json is {size!r:.100}; expected one or two sides"
        )
    return sides


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration, in a subfolder or at the root."""
    candidates = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    path = next((path for path in candidates if path.is_file()), candidates[0])
    return store.read_json(path)


def model_card(parameters: int, config: dict[str, Any]) -> str:
    """The README of the folder."""
    schedule, preprocessing = config["schedule"], config["preprocessing"]
    classes = config["conditioning"]
    lines = [
        "# A farout diffusion model",
        "",
        f"- network: {parameters:,} parameters, predicts {config['prediction']}",
        f"- schedule: {schedule['kind']}, {schedule['num_levels']} levels",
        f"- images: {preprocessing['channels']} x {preprocessing['size'][0]} x {preprocessing['size'][1]}",
        *([] if classes is None else [f"- classes: {_describe_classes(classes)}"]),
        f"- content hash: {config['content_hash']}",
        *[f"- {name}: {value}" for name, value in config["provenance"].items()],
        "",
        "Load it with `farout.DiffusionModel.load(folder)` or as a diffusers pipeline folder.",
    ]
    return "\n".join(lines) + "\n"


def _describe_classes(conditioning: dict[str, Any]) -> str:
    """Describes the classes in one line: `3 (a, b, c), by class vectors, with a null condition`."""
    names = conditioning["class_names"]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    null = "with" if conditioning["has_null"] else "without"
    return f"{len(names)} ({shown}), by {conditioning['kind'].replace('_', ' ')}, {null} a null condition"
