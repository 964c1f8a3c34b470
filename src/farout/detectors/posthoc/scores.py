"""Post-hoc scores of logits and features by pytorch-ood, with fitted arrays that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from pytorch_ood.detector import ASH, DICE, GEN, KNN, RMD, SCALE, SHE, EnergyBased, MaxLogit, MaxSoftmax, ReAct, ViM
from pytorch_ood.detector import Mahalanobis as MahalanobisDistance
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutError

__all__ = [
    "Covariance",
    "FittedScores",
    "LinearHead",
    "ScoreSettings",
    "compute_logit_scores",
    "compute_odin_score",
    "limit_rank",
    "shape_activations",
]

Covariance = Literal["shrunk", "empirical"]
M = TypeVar("M", bound=MahalanobisDistance)


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of the fitted scores; see `Posthoc`."""

    k: int
    dimensions: int | None
    clip: float
    sparsity: float
    covariance: Covariance


class LinearHead:
    """The classifier's last layer in float64: features (n, D) -> logits (n, K).

    Args:
        layer: the layer.
        classes: use the first classes only; None: all.
    """

    def __init__(self, layer: torch.nn.Linear, classes: int | None = None) -> None:
        self.weight = layer.weight.detach().cpu().double()[:classes]  # a device may have no float64
        zeros = torch.zeros(len(self.weight), dtype=torch.float64)
        self.bias = zeros if layer.bias is None else layer.bias.detach().cpu().double()[:classes]

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, K), also of feature maps (n, D, 1, 1)."""
        return functional.linear(features.flatten(1).double(), self.weight, self.bias)


def compute_logit_scores(logits: Tensor, gamma: float, top: int) -> dict[str, Tensor]:
    """Scores of the logits (n, K) alone, in float64, which distinguishes confident images."""
    logits = logits.double()
    return {
        "msp": MaxSoftmax.score(logits),
        "max_logit": MaxLogit.score(logits),
        "energy": EnergyBased.score(logits),
        "gen": GEN.score(logits, gamma=gamma, M=min(top, logits.shape[1])),
    }


def compute_odin_score(logits: Tensor, temperature: float) -> Tensor:
    """-max softmax(l(x') / T) of the logits (n, K) after ODIN's step."""
    return MaxSoftmax.score(logits.double(), t=temperature)


def shape_activations(maps: Tensor, pruned: float) -> dict[str, Tensor]:
    """`ash` and `scale`: feature maps (n, D, h, w) after ASH-S and SCALE, averaged over positions (n, D)."""
    maps = maps.contiguous()
    shaped: dict[str, Tensor] = {}
    for name, cls in {"ash": ASH, "scale": SCALE}.items():
        # the shaped features themselves, not their score
        method = cls(None, head=lambda x: x.mean((2, 3)), percentile=pruned, detector=lambda x: x)
        features = method.predict_feature_maps(maps)
        # features that are all zero have no share to prune: they stay zero
        shaped[name] = torch.where(maps.flatten(1).any(1, keepdim=True), features, 0.0)
    return shaped


class FittedScores:
    """The scores that are fitted to normal images' features (n, D), with the predicted classes as labels.

    Args:
        arrays: the fitted arrays.
        head: the classifier's last layer.
        settings: as in the fit.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], head: LinearHead, settings: ScoreSettings) -> None:
        self.arrays, self.head = arrays, head
        fitted = {name: torch.as_tensor(value) for name, value in arrays.items()}
        bank = fitted["bank"]
        self.k = limit_rank(settings.k, len(bank))
        self.knn = KNN(None, k=self.k, algorithm="brute")
        self.knn.knn.set_params(n_jobs=1)  # threads slow down a search in small batches
        self.knn.fit_features(bank, torch.zeros(len(bank), dtype=torch.long))
        self.vim = ViM(None, fitted["space"].shape[1], head.weight, head.bias)
        self.vim.principal_subspace, self.vim.alpha = fitted["space"], float(fitted["alpha"])
        self.react = ReAct(None, head, threshold=float(fitted["clip"]))
        self.sparse_weight = fitted["sparse"].double()
        self.she = SHE(None, head)
        self.she.patterns = fitted["patterns"].double()
        self.mahalanobis = _restore_distance(MahalanobisDistance(None), fitted)
        self.rmds = _restore_distance(RMD(None), fitted)
        self.rmds.background_mu = fitted["background_mean"].double()
        self.rmds.background_precision = fitted["background_precision"].double()

    def compute(self, features: Tensor) -> dict[str, Tensor]:
        """Every fitted score of features (n, D), float64 (n,); higher = more anomalous."""
        single, double = features.float(), features.double()
        return {
            "react": self.react.predict_feature_maps(double),
            # the library's DICE holds (n, K, D) numbers in memory
            "dice": EnergyBased.score(functional.linear(double, self.sparse_weight, self.head.bias)),
            "vim": self.vim.predict_features(single).double(),
            "knn": self.knn.predict_features(single).double(),
            "she": self.she.predict_features(double),
            "mahalanobis": self.mahalanobis.predict_features(double),
            "rmds": self.rmds.predict_features(double),
        }

    @classmethod
    def fit(cls, features: Tensor, head: LinearHead, settings: ScoreSettings) -> FittedScores:
        """Fit to the features (n, D) of normal images."""
        features, classes = features.float(), head(features).argmax(1)
        in_distribution = torch.zeros(len(features), dtype=torch.long)
        react = ReAct(None, head, percentile=settings.clip).fit_feature_maps(features, in_distribution)
        dice = DICE(None, head.weight, head.bias, settings.sparsity).fit_features(features, in_distribution)
        # SHE: mean features of each class; of a class that is never predicted, those of all images
        patterns = [
            features[classes == k].mean(0) if bool((classes == k).any()) else features.mean(0)
            for k in range(len(head.weight))
        ]
        fit_gaussians = _fit_shrunk_gaussians if settings.covariance == "shrunk" else _fit_empirical_gaussians
        fitted = {
            "bank": features,
            "clip": torch.tensor(react.threshold, dtype=torch.float64),
            "sparse": dice.masked_w,
            "patterns": torch.stack(patterns),
            **_fit_principal_space(features, head, settings.dimensions),
            **fit_gaussians(features, classes),
        }
        return cls({name: value.numpy() for name, value in fitted.items()}, head, settings)


def limit_rank(k: int, count: int) -> int:
    """The rank of the neighbor that is used: at most a hundredth of the stored images, and at least 1."""
    return max(1, min(k, count // 100))


def _fit_principal_space(features: Tensor, head: LinearHead, dimensions: int | None) -> dict[str, Tensor]:
    """ViM's residual space and its factor alpha.

    The principal space has at most half as many dimensions as there are images: with as many dimensions as images,
    these images would have no residual.
    """
    count, width = features.shape
    default = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    dimensions = max(1, min(dimensions or default, count // 2, width - 1))
    vim = ViM(None, dimensions, head.weight, head.bias).fit_features(features, torch.zeros(count))
    if not np.isfinite(vim.alpha):
        raise FaroutError(
            f"the {count} statistics images' features span {dimensions} dimensions and have no residual outside them "
            "for ViM; give other images, more of them, or fewer dimensions"
        )
    return {"space": vim.principal_subspace, "alpha": torch.tensor(vim.alpha, dtype=torch.float64)}


def _fit_shrunk_gaussians(features: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Class means, and precisions within classes and of all images together (Ledoit and Wolf 2004)."""
    features = features.double()
    predicted, index = torch.unique(classes, return_inverse=True)
    means = torch.stack([features[index == k].mean(0) for k in range(len(predicted))])
    background = features.mean(0)
    return {
        "means": means,
        "precision": _fit_precision(features - means[index]),
        "background_mean": background,
        "background_precision": _fit_precision(features - background),
    }


def _fit_precision(residuals: Tensor) -> Tensor:
    fitted = LedoitWolf(assume_centered=True).fit(residuals.numpy())
    if not np.isfinite(fitted.precision_).all() or not fitted.covariance_.any():
        raise FaroutError(
            "the statistics images' features do not differ; look for copies of one image, or dead weights"
        )
    return torch.from_numpy(np.ascontiguousarray(fitted.precision_))


def _fit_empirical_gaussians(features: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """The library's own fit: sums of outer products with 1e-6 on the diagonal, inverted in float32."""
    count, width = features.shape
    predicted, index = torch.unique(classes, return_inverse=True)
    if count <= width + len(predicted):
        raise FaroutError(
            f"an empirical covariance of {width} features requires more than {count} statistics images; "
            "use covariance='shrunk', or give more images"
        )
    fitted = RMD(None).fit_features(features, index)
    return {
        "means": fitted.mu,
        "precision": fitted.precision,
        "background_mean": fitted.background_mu,
        "background_precision": fitted.background_precision,
    }


def _restore_distance(detector: M, fitted: Mapping[str, Tensor]) -> M:
    """The library's object with fitted arrays put back."""
    detector.mu, detector.precision = fitted["means"].double(), fitted["precision"].double()
    return detector
