"""Checkpoints of a training run: one folder per step, written atomically and verified by hash before it is used.

The layout, below the training folder::

    out/checkpoints/step_00000100/
        model.safetensors   weights and buffers of the network
        ema.safetensors     their moving average, if the run keeps one
        optimizer.pt        state of the optimizer
        state.json          step, settings, history and so on, and the SHA-256 of the files above
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from farout.core import store
from farout.core.errors import StoreError
from farout.core.files import hash_file
from farout.core.names import expand_path
from farout.core.schema import check_content
from farout.training.config import TrainingConfig

__all__ = [
    "checkpoint_folders",
    "checkpoint_weights",
    "describe_differences",
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


class _StateContent(BaseModel):
    """What this module reads of `state.json`; the training loop adds its own entries."""

    files: dict[str, str]


def training_folder(out: str | Path) -> Path:
    """The folder of the checkpoints of a model that will be saved as `out`: a folder next to it."""
    path = Path(os.path.abspath(expand_path(out)))
    return path.with_name(f"{path.name}.training")


def step_folder(out: str | Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates, in the training folder `out`."""
    return expand_path(out) / "checkpoints" / f"step_{step:08d}"


def checkpoint_folders(out: str | Path) -> dict[int, Path]:
    """The complete checkpoints in the training folder `out`, by step, in ascending order.

    A logged warning names each folder that is incomplete or whose files were altered.
    """
    return {step: folder for step, folder in sorted(_step_folders(out).items()) if _is_intact(folder)}


def newest_checkpoint(out: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in the training folder `out`, or None."""
    newest_first = sorted(_step_folders(out).items(), reverse=True)
    return next((folder for _, folder in newest_first if _is_intact(folder)), None)


def _step_folders(out: str | Path) -> dict[int, Path]:
    folders = [folder for folder in (expand_path(out) / "checkpoints").glob("step_*") if folder.is_dir()]
    matches = [(_NAME.fullmatch(folder.name), folder) for folder in folders]
    return {int(match[1]): folder for match, folder in matches if match}


def _is_intact(folder: Path) -> bool:
    try:
        for name in read_state(folder)["files"]:
            _check_file(folder, name)
    except StoreError as error:
        logger.warning("the checkpoint %s is ignored: %s", folder, error)
        return False
    return True


def _check_file(folder: Path, name: str) -> None:
    """Raise StoreError unless a file of a checkpoint is as it was written."""
    store.check_file(folder / name, read_state(folder)["files"].get(name))


def checkpoint_weights(folder: str | Path, average: bool = True) -> dict[str, Tensor]:
    """The weights of one checkpoint, by name, on the CPU: the moving average if there is one and `average` is True.

    Raises StoreError if the file is missing or cut short.
    """
    folder = Path(folder)
    name = "ema.safetensors" if average and "ema.safetensors" in read_state(folder)["files"] else "model.safetensors"
    _check_file(folder, name)
    return store.load_tensors(folder / name)


def read_state(folder: str | Path) -> dict[str, Any]:
    """The content of `state.json` of one checkpoint. Raises StoreError if it is missing or was changed."""
    path = Path(folder) / "state.json"
    state = store.read_sealed_json(path)
    check_content(state, _StateContent, str(path))
    return state


def read_optimizer(folder: str | Path) -> dict[str, Any]:
    """The state of the optimizer of one checkpoint, on the CPU; no code in the file is executed."""
    state: dict[str, Any] = torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True)
    return state


def write_checkpoint(
    folder: Path,
    model: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    """Write one checkpoint folder: completely or not at all, in place of an older one of the same step."""
    with store.atomic_folder(folder, None) as temporary:
        store.save_tensors(temporary / "model.safetensors", model)
        if average is not None:
            store.save_tensors(temporary / "ema.safetensors", average)
        torch.save(optimizer, temporary / "optimizer.pt")
        files = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
        store.write_sealed_json(temporary / "state.json", {**state, "files": files})


def prune_checkpoints(out: str | Path, keep: Collection[int | None], every: int) -> None:
    """Remove the checkpoints of `out` except the steps in `keep` and, if `every` > 0, its multiples.

    The temporary folders that a killed run left behind are removed, too.
    """
    for incomplete in (expand_path(out) / "checkpoints").glob(".step_*"):
        shutil.rmtree(incomplete, ignore_errors=True)
    for step, folder in _step_folders(out).items():
        if step not in keep and not (every and step % every == 0):
            shutil.rmtree(folder)


def discard_checkpoints(out: Path, training: TrainingConfig) -> None:
    """Remove a training folder that only served to resume; it is kept if the settings request one of its files."""
    if not (training.checkpoint_every or training.keep or training.tensorboard):
        shutil.rmtree(out, ignore_errors=True)


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each name whose value differs between a checkpoint and this run."""
    names = sorted(before.keys() | now.keys())
    changed = [name for name in names if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} now" for name in changed]
