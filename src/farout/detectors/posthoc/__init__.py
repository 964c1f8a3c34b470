"""Scores of a classifier's logits and features: MSP, energy, ViM, KNN, ReAct, ASH and others, from one pass."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pytorch_ood.detector import odin_preprocessing
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import count_known_classes
from farout.core.chunking import call_in_chunks
from farout.core.devices import autocast
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Measurements
from farout.detectors.posthoc.scores import (
    Covariance,
    Fitted,
    Head,
    Settings,
    logit_scores,
    neighbour,
    shaped,
    shaped_scores,
    tempered,
)
from farout.detectors.settings import check_words
from farout.diffusion.model import DiffusionModel

__all__ = ["Posthoc"]

Score = Literal[
    "msp", "max_logit", "energy", "gen", "odin", "react", "dice", "ash", "scale", "vim", "knn", "she", "mahalanobis",
    "rmds", "extra",
]  # fmt: skip
_SHARES = ("clip", "pruned", "sparsity")


class Posthoc(Detector):
    """Post-hoc scores of a trained classifier; pytorch-ood's implementations, all from one pass over the images.

    With logits l(x) of K classes, features z(x) before the last layer l = W z + b, and E(l) = -log sum_k exp(l_k):

    - msp = -max softmax(l) (Hendrycks and Gimpel 2017); max_logit = -max l (Hendrycks et al. 2022); energy = E(l) (Liu
      et al. 2020); gen = mean over the `top` largest probabilities p of (p (1 - p))^gamma (Liu, Lochman and Zach 2023).
    - odin = -max softmax(l(x') / T), x' = x - step sign(grad of the loss of the predicted class at T) (Liang et al.
      2018): two more passes and a gradient, so it is measured only where it is asked for.
    - react = E of features clipped at the share `clip` of the good images' values (Sun et al. 2021); dice = E with the
      share `sparsity` of the weights of least mean contribution left out (Sun and Li 2022); ash, scale = E of features
      times exp(s1 / s2), s1 the sum of all, s2 that of all but the share `pruned` of smallest values, which ash (its
      variant S) also sets to zero (Djurisic et al. 2023; Xu et al. 2024).
    - vim = alpha |r| + E(l), r the part of z outside the principal space (Wang et al. 2022); knn = distance of
      z / |z| to the k-th nearest good image (Sun et al. 2022); she = -z . mean features of the predicted class (Zhang
      et al. 2023).
    - mahalanobis = min over classes c of (z - m_c)^T S^-1 (z - m_c) / 2 (Lee et al. 2018); rmds = min over classes of
      (z - m_c)^T S^-1 (z - m_c) - (z - m)^T C^-1 (z - m) (Ren et al. 2021).

    - extra = l_(K+1) - log sum_k exp(l_k), the log-odds of the outliers' class, of classifiers that were trained with
      one (`--loss k+1`): all other scores leave its logit out.

    The classes in mahalanobis, rmds and she are those that the classifier predicts, not labels: the statistics images
    then need none, and a source's label numbers need not be the classifier's. A class that is never predicted has no
    mean in mahalanobis and rmds, and the mean of all images in she. The statistics images are such as the classifier
    was not trained on, where the papers take its training images.

    Args:
        score: indicator used as score (vim has the highest AUROC on dev sources); the others are written too.
        odin: also compute ODIN, which needs two more passes and a gradient; implied by score=odin.
        odin_step: step size of ODIN's perturbation, for images in [0, 1].
        odin_temperature: temperature of ODIN.
        shaping: where ash and scale act: on `pooled` features, as in OpenOOD, or on feature `maps` before pooling, as
            in pytorch-ood's examples (requires a network with a pooling layer).
        pruned: share of activations that ash and scale prune.
        clip: quantile at which react clips activations.
        sparsity: share of weights that dice sets to zero.
        dimensions: dimension of vim's principal space, at most half the number of statistics images; default: 1000 from
            2,048 features on (the paper), 512 from 768 on, else half the number of features.
        k: rank of knn's neighbour; at most 1 % of the statistics images.
        gamma: exponent of gen.
        top: number of largest probabilities that gen uses.
        covariance: covariance of mahalanobis and rmds: `shrunk` (Ledoit and Wolf 2004), or `empirical` (pytorch-ood),
            which requires more statistics images than features.

    Raises FaroutError for values out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"classifier"})
    choices: ClassVar[frozenset[str]] = frozenset(
        {"score", "clip", "sparsity", "dimensions", "k", "gamma", "top", "covariance"}
    )

    def __init__(
        self,
        *,
        score: Score = "vim",
        odin: bool = False,
        odin_step: float = 0.0014,
        odin_temperature: float = 1000.0,
        shaping: Literal["pooled", "maps"] = "pooled",
        pruned: float = 0.65,
        clip: float = 0.9,
        sparsity: float = 0.9,
        dimensions: int | None = None,
        k: int = 50,
        gamma: float = 0.1,
        top: int = 100,
        covariance: Covariance = "shrunk",
    ) -> None:
        check_words(self)
        for name in _SHARES:
            if not 0 <= self.config[name] < 1:
                raise FaroutError(f"{name} is a share from 0 to below 1, got {self.config[name]}")
        least = {"k": k, "top": top, "dimensions": 1 if dimensions is None else dimensions}
        if min(least.values()) < 1 or min(odin_temperature, gamma) <= 0 or odin_step < 0:
            raise FaroutError(
                "k, top and dimensions must be at least 1, gamma and odin_temperature more than 0, odin_step at "
                "least 0; "
                f"got {k}, {top}, {dimensions}, {gamma:g}, {odin_temperature:g} and {odin_step:g}"
            )
        self.with_odin = odin or score == "odin"
        self.fitted_scores: Fitted | None = None
        self._rows_seen = 0

    @property
    def network(self) -> Classifier:
        """The classifier, once it is there."""
        if self.classifier is None:
            raise FaroutError("post-hoc scores require a classifier; give one, or images with labels to train one on")
        return self.classifier

    @property
    def head(self) -> Head:
        """The classifier's last layer."""
        return Head(self.network.head, count_known_classes(self.network))

    @property
    def settings(self) -> Settings:
        """What the fitted scores are told."""
        told = {name: self.config[name] for name in ("dimensions", "clip", "sparsity", "covariance")}
        return Settings(neighbour=self.config["k"], **told)

    @property
    def evaluations(self) -> int:
        """Rows that the classifier has evaluated; an ODIN score takes two more, its gradient not counted."""
        return self._rows_seen

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Refuses a classifier without a class of outliers where that is the score, and one whose features shaped maps
        cannot stand for.
        """
        assert classifier is not None
        self._check(classifier)

    def prepare(self) -> None:
        """Checks the classifier again: `reconfigured` may have chosen another score."""
        self._check(self.network)

    def _check(self, network: Classifier) -> None:
        if self.config["score"] == "extra" and count_known_classes(network) == network.classes:
            raise FaroutError("this classifier has no class of outliers to score by; train one with --loss k+1")
        if self.config["shaping"] == "maps":
            images = torch.linspace(0, 1, network.preprocessing.channels * 64).reshape(1, -1, 8, 8)
            found = network.outputs(images, maps=True) if network.has_maps else None
            if found is None or found.maps is None or not _close(found.maps.mean((2, 3)), found.features):
                raise FaroutError(
                    "the features of this network are not the averages of feature maps that a layer pools; use "
                    "shaping='pooled'"
                )

    def describe(self) -> dict[str, Any]:
        """With knn's neighbour and the dimensions of vim's residual space that are used."""
        found = {} if self.fitted_scores is None else self.fitted_scores.arrays
        used = {"neighbour": neighbour(self.config["k"], len(found["bank"]))} if found else {}
        residual = {"residual_dimensions": found["space"].shape[1]} if found else {}
        return {**super().describe(), **used, **residual}

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `logits` (B, K) and `features` (B, D); with shaped maps `ash` and `scale` (B, D); with ODIN `odin`
        (B, K), the logits of the changed images. A class of outliers stands last in `logits`.
        """
        on_maps = self.config["shaping"] == "maps"
        given = self.network.outputs(batch.images, self.runtime.batch_size, self.precision, maps=on_maps)
        self._rows_seen += len(batch.keys)
        found = {"logits": given.logits, "features": given.features}
        if given.maps is not None:
            found |= shaped(given.maps, self.config["pruned"])
        if self.with_odin:
            found["odin"] = self._odin(batch.images)
        return Measurements(batch.keys, vectors={name: value.float().cpu() for name, value in found.items()})

    def _odin(self, images: Tensor) -> Tensor:
        """Logits of the images after ODIN's step."""
        network, known = self.network, count_known_classes(self.network)
        self._rows_seen += 2 * len(images)

        def logits(x: Tensor) -> Tensor:
            with autocast(network.device, self.precision):
                # a view: torch's counter of operations, which hooks modules' inputs, refuses leaves
                return network.module(x.view_as(x)).float()[:, :known]

        @torch.no_grad()
        def changed(x: Tensor) -> Tensor:
            step, temperature = self.config["odin_step"], self.config["odin_temperature"]
            return logits(odin_preprocessing(logits, x, eps=step, temperature=temperature, norm_std=network.std))

        ready = network.normalize(images.to(network.device))
        return call_in_chunks(network.module, changed, ready, batch_size=self.runtime.batch_size)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Learns the means, covariances, thresholds, spaces and neighbours; raises FaroutError where they do not exist,
        and where odin is the score and was not measured.
        """
        if self.with_odin and "odin" not in measurements.vectors:
            raise FaroutError("odin was not measured in this detector's fit; fit again with odin=True")
        self.fitted_scores = Fitted.fit(measurements.vectors["features"], self.head, self.settings)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """All scores by name; `odin` where it is measured, `extra` where there is a class of outliers."""
        assert self.fitted_scores is not None
        vectors, config = measurements.vectors, self.config
        features, logits = vectors["features"], vectors["logits"]
        known = logits[:, : len(self.fitted_scores.head.weight)]
        maps = {name: vectors[name] for name in ("ash", "scale") if name in vectors}
        found = {
            **logit_scores(known, config["gamma"], config["top"]),
            **self.fitted_scores.scores(features),
            **shaped_scores(
                maps or shaped(features[:, :, None, None].double(), config["pruned"]), self.fitted_scores.head
            ),
        }
        if logits.shape[1] > known.shape[1]:
            found["extra"] = logits[:, -1].double() - known.double().logsumexp(1)
        if self.with_odin:
            found["odin"] = tempered(vectors["odin"], config["odin_temperature"])
        return found

    def embedding(self, measurements: Measurements) -> np.ndarray | None:
        """The classifier's features."""
        return measurements.vectors["features"].double().numpy()

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.fitted_scores is None else dict(self.fitted_scores.arrays)

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back: the library's objects are built anew."""
        if state:
            self.fitted_scores = Fitted(state, self.head, self.settings)

    @classmethod
    def tiny(cls, resources: Any) -> Posthoc:
        """Distances of the features of a tiny classifier."""
        made = cls(score="mahalanobis", odin=True, shaping="maps")
        made.classifier = resources.classifier
        return made


def _close(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-4)
