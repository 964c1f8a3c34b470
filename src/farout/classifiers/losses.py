"""What the training of a classifier minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from farout.errors import FaroutError

__all__ = ["ClassifierLoss", "CrossEntropy", "accuracy"]


class ClassifierLoss(Protocol):
    """From logits and labels to what is minimised, and what is logged beside it."""

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits (B, K), labels (B,) int64 -> scalars by name, `loss` (a mean over the batch) among them."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with softened labels: the target is 1 - s + s / K for the true class, s / K for the others
    (Szegedy et al. 2016, "Rethinking the inception architecture for computer vision", section 7).

    Args:
        label_smoothing: s, in [0, 1).

    Raises FaroutError for another s.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise FaroutError(f"label_smoothing is {self.label_smoothing}; expected a number in [0, 1)")

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` and `accuracy`."""
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": accuracy(logits, labels)}


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == labels).float().mean()
