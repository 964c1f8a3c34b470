"""What a denoiser is told beside the noisy input: tensors that go with the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from farout.errors import FaroutError

__all__ = ["Condition", "Conditioning"]


@dataclass(frozen=True)
class Condition:
    """Named tensors with leading dimension B (`class_labels`, `encoder_hidden_states`, …), one row per input row.

    The names are the keyword arguments of the network that they are handed to.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            raise FaroutError(f"the tensors of a condition want one leading dimension, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of the given rows."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in a row."""
        return Condition({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})

    @staticmethod
    def join(parts: list[Condition]) -> Condition:
        """One condition after the other; all must hold the same names."""
        names = [set(part.tensors) for part in parts]
        if any(name != names[0] for name in names):
            raise FaroutError(f"conditions of different kinds cannot be joined: {[sorted(n) for n in names]}")
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Conditioning(Protocol):
    """What a conditional model offers: conditions from labels or vectors, and the null condition."""

    def __call__(self, labels: Tensor) -> Condition:
        """The condition of each label or class vector (B, …)."""

    def null(self, count: int) -> Condition:
        """The condition that stands for none, for `count` rows."""
