"""The folder of a diffusion model: diffusers' layout, so that either library reads what the other wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from farout.core import store
from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.diffusion.conditioning.base import Conditioning
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens, TextTokens
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompt_tokens import PromptTokens, read_prompts
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.conditioning.text_encoder import TextEncoder, has_text_encoder
from farout.diffusion.schedule import NoiseSchedule

__all__ = [
    "class_table_conditioning",
    "is_farout_folder",
    "local_folder",
    "model_card",
    "read_autoencoder",
    "read_conditioning",
    "read_networks",
    "read_scheduler",
    "requires_class_names",
    "sample_size",
    "text_conditioning",
    "write_conditioning",
    "write_network",
]

_NETWORKS = {"UNet2DModel": diffusers.UNet2DModel, "UNet2DConditionModel": diffusers.UNet2DConditionModel}
_CONDITIONING = "conditioning.safetensors"
_AUTOENCODERS = {"AutoencoderKL": diffusers.AutoencoderKL, "VQModel": diffusers.VQModel}


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or the local copy of `hf://owner/name`.

    Raises StoreError for a missing folder or an unreachable hub, MissingExtraError without `huggingface_hub`.
    """
    if not str(folder).startswith("hf://"):
        path = Path(folder)
        if not path.is_dir():
            raise StoreError(f"there is no folder {path}; a model on the hub is written hf://owner/name")
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError('models from the hub require `pip install "farout[hub]"`') from error
    name = str(folder).removeprefix("hf://")
    wanted = ["*.json", "*.safetensors", "*.bin", "tokenizer/*.txt", "trained_on.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StoreError(f"{folder} cannot be fetched ({reason}); download it and give the folder") from error


def is_farout_folder(folder: Path) -> bool:
    """Whether `config.json` says that farout wrote the folder."""
    path = folder / "config.json"
    return path.is_file() and "farout" in store.read_json(path)


def requires_class_names(folder: Path) -> bool:
    """Whether a folder is conditioned on text and does not name its classes: Stable Diffusion as it is published."""
    return has_text_encoder(folder) and not is_farout_folder(folder)


def write_network(
    folder: Path, network: nn.Module, schedule: NoiseSchedule, prediction: str, autoencoder: nn.Module | None
) -> None:
    """Writes `unet/`, `scheduler/`, `vae/` and `model_index.json` as diffusers' pipelines do."""
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

    Raises StoreError when a part is missing, cut short, or of a class that is not among the known ones.
    """
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    autoencoder = next((folder / name for name in ("vae", "vqvae") if (folder / name).is_dir()), None)
    return _read(inner, _NETWORKS), None if autoencoder is None else _read(autoencoder, _AUTOENCODERS)


def read_autoencoder(folder: Path) -> nn.Module:
    """The autoencoder of a folder written by diffusers' `save_pretrained`, or of its subfolder `vae/`."""
    return _read(folder / "vae" if (folder / "vae").is_dir() else folder, _AUTOENCODERS)


def _read(folder: Path, known: dict[str, Any]) -> nn.Module:
    config = store.read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in known:
        raise StoreError(f"{folder} holds a {name!r}; farout loads {', '.join(known)}, and never code from a folder")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not files:
        raise StoreError(f"{folder} has no weights (*.safetensors or *.bin); the folder is incomplete")
    try:
        return known[name].from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise StoreError(f"the weights in {folder} cannot be read ({error})") from error


def write_conditioning(folder: Path, conditioning: Conditioning | None) -> None:
    """Writes what a conditioning keeps beside the network, if anything: a table, or a text encoder with tokenizer."""
    if isinstance(conditioning, PromptContexts):
        conditioning.encoder.write(folder)
        return
    tensors = {} if conditioning is None else conditioning.tensors()
    if tensors:
        store.save_tensors(folder / _CONDITIONING, tensors)


def read_conditioning(folder: Path, network: nn.Module, described: dict[str, Any] | None) -> Conditioning | None:
    """The conditioning that `config.json` of our folder describes; None for an unconditional model.

    Raises StoreError for a kind that this version does not know, or where its table is missing.
    """
    if described is None:
        return None
    arguments = dict(described)
    kind = arguments.pop("kind", None)
    if kind == ClassVectors.kind:
        return ClassVectors(network, **arguments)
    for member in (ClassTokens, TextTokens):
        if kind == member.kind:
            return member(store.load_tensors(folder / _CONDITIONING)["tokens"], **arguments)
    for prompted in (PromptContexts, PromptTokens):
        if kind == prompted.kind:
            arguments.pop("has_null")
            return prompted(TextEncoder.read(folder), **arguments)
    raise StoreError(f"{folder} holds a conditioning of kind {kind!r}, which this farout does not know; upgrade farout")


def text_conditioning(folder: Path, class_names: Sequence[str] | None, prompts: Prompts | None) -> Conditioning | None:
    """The conditioning of a folder with a text encoder that farout did not write; None for one without.

    Without `prompts` class vectors are contexts. Raises FaroutError for a folder of text without class names, names
    that do not become prompts, and prompts where there is no text encoder.
    """
    if not has_text_encoder(folder):
        if prompts is not None:
            raise FaroutError(f"{folder} has no text encoder, so prompts have no effect; leave them out")
        return None
    if not class_names:
        raise FaroutError(
            f"{folder} is conditioned on text: `farout synthesize` and `farout reconstruct` make prompts of the "
            "images' class names; other commands take what DiffusionModel.load(folder, class_names=[…]).save(…) writes"
        )
    return read_prompts(folder, class_names, prompts or Prompts(vector="context"))


def class_table_conditioning(
    folder: Path, network: nn.Module, class_names: Sequence[str] | None
) -> Conditioning | None:
    """The conditioning of a folder without text that farout did not write; None for an unconditional network.

    Each row of a table of class embeddings is taken for a class, as nothing says whether the last one means none.
    Raises FaroutError for class names that do not go with the network.
    """
    table = getattr(network, "class_embedding", None)
    if isinstance(table, nn.Embedding):
        names = [str(row) for row in range(table.num_embeddings)] if class_names is None else class_names
        return ClassVectors(network, names, has_null=False)
    if class_names is not None:
        raise FaroutError(f"{folder} is an unconditional model, so class_names have no effect; leave them out")
    return None


def sample_size(folder: Path, network: nn.Module) -> tuple[int, int]:
    """Height and width of what a network of `folder` was made for; raises StoreError where it does not say them."""
    size: Any = network.config["sample_size"]
    if size is None:
        raise StoreError(
            f"{folder}: the network's config.json has no sample_size, the side of what it works on; add it"
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration, in a subfolder or at the root."""
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    path = next((place for place in places if place.is_file()), places[0])
    return store.read_json(path)


def model_card(parameters: int, config: dict[str, Any]) -> str:
    """A short README for the folder."""
    schedule, preprocessing = config["schedule"], config["preprocessing"]
    classes = config["conditioning"]
    lines = [
        "# A farout diffusion model",
        "",
        f"- network: {parameters:,} parameters, predicts {config['prediction']}",
        f"- schedule: {schedule['kind']}, {schedule['steps']} levels",
        f"- images: {preprocessing['channels']} x {preprocessing['size'][0]} x {preprocessing['size'][1]}",
        *([] if classes is None else [f"- classes: {_classes(classes)}"]),
        f"- content hash: {config['content_hash']}",
        *[f"- {name}: {value}" for name, value in config["provenance"].items()],
        "",
        "Load it with `farout.DiffusionModel.load(folder)` or as a diffusers pipeline folder.",
    ]
    return "\n".join(lines) + "\n"


def _classes(conditioning: dict[str, Any]) -> str:
    """A line on the classes: `3 (a, b, c), by class vectors, with a null condition`."""
    names = conditioning["class_names"]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    null = "with" if conditioning["has_null"] else "without"
    return f"{len(names)} ({shown}), by {conditioning['kind'].replace('_', ' ')}, {null} a null condition"
