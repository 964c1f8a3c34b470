"""The scores themselves: pytorch-ood's classes, on logits and features; fitted arrays in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pytorch_ood.detector import ASH, DICE, GEN, KNN, RMD, SCALE, SHE, EnergyBased, MaxLogit, MaxSoftmax, ReAct, ViM
from pytorch_ood.detector import Mahalanobis as MahalanobisDistance
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutError

__all__ = ["Covariance", "Fitted", "Head", "Settings", "logit_scores", "shaped", "shaped_scores", "tempered"]

Covariance = Literal["shrunk", "empirical"]


@dataclass(frozen=True)
class Settings:
    """What the fitted scores are told; see `Posthoc`."""

    neighbour: int
    dimensions: int | None
    clip: float
    sparsity: float
    covariance: Covariance


class Head:
    """The classifier's last layer: features (n, D) -> logits (n, K) of its first K classes, None: all, in float64."""

    def __init__(self, layer: torch.nn.Linear, classes: int | None = None) -> None:
        self.weight = layer.weight.detach().double().cpu()[:classes]
        none = torch.zeros(len(self.weight), dtype=torch.float64)
        self.bias = none if layer.bias is None else layer.bias.detach().double().cpu()[:classes]

    def __call__(self, features: Tensor) -> Tensor:
        """Logits; maps (n, D, 1, 1) are features too."""
        return functional.linear(features.flatten(1).double(), self.weight, self.bias)


def logit_scores(logits: Tensor, gamma: float, top: int) -> dict[str, Tensor]:
    """The scores that read the logits (n, K) alone; in float64, where confident images do not all score -1."""
    logits = logits.double()
    return {
        "msp": MaxSoftmax.score(logits),
        "max_logit": MaxLogit.score(logits),
        "energy": EnergyBased.score(logits),
        "gen": GEN.score(logits, gamma=gamma, M=min(top, logits.shape[1])),
    }


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """ODIN's score of the logits (n, K) of changed images: -max softmax(logits / T)."""
    return MaxSoftmax.score(logits.double(), t=temperature)


def shaped(maps: Tensor, pruned: float) -> dict[str, Tensor]:
    """Feature maps (n, D, h, w) after ASH-S and SCALE, averaged over (h, w): features (n, D) by name."""
    whole = maps.contiguous()
    taken: dict[str, Tensor] = {}
    for name, kind in {"ash": ASH, "scale": SCALE}.items():
        # the head keeps what the library would score, the mean over each map
        detector = kind(None, head=lambda x: x.mean((2, 3)), percentile=pruned, detector=lambda x: x)
        found = detector.predict_feature_maps(whole)
        # features that are all zero have no share to prune: they stay zero
        taken[name] = torch.where(whole.flatten(1).any(1, keepdim=True), found, 0.0)
    return taken


def shaped_scores(features: dict[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Energies of the logits of shaped features."""
    return {name: EnergyBased.score(head(value)) for name, value in features.items()}


class Fitted:
    """The scores that learn from good images' features (n, D), whose classes are those that the classifier predicts.

    Args:
        arrays: what `fit` learnt.
        head: the classifier's last layer.
        settings: as they were in the fit.
    """

    def __init__(self, arrays: dict[str, np.ndarray], head: Head, settings: Settings) -> None:
        self.arrays, self.head = arrays, head
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
        self.neighbours = KNN(None, k=neighbour(settings.neighbour, len(tensors["bank"])), algorithm="brute")
        self.neighbours.knn.set_params(n_jobs=1)  # searched in small batches, which threads only slow down
        self.neighbours.fit_features(tensors["bank"], torch.zeros(len(tensors["bank"]), dtype=torch.long))
        self.space = ViM(None, tensors["space"].shape[1], head.weight, head.bias)
        self.space.principal_subspace, self.space.alpha = tensors["space"], float(tensors["alpha"])
        self.clipped = ReAct(None, head, threshold=float(tensors["clip"]))
        self.sparse = tensors["sparse"].double()
        self.patterns = SHE(None, head)
        self.patterns.patterns = tensors["patterns"].double()
        self.distances = [_distance(MahalanobisDistance(None), tensors), _distance(RMD(None), tensors)]

    def scores(self, features: Tensor) -> dict[str, Tensor]:
        """Every score of features (n, D), float64 (n,); higher is further out."""
        wide, narrow = features.double(), features.float()
        # the library's own call holds (n, K, D) numbers at once
        sparse = functional.linear(wide, self.sparse, self.head.bias)
        return {
            "react": self.clipped.predict_feature_maps(wide),
            "dice": EnergyBased.score(sparse),
            "vim": self.space.predict_features(narrow).double(),
            "knn": self.neighbours.predict_features(narrow).double(),
            "she": self.patterns.predict_features(wide),
            "mahalanobis": self.distances[0].predict_features(wide),
            "rmds": self.distances[1].predict_features(wide),
        }

    @classmethod
    def fit(cls, features: Tensor, head: Head, settings: Settings) -> Fitted:
        """Learns from the features (n, D) of good images."""
        features, classes = features.float(), head(features).argmax(1)
        known = torch.zeros(len(features), dtype=torch.long)
        clipped = ReAct(None, head, percentile=settings.clip).fit_feature_maps(features, known)
        sparse = DICE(None, head.weight, head.bias, settings.sparsity).fit_features(features, known)
        found = {
            "bank": features,
            "clip": torch.tensor(clipped.threshold, dtype=torch.float64),
            "sparse": sparse.masked_w,
            "patterns": _patterns(features, classes, len(head.weight)),
            **_principal(features, head, settings.dimensions),
            **(_shrunk if settings.covariance == "shrunk" else _empirical)(features, classes),
        }
        return cls({name: value.numpy() for name, value in found.items()}, head, settings)


def neighbour(wanted: int, count: int) -> int:
    """The neighbour that is used: as wanted, at most a hundredth of the images kept, at least 1."""
    return max(1, min(wanted, count // 100))


def _principal(features: Tensor, head: Head, wanted: int | None) -> dict[str, Tensor]:
    """ViM's residual space and its factor.

    The principal space has at most half as many dimensions as there are images: with as many, nothing of these images
    would be left outside it.
    """
    count, width = features.shape
    usual = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    size = max(1, min(wanted or usual, count // 2, width - 1))
    fitted = ViM(None, size, head.weight, head.bias).fit_features(features, torch.zeros(count))
    if not np.isfinite(fitted.alpha):
        raise FaroutError(
            f"the {count} statistics images' features lie in {size} dimensions and nothing is left outside them for "
            "ViM; give other images, more of them, or fewer dimensions"
        )
    return {"space": fitted.principal_subspace, "alpha": torch.tensor(fitted.alpha, dtype=torch.float64)}


def _patterns(features: Tensor, classes: Tensor, count: int) -> Tensor:
    """Mean features of each class (K, D); of a class that was never predicted, those of all images."""
    means = [features[classes == k].mean(0) if bool((classes == k).any()) else features.mean(0) for k in range(count)]
    return torch.stack(means)


def _shrunk(features: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Class means, and precisions within classes and of all images together (Ledoit and Wolf 2004)."""
    wide = features.double()
    seen, place = classes.unique(return_inverse=True)
    means = torch.stack([wide[place == k].mean(0) for k in range(len(seen))])
    background = wide.mean(0)
    return {
        "means": means,
        "precision": _precision(wide - means[place]),
        "background_mean": background,
        "background_precision": _precision(wide - background),
    }


def _precision(residuals: Tensor) -> Tensor:
    fitted = LedoitWolf(assume_centered=True).fit(residuals.numpy())
    if not np.isfinite(fitted.precision_).all() or not fitted.covariance_.any():
        raise FaroutError(
            "the statistics images' features do not differ; look for copies of one image, or dead weights"
        )
    return torch.from_numpy(np.ascontiguousarray(fitted.precision_))


def _empirical(features: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """The library's own fit: sums of outer products with 1e-6 on the diagonal, inverted in float32."""
    count, width = features.shape
    if count <= width + len(classes.unique()):
        raise FaroutError(
            f"an empirical covariance of {width} features requires more than {count} statistics images; "
            "use covariance='shrunk', or give more images"
        )
    place = classes.unique(return_inverse=True)[1]
    fitted = RMD(None).fit_features(features, place)
    return {
        "means": fitted.mu,
        "precision": fitted.precision,
        "background_mean": fitted.background_mu,
        "background_precision": fitted.background_precision,
    }


def _distance(detector: MahalanobisDistance, tensors: dict[str, Tensor]) -> MahalanobisDistance:
    """The library's object with fitted arrays put back."""
    wide = {name: tensors[name].double() for name in tensors if name.startswith(("means", "prec", "back"))}
    detector.mu, detector.precision = wide["means"], wide["precision"]
    if isinstance(detector, RMD):
        detector.background_mu = wide["background_mean"]
        detector.background_precision = wide["background_precision"]
    return detector
