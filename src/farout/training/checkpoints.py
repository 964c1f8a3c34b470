"""Checkpoints of a training run: one folder per step, written atomically and verified by hash before it is used.

The layout, below the training folder::

    out/checkpoints/step_00000100/
        model.safetensors   weights and buffers of the network
        ema.safetensors     their moving average, where the run keeps one
        optimizer.pt        the optimiser's state
        state.json          step, configuration, history, ...; and the SHA-256 of the files above
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import StoreError
from farout.training.config import TrainingConfig

__all__ = [
    "checkpoint_folders",
    "checkpoint_weights",
    "differences",
    "discard_checkpoints",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_optimizer",
    "read_state",
    "step_folder",
    "training_folder",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")


def training_folder(out: str | Path) -> Path:
    """The training folder of what is to be saved at `out`: beside it, so that `out` appears when it is whole."""
    path = Path(os.path.abspath(out))
    return path.with_name(f"{path.name}.training")


def step_folder(out: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies below the training folder `out`."""
    return Path(out) / "checkpoints" / f"step_{step:08d}"


def checkpoint_folders(out: str | Path) -> dict[int, Path]:
    """The whole checkpoints below the training folder `out`, by step, ascending.

    A folder that is half-written or whose files were altered is left out, and named in a logged warning.
    """
    return {step: folder for step, folder in sorted(_candidates(out).items()) if _whole(folder)}


def newest_checkpoint(out: str | Path) -> Path | None:
    """The whole checkpoint of the highest step below the training folder `out`, or None."""
    newest_first = sorted(_candidates(out).items(), reverse=True)
    return next((folder for _, folder in newest_first if _whole(folder)), None)


def _whole(folder: Path) -> bool:
    try:
        _verify(folder)
    except StoreError as error:
        logger.warning("the checkpoint %s is ignored: %s", folder, error)
        return False
    return True


def _candidates(out: str | Path) -> dict[int, Path]:
    folders = (Path(out) / "checkpoints").glob("step_*")
    named = ((_NAME.fullmatch(folder.name), folder) for folder in folders if folder.is_dir())
    return {int(match[1]): folder for match, folder in named if match}


def _verify(folder: Path) -> None:
    files = read_state(folder).get("files")
    if not isinstance(files, dict):
        raise StoreError(f"{folder / 'state.json'} lists no files; expected their SHA-256")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != expected:
            raise StoreError(f"{path} is missing or differs from what was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_weights(folder: str | Path, average: bool = True) -> dict[str, Tensor]:
    """The weights of one checkpoint, by name, on the CPU: the moving average where there is one and `average` is True.

    Raises StoreError when the file is missing or cut short.
    """
    averaged = Path(folder) / "ema.safetensors"
    return store.load_tensors(averaged if average and averaged.exists() else Path(folder) / "model.safetensors")


def read_state(folder: str | Path) -> dict[str, Any]:
    """The content of `state.json` of one checkpoint; raises StoreError when it is missing or not JSON."""
    return store.read_json(Path(folder) / "state.json")


def read_optimizer(folder: str | Path) -> dict[str, Any]:
    """The optimiser's state of one checkpoint, on the CPU; nothing in the file is executed."""
    return torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True)


def write_checkpoint(
    folder: Path,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    """Writes one checkpoint folder: it appears whole or not at all, and replaces an older one of the same step."""
    with store.atomic_folder(folder, None) as temporary:
        store.save_tensors(temporary / "model.safetensors", model)
        if ema is not None:
            store.save_tensors(temporary / "ema.safetensors", ema)
        torch.save(optimizer, temporary / "optimizer.pt")
        files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        store.write_json(temporary / "state.json", {**state, "files": files})


def prune_checkpoints(out: str | Path, keep: Collection[int | None], every: int) -> None:
    """Removes the checkpoints of `out` other than the steps in `keep` and, where `every` > 0, its multiples, and what a
    run that was killed has left half-written.
    """
    for torn in (Path(out) / "checkpoints").glob(".step_*"):
        shutil.rmtree(torn, ignore_errors=True)
    for step, folder in _candidates(out).items():
        if step not in keep and not (every and step % every == 0):
            shutil.rmtree(folder)


def discard_checkpoints(out: Path, training: TrainingConfig) -> None:
    """Removes what was only there to resume; the folder stays where something in it was asked for."""
    if not (training.checkpoint_every or training.keep or training.tensorboard):
        shutil.rmtree(out, ignore_errors=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each name whose value differs between a checkpoint and this run."""
    names = sorted(before.keys() | now.keys())
    changed = [name for name in names if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} now" for name in changed]
