"""Losses of classifiers, with and without outliers."""

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
    """A loss of labelled images."""

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits (B, K), labels (B,) int64 -> scalars by name, `loss` (a mean over the batch) among them."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with label smoothing: the target is 1 - s + s / K for the true class and s / K for the others
    (Szegedy et al. 2016, "Rethinking the inception architecture for computer vision", section 7).

    Args:
        label_smoothing: s, in [0, 1).

    Raises:
        FaroutError: for another s.
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
    """The energy regularizer: a small network phi learns to distinguish images from outliers by their free energies.

    With E(x) = T logsumexp(f(x) / T) (`free_energy`, high for in-distribution images), the loss is the cross-entropy of
    the two logits phi(E) against 1 for images and 0 for outliers, averaged over both together. This is the binary
    cross-entropy of the logit phi_1(E) - phi_0(E) (Du et al. 2022, "VOS: learning what you don't know by virtual
    outlier synthesis", section 3.2). The learned class weights of VOS within E are left out, as in Dream-OOD (Du et al.
    2023) and NCIS (Doorenbos et al. 2024). phi is trained with the network and is not part of the classifier.

    Args:
        hidden: units between two linear layers, with a ReLU; 0: one linear layer.
        temperature: T.
    """

    def __init__(self, hidden: int = 0, temperature: float = 1.0) -> None:
        super().__init__()
        layers = [nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 2)] if hidden else [nn.Linear(1, 2)]
        self.phi = nn.Sequential(*layers)
        self.temperature = temperature

    def forward(self, logits: Tensor, outlier_logits: Tensor) -> Tensor:
        """The loss, a scalar, of logits (B, K) of images and (M, K) of outliers; float32 at any precision."""
        with torch.autocast(logits.device.type, enabled=False):
            energies = free_energy(torch.cat([logits.float(), outlier_logits.float()]), self.temperature)
            target = torch.zeros(len(energies), dtype=torch.int64, device=logits.device)
            target[: len(logits)] = 1
            return functional.cross_entropy(self.phi(energies[:, None]), target)


def free_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T logsumexp(f / T) of logits f (B, K) -> (B,), high for in-distribution images: the negative free energy of Liu
    et al. 2020, "Energy-based out-of-distribution detection".
    """
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution: the mean of logsumexp(f) - mean_k f_k over logits f (B, K).

    The loss on outliers of Hendrycks et al. 2019, "Deep anomaly detection with outlier exposure".
    """
    logits = logits.float()
    return (logits.logsumexp(1) - logits.mean(1)).mean()


def mutual_information(features: Tensor, outlier_features: Tensor, *, normalized: bool = False) -> Tensor:
    """The penalty of SONA (Yoon et al. 2025, 2408.14841) on the mutual information of images' and outliers' features.

    With J the mean over pairs (x, y) of outer(x, y) / sum(outer(x, y)), which sums to 1, and P = outer(mean x, mean y),
    it is sum(J log(J / (P + eps) + eps)), eps = 1e-8. J is computed as one product of two matrices. As published, P
    does not sum to 1: up to about a hundredth, the penalty then is -log of the sums of the features, and makes features
    larger.

    Args:
        features: features of images (B, D), none negative.
        outlier_features: features of their outliers, one for each image (B, D).
        normalized: P is the product of J's own marginals; the penalty then is their mutual information, at least 0, and
            does not depend on the scale of the features.
    """
    with torch.autocast(features.device.type, enabled=False):
        pair = [features.float(), outlier_features.float()]
        shares = [values / values.sum(1, keepdim=True).clamp(min=_EPS) for values in pair]
        joint = shares[0].T @ shares[1] / len(features)
        marginals = [values.mean(0) for values in (shares if normalized else pair)]
        product = torch.outer(marginals[0], marginals[1])
        return (joint * (joint / (product + _EPS) + _EPS).log()).sum()


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == labels).float().mean()
