"""Scores of a classifier's logits and features: MSP, energy, ViM, KNN, ReAct, ASH and others, from one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pytorch_ood.detector import odin_preprocessing
from torch import Tensor, nn

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import count_known_classes
from farout.core.chunking import call_in_chunks
from farout.core.devices import autocast
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors.argument_checks import check_literals
from farout.detectors.base import Detector, Measurements
from farout.detectors.declarations import Requirements
from farout.detectors.posthoc.scores import (
    Covariance,
    FittedScores,
    LinearHead,
    ScoreSettings,
    compute_logit_scores,
    compute_odin_score,
    shape_activations,
)
from farout.diffusion.model import DiffusionModel

__all__ = ["Posthoc", "Score"]

Score = Literal[
    "msp", "max_logit", "energy", "gen", "odin", "react", "dice", "ash", "scale", "vim", "knn", "she", "mahalanobis",
    "rmds", "extra",
]  # fmt: skip


class Posthoc(Detector):
    """Post-hoc scores of a trained classifier; pytorch-ood's implementations, all from one pass over the images.

    With logits l(x) of K classes, features z(x) before the last layer l = W z + b, and E(l) = -log sum_k exp(l_k):

    - msp = -max softmax(l) (Hendrycks and Gimpel 2017); max_logit = -max l (Hendrycks et al. 2022); energy = E(l) (Liu
      et al. 2020); gen = mean over the `top` largest probabilities p of (p (1 - p))^gamma (Liu, Lochman and Zach 2023).
    - odin = -max softmax(l(x') / T), x' = x - step sign(grad of the loss of the predicted class at T) (Liang et al.
      2018): two more passes and a gradient, so it is measured only with `odin`.
    - react = E of features clipped at the share `clip` of the normal images' values (Sun et al. 2021); dice = E without
      the share `sparsity` of the weights of least mean contribution (Sun and Li 2022); ash, scale = E of features times
      exp(s1 / s2), s1 the sum of all features, s2 the sum without the share `pruned` of the smallest, which ash (its
      variant S) also sets to zero (Djurisic et al. 2023; Xu et al. 2024).
    - vim = alpha |r| + E(l), r the part of z outside the principal space (Wang et al. 2022); knn = distance of
      z / |z| to the k-th nearest normal image (Sun et al. 2022); she = -z . mean features of the predicted class (Zhang
      et al. 2023).
    - mahalanobis = min over classes c of (z - m_c)^T S^-1 (z - m_c) / 2 (Lee et al. 2018); rmds = min over classes of
      (z - m_c)^T S^-1 (z - m_c) - (z - m)^T C^-1 (z - m) (Ren et al. 2021).
    - extra = l_(K+1) - log sum_k exp(l_k), the log-odds of the class of outliers, for classifiers that were trained
      with one (`--loss k+1`); all other scores leave its logit out.

    The classes in mahalanobis, rmds and she are the predicted ones, so that the statistics images need no labels. A
    class that is never predicted has no mean in mahalanobis and rmds, and the mean of all images in she. The statistics
    images are images that the classifier was not trained on, whereas the papers use its training images.

    Args:
        score: indicator used as score (vim has the highest AUROC on changed training images); the others are written
            too.
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
        k: rank of knn's neighbor; at most 1 % of the statistics images.
        gamma: exponent of gen.
        top: number of largest probabilities that gen uses.
        covariance: covariance of mahalanobis and rmds: `shrunk` (Ledoit and Wolf 2004), or `empirical` (pytorch-ood),
            which requires more statistics images than features.
    """

    requirements: ClassVar[Requirements] = Requirements(classifier=True)
    scoring_arguments: ClassVar[frozenset[str]] = frozenset(
        {"score", "clip", "sparsity", "dimensions", "k", "gamma", "top", "covariance"}
    )
    test_arguments: ClassVar[Mapping[str, Any]] = {"score": "mahalanobis", "odin": True, "shaping": "maps"}

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
        check_literals(self)
        for name, share in {"clip": clip, "pruned": pruned, "sparsity": sparsity}.items():
            if not 0 <= share < 1:
                raise FaroutError(f"{name} is a share from 0 to below 1, got {share}")
        if (
            min(k, top, 1 if dimensions is None else dimensions) < 1
            or min(odin_temperature, gamma) <= 0
            or odin_step < 0
        ):
            raise FaroutError(
                "k, top and dimensions must be at least 1, gamma and odin_temperature more than 0, odin_step at "
                "least 0; "
                f"got {k}, {top}, {dimensions}, {gamma:g}, {odin_temperature:g} and {odin_step:g}"
            )
        self.measures_odin = odin or score == "odin"
        self.fitted_scores: FittedScores | None = None
        self._evaluations = 0

    @property
    def network(self) -> Classifier:
        """The classifier; raises FaroutError when there is none."""
        if self.classifier is None:
            raise FaroutError("post-hoc scores require a classifier; give one, or images with labels to train one on")
        return self.classifier

    @property
    def evaluations(self) -> int:
        """Rows that the classifier has evaluated; ODIN evaluates two more per image, without counting its gradient."""
        return self._evaluations

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Reject a classifier that does not allow the score `extra` or the shaping of feature maps."""
        assert classifier is not None
        self._check_classifier(classifier)

    def _check_classifier(self, classifier: Classifier) -> None:
        if self.config["score"] == "extra" and count_known_classes(classifier) == classifier.classes:
            raise FaroutError("this classifier has no class of outliers to score by; train one with --loss k+1")
        if self.config["shaping"] == "maps":
            gradient = torch.linspace(0, 1, classifier.preprocessing.channels * 64).reshape(1, -1, 8, 8)
            outputs = classifier.outputs(gradient, maps=True) if classifier.has_maps else None
            pooled = None if outputs is None or outputs.maps is None else outputs.maps.mean((2, 3))
            if outputs is None or pooled is None or not _is_close(pooled, outputs.features):
                raise FaroutError(
                    "the features of this network are not the averages of feature maps that a layer pools; use "
                    "shaping='pooled'"
                )

    def prepare_networks(self) -> None:
        """Check the classifier again, since `with_scoring` may have chosen another score, and build its last layer."""
        self._check_classifier(self.network)
        self.head = LinearHead(self.network.head, count_known_classes(self.network))

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Vectors `logits` (B, K) and `features` (B, D); a class of outliers is the last of `logits`.

        With shaping of maps also `ash` and `scale` (B, D); with ODIN also `odin` (B, K), the logits after its step.
        """
        shapes_maps = self.config["shaping"] == "maps"
        outputs = self.network.outputs(
            batch.images, self.runtime.batch_size, self.precision, maps=shapes_maps, backend=self.backend
        )
        self._evaluations += len(batch.keys)
        vectors = {"logits": outputs.logits, "features": outputs.features}
        if outputs.maps is not None:
            vectors |= shape_activations(outputs.maps, self.config["pruned"])
        if self.measures_odin:
            vectors["odin"] = self._perturbed_logits(batch.images)
        return Measurements(batch.keys, vectors={name: value.float().cpu() for name, value in vectors.items()})

    def _perturbed_logits(self, images: Tensor) -> Tensor:
        """l(x') with x' = x - step sign(grad of the loss of the predicted class at T) (Liang et al. 2018)."""
        network, classes = self.network, count_known_classes(self.network)
        step, temperature = self.config["odin_step"], self.config["odin_temperature"]
        self._evaluations += 2 * len(images)

        def logits(x: Tensor) -> Tensor:
            with autocast(network.device, self.precision):
                # a view, because torch's counter of operations, which hooks the inputs of modules, rejects leaf tensors
                return network.module(x.view_as(x)).float()[:, :classes]

        @torch.no_grad()
        def perturbed_logits(x: Tensor) -> Tensor:
            return logits(odin_preprocessing(logits, x, eps=step, temperature=temperature, norm_std=network.std))

        x = network.normalize(images.to(network.device))
        return call_in_chunks(network.module, perturbed_logits, x, batch_size=self.runtime.batch_size)

    def _score_settings(self) -> ScoreSettings:
        names = ("dimensions", "clip", "sparsity", "covariance", "k")
        return ScoreSettings(**{name: self.config[name] for name in names})

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit means, covariances, thresholds and the principal space, and store the features.

        Raises FaroutError where one of them does not exist, and where odin is the score and was not measured.
        """
        if self.measures_odin and "odin" not in measurements.vectors:
            raise FaroutError("odin was not measured in this detector's fit; fit again with odin=True")
        self.fitted_scores = FittedScores.fit(measurements.vectors["features"], self.head, self._score_settings())

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """All scores by name; `odin` if it is measured, `extra` if there is a class of outliers."""
        assert self.fitted_scores is not None
        vectors, config = measurements.vectors, self.config
        features, logits = vectors["features"], vectors["logits"]
        known = logits[:, : len(self.head.weight)]
        scores = compute_logit_scores(known, config["gamma"], config["top"])
        scores |= self.fitted_scores.compute(features)
        if config["shaping"] == "maps":
            shaped: Mapping[str, Tensor] = vectors
        else:
            shaped = shape_activations(features[:, :, None, None].double(), config["pruned"])
        scores |= {name: -self.head(shaped[name]).logsumexp(1) for name in ("ash", "scale")}
        if logits.shape[1] > known.shape[1]:
            scores["extra"] = logits[:, -1].double() - known.double().logsumexp(1)
        if self.measures_odin:
            scores["odin"] = compute_odin_score(vectors["odin"], config["odin_temperature"])
        return scores

    def compute_embedding(self, measurements: Measurements) -> np.ndarray | None:
        """The classifier's features."""
        return measurements.vectors["features"].double().numpy()

    def build_score_module(self) -> nn.Module:
        """The classifier and the configured score."""
        from farout.detectors.posthoc.score_module import PosthocScore

        if self.score_name == "odin":
            raise FaroutError(
                "Posthoc with score=odin cannot be exported: it requires a gradient; choose another score, for example "
                "with Posthoc.with_scoring(score='vim')"
            )
        if self.score_name in ("ash", "scale") and self.config["shaping"] == "maps":
            raise FaroutError(
                f"Posthoc with score={self.score_name} and shaping=maps cannot be exported; fit with shaping=pooled"
            )
        assert self.fitted_scores is not None
        return PosthocScore(self.network, self.score_name, self.head, self.fitted_scores, self.config)

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted arrays."""
        return {} if self.fitted_scores is None else dict(self.fitted_scores.arrays)

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the fitted arrays."""
        if state:
            self.fitted_scores = FittedScores(state, self.head, self._score_settings())

    def describe_statistics(self) -> dict[str, Any]:
        """The rank of knn's neighbor and the dimension of vim's residual space."""
        if self.fitted_scores is None:
            return {}
        return {"k": self.fitted_scores.k, "residual_dimensions": self.fitted_scores.arrays["space"].shape[1]}


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
