"""Reads checkpoints of other programs: tensors only, nothing in a file is executed."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from farout.core.errors import StoreError
from farout.core.files import open_regular_file
from farout.core.names import find_path
from farout.core.network_size import describe_differences

__all__ = ["Checkpoint", "check_finite", "check_shapes", "read_checkpoint"]

_IGNORED_MODULES = ("argparse", "pytorch_lightning", "lightning", "omegaconf", "numpy", "collections", "typing")
"""Modules whose objects published checkpoints store next to the weights (arguments, callbacks, counters). They are
replaced by empty placeholders; the modules are not imported."""
_AVERAGED = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema", "params_ema")
_TRAINED = ("state_dict", "model_state_dict", "model", "net", "network", "params", "0")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file.

    Attributes:
        path: the file.
        sha256: hash of the file.
        part: entry of the file that the tensors come from, such as `model_ema`; empty: the file is the state dict.
        tensors: the tensors by name, without the prefix `module.` of wrapped models.
    """

    path: Path
    sha256: str
    part: str
    tensors: Mapping[str, Tensor]

    def select(self, prefix: str) -> Checkpoint:
        """The tensors whose names start with the prefix, without it."""
        chosen = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        return replace(self, tensors=chosen)


def read_checkpoint(source: str | Path, *, ema: bool = True) -> Checkpoint:
    """Reads a .safetensors file, or what `torch.save` wrote (.pth, .pt, .ckpt, .bin).

    Args:
        source: the file.
        ema: prefer averaged weights where the file has both.

    Raises:
        StoreError: for a file that is missing, damaged, contains other objects than tensors and plain values, or
            contains no tensors, and for tensors that are larger than the file.
    """
    path = find_path(source)
    if path.is_dir():
        raise StoreError(f"{path} is a folder; import takes a file. Folders of diffusers and farout need no import")
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    with open_regular_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    part, tensors = _choose_state_dict(content, path, ema)
    _check_sizes(tensors, path)
    named = {re.sub(r"(^|\.)(?:(?:module|_orig_mod)\.)+", r"\1", name): value for name, value in tensors.items()}
    return Checkpoint(path, sha256, part, _use_averages(named, ema))


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises StoreError for weights that are infinite or no numbers."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise StoreError(
            f"{path} contains weights that are infinite or not numbers: {bad[0]} and {len(bad) - 1} others"
        )


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as safetensors ({error})") from error


def _read_torch_file(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses; a compressed entry could fill any memory
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise StoreError(f"{path} is a compressed archive, not a file that torch.save wrote")
    placeholders: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals(list(placeholders.values())):
                # mapped: optimizer states and other parts that are not used are never read
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
        except Exception as error:  # other files read as a pickle raise nearly any exception
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = found[1].rstrip(".") if found else ""
            if name and name.split(".")[0] in _IGNORED_MODULES and name not in placeholders and len(placeholders) < 50:
                placeholders[name] = _create_placeholder(name)
                continue
            if name:
                raise StoreError(
                    f"{path} contains an object of {name}; only tensors and plain values are read, and nothing in a "
                    "file is executed. Save the model's state_dict() instead"
                ) from error
            raise StoreError(
                f"{path} is not a complete file of tensors: expected .safetensors, or what torch.save writes"
            ) from error


def _create_placeholder(name: str) -> type:
    """An empty class under the name of another one, whose objects ignore all values that they are given."""
    module, _, own_name = name.rpartition(".")

    class Placeholder:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return object.__new__(cls)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __setstate__(self, _: Any) -> None:
            pass

    Placeholder.__module__, Placeholder.__name__, Placeholder.__qualname__ = module, own_name, own_name
    return Placeholder


def _choose_state_dict(content: Any, path: Path, ema: bool) -> tuple[str, dict[str, Tensor]]:
    """The entry of a checkpoint that contains the weights, and its tensors."""
    entries = dict(enumerate(content)) if isinstance(content, list | tuple) else content
    if not isinstance(entries, dict):
        raise StoreError(f"{path} contains a {type(content).__name__}; expected tensors by name")
    found = {str(name): _tensors_of(value) for name, value in entries.items() if _is_state_dict(value)}
    if not found and _is_state_dict(content):
        return "", _tensors_of(content)
    # a list of the DDIM program ends with the averages: [network, optimizer, epoch, step, averages]
    averaged = tuple(found)[1:][-1:] if isinstance(content, list | tuple) else _AVERAGED
    order = (*averaged, *_TRAINED) if ema else (*_TRAINED, *averaged)
    part = next((name for name in order if name in found), None)
    if part is None:
        names = ", ".join(map(str, list(entries)[:10])) or "nothing"
        raise StoreError(f"{path} contains no tensors by name; its entries are {names}")
    return part, found[part]


def _is_state_dict(value: Any) -> bool:
    """Whether a value maps names to tensors; some programs add counters or configurations."""
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())


def _tensors_of(value: dict[Any, Any]) -> dict[str, Tensor]:
    return {str(name): each.detach() for name, each in value.items() if isinstance(each, Tensor)}


def _check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A view of a few bytes may have any shape, and would fill the memory once it is copied."""
    for name, value in tensors.items():
        if value.is_sparse or value.is_quantized or value.layout != torch.strided:
            raise StoreError(f"{path}: {name} is a sparse or quantized tensor; expected plain ones")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise StoreError(f"{path}: {name} has the shape {tuple(value.shape)}, larger than the values in the file")


def _use_averages(tensors: dict[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """Replaces `model.X` by the average `model_ema.X`, whose names have no dots (latent diffusion's `LitEma`)."""
    averaged = {name.removeprefix("model_ema."): v for name, v in tensors.items() if name.startswith("model_ema.")}
    others = {name: value for name, value in tensors.items() if not name.startswith("model_ema.")}
    if not ema or not averaged:
        return others
    flat = {name: name.removeprefix("model.").replace(".", "") for name in others if name.startswith("model.")}
    return {name: averaged.get(flat.get(name, ""), value) for name, value in others.items()}


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, network: str, library: str
) -> None:
    """Raise StoreError unless the tensors have the names, which are those of a library, and shapes of a network's."""
    found, required = ({name: value.shape for name, value in each.items()} for each in (tensors, expected))
    problems = describe_differences(found, required)
    if problems:
        raise StoreError(f"{path} does not contain {network}: {'; '.join(problems)} (names of {library})")
