"""Checkpoints of a manifold's training: an interrupted one goes on, to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farout.core.errors import StoreError
from farout.training.checkpoints import (
    checkpoint_weights,
    differences,
    newest_checkpoint,
    prune_checkpoints,
    read_optimizer,
    read_state,
    step_folder,
    write_checkpoint,
)

__all__ = ["Checkpoints"]

_NET, _WATCH = "net.", "watch."


@dataclass(frozen=True)
class Checkpoints:
    """The newest whole checkpoint of one training, in the layout of `farout.training.checkpoints`.

    Args:
        folder: below which it lies.
        settings: all that decides the training, as JSON has it.
        every: batches from one to the next.
    """

    folder: Path
    settings: Mapping[str, Any]
    every: int

    def due(self, step: int) -> bool:
        """Whether to save after `step` batches."""
        return step % self.every == 0

    def save(
        self,
        step: int,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        watched: Mapping[str, Tensor],
        history: list[dict[str, float]],
    ) -> None:
        """Leaves the state after `step` batches: the network's, the optimiser's, and what was watched."""
        tensors = {_NET + name: value for name, value in net.state_dict().items()}
        tensors |= {_WATCH + name: value for name, value in watched.items()}
        state = {"step": step, "settings": self.settings, "history": history}
        write_checkpoint(step_folder(self.folder, step), tensors, None, optimizer.state_dict(), state)
        prune_checkpoints(self.folder, [step], 0)

    def load(
        self, net: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None:
        """Brings network and optimiser back to the newest checkpoint: its step, what was watched, and the history; None
        where there is none.

        Raises StoreError for a checkpoint of another training; it lists what differs.
        """
        found = newest_checkpoint(self.folder)
        if found is None:
            return None
        state = read_state(found)
        changed = differences(state["settings"], self.settings)
        if changed:
            raise StoreError(
                f"the manifold's training cannot continue from {found}, which differs ({'; '.join(changed)}); remove "
                f"{self.folder} to start again"
            )
        tensors = checkpoint_weights(found)
        net.load_state_dict(_of(tensors, _NET))
        optimizer.load_state_dict(read_optimizer(found))
        return state["step"], _of(tensors, _WATCH), state["history"]


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
