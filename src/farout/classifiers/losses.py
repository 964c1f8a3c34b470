"""What the training of a classifier minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from farout.core.errors import FaroutError

__all__ = [
    "ClassifierLoss",
    "CrossEntropy",
    "EnergyHead",
    "accuracy",
    "free_energy",
    "mutual_information",
    "uniform_cross_entropy",
]

_EPS = 1e-8


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


class EnergyHead(nn.Module):
    """The energy regulariser: a small head phi learns to tell images from outliers by their free energies.

    With E(x) = T logsumexp(f(x) / T) (`free_energy`, high in the distribution), the loss is the cross-entropy of the
    two logits phi(E) against 1 for images and 0 for outliers, a mean over both together. That is the binary
    cross-entropy of the one logit phi_1(E) - phi_0(E) (Du et al. 2022, "VOS: learning what you don't know by virtual
    outlier synthesis", section 3.2). VOS's own weights of the classes within E are left out, as in Dream-OOD (Du et al.
    2023) and NCIS (Doorenbos et al. 2024). It trains with the network and is no part of the classifier.

    Args:
        hidden: units between two linear layers, with a ReLU; 0: one linear layer.
        temperature: T.
    """

    def __init__(self, hidden: int = 0, temperature: float = 1.0) -> None:
        super().__init__()
        layers = [nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 2)] if hidden else [nn.Linear(1, 2)]
        self.phi = nn.Sequential(*layers)
        self.temperature = temperature

    def forward(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Logits (B, K) of images and (M, K) of outliers -> the loss, a scalar; in float32 at any precision."""
        with torch.autocast(inside.device.type, enabled=False):
            energies = free_energy(torch.cat([inside.float(), outside.float()]), self.temperature)
            target = torch.zeros(len(energies), dtype=torch.int64, device=inside.device)
            target[: len(inside)] = 1
            return functional.cross_entropy(self.phi(energies[:, None]), target)


def free_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T logsumexp(f / T) of logits f (B, K) -> (B,): the negative free energy of Liu et al. 2020, "Energy-based
    out-of-distribution detection"; high in the distribution.
    """
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution, mean of logsumexp(f) - mean_k f_k over logits f (B, K): what outliers
    are taught in outlier exposure (Hendrycks et al. 2019, "Deep anomaly detection with outlier exposure").
    """
    logits = logits.float()
    return (logits.logsumexp(1) - logits.mean(1)).mean()


def mutual_information(inside: Tensor, outside: Tensor, *, normalised: bool = False) -> Tensor:
    """The penalty of SONA (Yoon et al. 2025, 2408.14841) on what features of images and of outliers tell of each other.

    With J the mean over pairs of outer(x, y) / sum(outer(x, y)), which sums to 1, and P = outer(mean x, mean y), it is
    sum(J log(J / (P + eps) + eps)), eps = 1e-8. J is one product of two matrices. P as published does not sum to 1: the
    penalty then is, but for a hundredth or less, -log of the features' sums: it makes features larger.

    Args:
        inside: features of images (B, D), none negative.
        outside: of the outliers that go with them, one each (B, D).
        normalised: P is the product of J's own marginals; the penalty then is their mutual information, at least 0, and
            does not change with the features' scale.
    """
    with torch.autocast(inside.device.type, enabled=False):
        given = [inside.float(), outside.float()]
        shares = [each / each.sum(1, keepdim=True).clamp(min=_EPS) for each in given]
        joint = shares[0].T @ shares[1] / len(inside)
        means = [each.mean(0) for each in (shares if normalised else given)]
        return (joint * (joint / (torch.outer(*means) + _EPS) + _EPS).log()).sum()


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == labels).float().mean()
