"""Post-hoc scores as torch modules, for exported graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farout.classifiers.model import Classifier
from farout.detectors.posthoc.scores import FittedScores, LinearHead

__all__ = ["PosthocScore"]


class PosthocScore(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> one score of `Posthoc`, float64 (B,).

    Args:
        classifier: the classifier.
        score: name of the score.
        head: its last layer, without a class of outliers.
        fitted: the fitted scores.
        config: the arguments of `Posthoc`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    clip: Tensor
    sparse: Tensor
    origin: Tensor
    space: Tensor
    alpha: Tensor
    bank: Tensor
    patterns: Tensor
    means: Tensor
    precision: Tensor
    background_mean: Tensor
    background_precision: Tensor

    def __init__(
        self, classifier: Classifier, score: str, head: LinearHead, fitted: FittedScores, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.score, self.gamma, self.top, self.pruned = score, config["gamma"], config["top"], config["pruned"]
        self.k, self.classes = fitted.k, len(head.weight)
        network = copy.deepcopy(classifier.module).cpu().eval()
        self.last_layer = copy.deepcopy(classifier.head).cpu()
        network.set_submodule(classifier.head_name, nn.Identity())  # then it returns the features
        self.network = network
        channels = len(classifier.mean)
        self.register_buffer("mean", torch.tensor(classifier.mean).reshape(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.std).reshape(1, channels, 1, 1))
        arrays = {name: torch.as_tensor(np.array(array)) for name, array in fitted.arrays.items()}
        arrays |= {"weight": head.weight, "bias": head.bias, "origin": fitted.vim.u}
        used = {
            "react": ("weight", "bias", "clip"),
            "dice": ("sparse", "bias"),
            "ash": ("weight", "bias"),
            "scale": ("weight", "bias"),
            "vim": ("weight", "bias", "origin", "space", "alpha"),
            "knn": ("bank",),
            "she": ("weight", "bias", "patterns"),
            "mahalanobis": ("means", "precision"),
            "rmds": ("means", "precision", "background_mean", "background_precision"),
        }
        for name in used.get(score, ()):
            self.register_buffer(name, arrays[name].double().clone())

    def forward(self, images: Tensor) -> Tensor:
        """The score, as `Posthoc.compute_scores` computes it."""
        features = self.network((images - self.mean) / self.std).float()
        if self.score in ("msp", "max_logit", "energy", "gen", "extra"):
            return self._score_logits(self.last_layer(features).double())
        z = features.double()
        if self.score == "react":
            return -torch.logsumexp(self._logits(z.minimum(self.clip)), dim=1)
        if self.score == "dice":
            return -torch.logsumexp(torch.mm(z, self.sparse.T) + self.bias, dim=1)
        if self.score in ("ash", "scale"):
            return -torch.logsumexp(self._logits(self._shape(z)), dim=1)
        if self.score == "vim":
            residual = torch.mm(z - self.origin, self.space).square().sum(1).sqrt()
            return self.alpha * residual - torch.logsumexp(self._logits(z), dim=1)
        if self.score == "knn":
            return self._nearest_distance(z)
        if self.score == "she":
            return -(z * self.patterns[self._logits(z).argmax(1)]).sum(1)
        distances = torch.stack([self._distance(z - mean, self.precision) for mean in self.means], dim=1).amin(1)
        if self.score == "mahalanobis":
            return distances / 2
        return distances - self._distance(z - self.background_mean, self.background_precision)

    def _score_logits(self, logits: Tensor) -> Tensor:
        known = logits[:, : self.classes]
        if self.score == "msp":
            return -known.softmax(1).amax(1)
        if self.score == "max_logit":
            return -known.amax(1)
        if self.score == "energy":
            return -torch.logsumexp(known, dim=1)
        if self.score == "extra":
            return logits[:, -1] - torch.logsumexp(known, dim=1)
        probabilities = known.softmax(1).clamp(1e-7, 1 - 1e-7).topk(min(self.top, self.classes), dim=1).values
        return (probabilities.pow(self.gamma) * (1 - probabilities).pow(self.gamma)).mean(1)

    def _logits(self, z: Tensor) -> Tensor:
        return torch.mm(z, self.weight.T) + self.bias

    def _shape(self, z: Tensor) -> Tensor:
        """ASH-S or SCALE of pooled features."""
        kept = z.shape[1] - int(np.round(z.shape[1] * self.pruned))
        highest = z.topk(kept, dim=1).values
        factor = torch.exp(z.sum(1, keepdim=True) / highest.sum(1, keepdim=True))
        shaped = z if self.score == "scale" else torch.where(z >= highest[:, -1:], z, 0.0)
        # features that are all zero have no share to prune: they stay zero
        return torch.where((z != 0).any(1, keepdim=True), shaped * factor, 0.0)

    def _nearest_distance(self, z: Tensor) -> Tensor:
        normalized, bank = (v / v.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12) for v in (z, self.bank))
        squared = bank.square().sum(1) - 2 * torch.mm(normalized, bank.T)
        nearest = squared.topk(self.k, dim=1, largest=False).indices
        return (normalized[:, None] - bank[nearest]).square().sum(2).sqrt().amax(1)

    @staticmethod
    def _distance(centered: Tensor, precision: Tensor) -> Tensor:
        return (torch.mm(centered, precision) * centered).sum(1)
