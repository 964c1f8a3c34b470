"""Several detectors that score every image together: one pass over shared networks and features, one p-value."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError, MisleadingResultWarning, suggest_names
from farout.core.names import find_path
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.detectors import DETECTORS
from farout.detectors.argument_checks import check_literals
from farout.detectors.base import Detector, find_detector, load
from farout.detectors.cost import Cost, measure_cost
from farout.detectors.declarations import Requirements
from farout.detectors.ensemble.combination import Standardization, TailProbabilities, learn_weights
from farout.detectors.ensemble.shared_inputs import SharedBatch, SharedInput, find_inputs, iterate_shared_batches
from farout.detectors.results import Measurements
from farout.features.densities import pack_arrays, unpack_arrays

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.data.splits import Split
    from farout.detectors.fit_settings import FitSettings
    from farout.diffusion.config import DiffusionConfig
    from farout.diffusion.model import DiffusionModel

__all__ = ["CHANGES", "Ensemble"]

CHANGES = ("rot90", "blur", "contrast", "noise", "patch")
"""Variants of the statistics images that `learned` weights are learned on."""


class Ensemble(Detector):
    """Several detectors whose scores are combined into one, with one calibration.

    With s_i the score of part i, z_i = s_i, or log s_i where all scores of the statistics images are positive,
    standardized by their median and median absolute deviation and at least their lowest value, and p_i the probability
    that a normal image has at least this z_i (the share of the statistics images, with an exponential tail above their
    90 % quantile):

        z_sum   = sum_i w_i z_i, with equal weights or `part_weights`
        fisher  = -2 sum_i log p_i                         (Fisher 1932)
        max     = max_i -log p_i                           (Tippett 1931)
        learned = sum_i w_i z_i, with weights w_i >= 0 from logistic regression between the statistics images and
                  changed copies of them: rotated, blurred, with less contrast, with noise, with pasted patches

    The score of every part is an indicator, too: `knn_score`. Statistics and calibration images are new to all parts:
    no network was trained on them, and no part estimated its statistics on them. Each image is decoded once; parts with
    the same preprocessing share the prepared image, and parts with the same backbone its features.

    Args:
        parts: names of methods, which are fitted with their defaults on the images that the ensemble's own statistics
            and calibration leave, with one diffusion model of images, one classifier and one backbone for all; or
            folders of fitted detectors (a folder with the name of a method is written ./NAME). In Python also
            detectors, fitted or not.
        combine: how the scores are combined: `z_sum`, `fisher`, `max` or `learned`; default: `learned`, or `z_sum` with
            `part_weights` or without changed images.
        part_weights: weights of the parts in `z_sum`; default: equal weights.
        changed_images: number of statistics images that are changed and measured in the fit, five times each, for
            `learned`; 0: `learned` is not available.
        prior: strength with which `learned` weights are held near equal ones.
    """

    requirements: ClassVar[Requirements] = Requirements(
        diffusion="images", classifier=True, statistics=200, more_statistics=False
    )
    scoring_arguments: ClassVar[frozenset[str]] = frozenset({"combine", "part_weights", "prior"})
    test_arguments: ClassVar[Mapping[str, Any]] = {"parts": ("msma", "posthoc"), "changed_images": 4}

    parts: Mapping[str, Detector]

    def __init__(
        self,
        parts: tuple[str, ...] = ("semantic", "reconstruction"),
        *,
        combine: Literal["z_sum", "fisher", "max", "learned"] | None = None,
        part_weights: tuple[float, ...] | None = None,
        changed_images: int = 100,
        prior: float = 0.001,
    ) -> None:
        check_literals(self)
        given: Sequence[Any] = [parts] if isinstance(parts, str | Path | Detector) else list(parts)
        if len(given) < 2:
            raise FaroutError(f"an ensemble has at least two parts, got {len(given)}")
        if changed_images < 0 or prior < 0:
            raise FaroutError(f"changed_images and prior must be at least 0, got {changed_images} and {prior:g}")
        if combine == "learned" and not changed_images:
            raise FaroutError("combine='learned' requires changed_images of at least 1")
        if combine not in ("z_sum", None):
            self._check_unused("with combine z_sum", "part_weights")
        if part_weights is not None and (
            len(part_weights) != len(given) or min(part_weights) < 0 or not 0 < sum(part_weights) < np.inf
        ):
            raise FaroutError(f"part_weights must be {len(given)} numbers from 0, not all 0, got {list(part_weights)}")
        self._given = given
        self._new_parts: list[Detector] = []  # fitted by the last fit
        self.parts = _name_parts([_build_part(each) for each in given])
        # detectors are no configuration: they are saved as parts
        self.config["parts"] = tuple(
            DETECTORS.name_of(type(each)) if isinstance(each, Detector) else str(each) for each in given
        )
        self._declare_requirements()
        self.reset_statistics()

    def _declare_requirements(self) -> None:
        """Require what the parts require that are not fitted; the class declares what any ensemble may use."""
        new = [part.requirements for part in self.parts.values() if not part.is_fitted]
        with_diffusion = [each for each in new if each.diffusion == "images"]
        is_conditional = any(each.class_conditional for each in with_diffusion)
        # a class-conditional model serves the others, too
        chosen = [each for each in with_diffusion if each.class_conditional == is_conditional]
        vars(self)["requirements"] = replace(
            type(self).requirements,
            diffusion="images" if with_diffusion else None,
            class_conditional=is_conditional,
            classifier=any(each.classifier for each in new),
            diffusion_preset=chosen[0].diffusion_preset if chosen else Requirements.diffusion_preset,
        )

    @property
    def score_name(self) -> str:
        """The way to combine, as configured or by default."""
        by_default = "z_sum" if self.config["part_weights"] or not self.changed_scores.size else "learned"
        return str(self.config["combine"] or by_default)

    @property
    def trained_on(self) -> frozenset[str]:
        """Content hashes of the images that networks were trained on, and that parts estimated their statistics on."""
        seen = (part.trained_on | part.statistics_hashes for part in self.parts.values())
        return super().trained_on.union(*seen)

    # Fitting.

    def fit(self, images: Any, diffusion: Any = None, classifier: Any = None, **settings: Any) -> Self:
        """Fit the parts that are not fitted, then the combination and its calibration; see `Detector.fit`."""
        self.parts = _name_parts([_load_part(each) for each in self._given])
        self._declare_requirements()
        self._new_parts = [part for part in self.parts.values() if not part.is_fitted]
        super().fit(images, diffusion, classifier, **settings)
        for part in self._new_parts:
            part.provenance["source"] = self.provenance["source"]
        self.config["parts"] = tuple(DETECTORS.name_of(type(part)) for part in self.parts.values())
        return self

    def save(self, folder: str | Path, *, link: Path | None = None) -> None:
        """Write the ensemble, with its parts in `parts/NAME`; see `Detector.save`."""
        for part in self._new_parts if link is not None else ():
            if part.requirements.diffusion == "images":
                part.linked_model = link
        super().save(folder)

    def reset_statistics(self) -> None:
        """Discard the combination of an earlier fit."""
        self.standardization: Standardization | None = None
        self.tails: TailProbabilities | None = None
        self.weights = np.zeros(0)
        self.changed_scores = np.zeros((len(CHANGES), 0, len(self._given)))  # of changed images: (change, image, part)

    def configure_diffusion(self, config: DiffusionConfig) -> DiffusionConfig:
        """Adapt the configuration to every part that is fitted with the model."""
        for part in self.parts.values():
            if not part.is_fitted and part.requirements.diffusion == "images":
                config = part.configure_diffusion(config)
        return config

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Let every part that is fitted with the networks check them."""
        for part in self.parts.values():
            uses_diffusion, uses_classifier = part.requirements.diffusion == "images", part.requirements.classifier
            if not part.is_fitted and (uses_diffusion or uses_classifier):
                part.check_networks(
                    source, diffusion if uses_diffusion else None, classifier if uses_classifier else None
                )

    def fit_parts(self, source: ImageSource, split: Split, settings: FitSettings) -> None:
        """Fit the parts that are not fitted; they have the ensemble's calibration images, too, for their p-values."""
        from farout.data.splits import Split, split_source  # scoring does not import what only a fit uses
        from farout.detectors.fitting import fit_to_split, train_missing_networks

        own = {*split.statistics, *split.calibration, *split.unused}
        rest = [i for i in range(len(source)) if i not in own and source.keys[i] not in source.unreadable]
        groups = settings.groups if isinstance(settings.groups, str) else [settings.groups[i] for i in rest]
        new = {name: part for name, part in self.parts.items() if not part.is_fitted}
        precision = settings.runtime.resolve_auto().precision
        for name, part in self.parts.items():
            if part.is_fitted and part.precision != precision:
                message = f"{name} was fitted with precision {part.precision}, and the ensemble with {precision}"
                warnings.warn(f"{message}; give one precision (--precision)", MisleadingResultWarning, stacklevel=5)

        def split_rest(statistics: int, train: bool, seen: frozenset[str], maximum: int | None = None) -> Split:
            found = split_source(
                source.subset(rest),
                alpha=settings.alpha,
                statistics=statistics,
                train=train,
                seed=settings.seed,
                exclude=seen,
                groups=groups,
                calibrate=False,
                min_statistics=2,
                max_statistics=maximum,
            )
            training, chosen = (tuple(rest[i] for i in part) for part in (found.training, found.statistics))
            return Split(training, chosen, split.calibration, copies=found.copies)

        requires_diffusion = self.requirements.diffusion == "images" and self.diffusion is None
        if requires_diffusion or (self.requirements.classifier and self.classifier is None):
            users = [part.requirements for part in new.values()]
            statistics = max(each.statistics for each in users if each.diffusion == "images" or each.classifier)
            training = split_rest(statistics, True, frozenset()).training
            train_missing_networks(self, source, source.subset(training), settings)
        elif self.requirements.diffusion == "images" or self.requirements.classifier:
            train_missing_networks(self, source, source.subset(()), settings)  # none is missing: they are checked

        backbones: dict[tuple[Any, ...], Any] = {}
        for name, part in new.items():
            requirements = part.requirements
            part.diffusion = self.diffusion if requirements.diffusion == "images" else None
            part.classifier = self.classifier if requirements.classifier else None
            if requirements.backbone:
                key = tuple(part.config.get(each) for each in ("backbone", "weights", "layers", "size"))
                part.features = backbones.setdefault(key, part.features or part.build_features())
            part_settings = replace(
                settings,
                statistics=None,
                diffusion_config=None,
                training=None,
                checkpoints=None if settings.checkpoints is None else settings.checkpoints / "parts" / name,
            )
            maximum = None if requirements.more_statistics else requirements.statistics
            part_split = split_rest(
                requirements.statistics, requirements.diffusion == "features", part.trained_on, maximum
            )
            fit_to_split(part, source, part_split, part_settings)
        # the networks belong to the parts
        self.diffusion = self.classifier = None
        self._choose_preprocessing(source)

    def _choose_preprocessing(self, source: ImageSource) -> None:
        """That of the part with the largest images, with which a page shows them.

        Raises FaroutError for parts that read images of more than 8 bits in different ways.
        """
        ranges = {part.preprocessing.value_range for part in self.parts.values()}
        if len(ranges) > 1 or not ranges <= {source.value_range}:
            given = ", ".join(f"{name}: {part.preprocessing.value_range}" for name, part in self.parts.items())
            raise FaroutError(
                f"the parts read images of more than 8 bits with different value ranges ({given}; these images: "
                f"{source.value_range}); fit them with the same --value-range"
            )
        reduced = {part.preprocessing.reduced_decoding for part in self.parts.values()}
        if len(reduced) > 1:
            raise FaroutError("some parts decode images in reduced sizes, and others do not; fit all of them alike")
        candidates = [part.preprocessing for part in self.parts.values()]
        self.preprocessing = max(candidates, key=lambda each: (each.size[0] * each.size[1], each.channels))

    def prepare_statistics(self, images: ImageSource) -> None:
        """Measure changed copies of some statistics images, for `learned`."""
        from farout.detectors.fitting import measure_source

        if not self.config["changed_images"]:
            return
        if images.variant is not None:
            message = f"{images.name} has the variant {images.variant}, so no weights are learned on changed images"
            if self.config["combine"] == "learned":
                raise FaroutError(f"{message}; combine them in another way")
            warnings.warn(message, MisleadingResultWarning, stacklevel=2)
            return
        by_hash = sorted(range(len(images)), key=images.content_hash)
        chosen = images.subset(sorted(by_hash[: self.config["changed_images"]]))
        changed = [measure_source(self, chosen.with_variant(each), f"measuring images with {each}") for each in CHANGES]
        scores = np.stack([self._part_scores(each) for each in changed])
        self.changed_scores = scores[:, np.isfinite(scores).all((0, 2))]

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit standardization, tail probabilities and weights to the scores of the statistics images."""
        scores = self._part_scores(measurements)
        self.standardization = Standardization.fit(scores)
        z = self.standardization.transform(scores)
        self.tails = TailProbabilities.fit(z)
        if self.changed_scores.size:
            changed = self.standardization.transform(self.changed_scores.reshape(-1, scores.shape[1]))
            self.weights = learn_weights(z, changed, self.config["prior"])
        elif self.config["combine"] == "learned":
            raise FaroutError("no changed images were measured in this ensemble's fit; fit again with changed_images")

    # Scoring.

    def attach_runtime(self, runtime: Runtime) -> None:
        """Set the runtime of all parts; equal networks become one."""
        shared: dict[str, Any] = {}
        for part in self.parts.values():
            for kind in ("diffusion", "classifier", "features"):
                network = getattr(part, kind)
                if network is not None:
                    setattr(part, kind, shared.setdefault(network.content_hash, network))
        for part in self.parts.values():
            part.attach_runtime(runtime)
        super().attach_runtime(runtime)

    def prepare_networks(self) -> None:
        """Find what the parts have in common."""
        self.inputs: tuple[SharedInput, ...] = find_inputs(self.parts)

    @property
    def batch_size(self) -> int:
        """The smallest of the parts' batch sizes."""
        return min(part.batch_size for part in self.parts.values())

    @property
    def rows_per_image(self) -> int:
        """The largest number of rows of a part."""
        return max(part.rows_per_image for part in self.parts.values())

    @property
    def evaluations(self) -> int:
        """Rows that the networks of all parts have evaluated."""
        return sum(part.evaluations for part in self.parts.values())

    def cost(self) -> Cost:
        """Count network evaluations and multiply-accumulates of one image; shared features are computed once."""
        return measure_cost(self, SharedBatch.create([each.gray_image() for each in self.inputs]))

    def load_batches(self, source: ImageSource) -> Iterator[Batch]:
        """Load images for all parts; each is decoded once."""
        use_cache, hits = self.runtime.cache, self._count_cache_hits()
        yield from iterate_shared_batches(source, self.inputs, self.batch_size, self.runtime.workers, use_cache)
        self.cache_hits += self._count_cache_hits() - hits

    def _count_cache_hits(self) -> int:
        detectors = [each.feature_detector for each in self.inputs]
        return sum(detector.cache_hits for detector in detectors if detector is not None)

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """The score of every part: a vector (B, 1) by its name."""
        assert isinstance(batch, SharedBatch), "an ensemble measures the batches of its load_batches"
        scores: dict[str, Tensor] = {}
        for shared, given in zip(self.inputs, batch.inputs, strict=True):
            completed = shared.complete(given)
            for name in shared.parts:
                part = self.parts[name]
                measured = part.measure(completed)
                score = part.compute_scores(measured)[part.score_name].double()
                scores[name] = torch.where(measured.is_finite(), score, torch.nan).float()[:, None]
        return Measurements(batch.keys, vectors={name: scores[name] for name in self.parts})

    def _part_scores(self, measurements: Measurements) -> np.ndarray:
        """Scores (n, part) in float64."""
        columns = [measurements.vectors[name] for name in self.parts]
        scores: np.ndarray = torch.cat(columns, dim=1).double().numpy()
        return scores

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`z_sum`, `fisher`, `max`, `learned` if changed images were measured, and the score of every part."""
        assert self.standardization is not None
        assert self.tails is not None
        scores = self._part_scores(measurements)
        z = self.standardization.transform(scores)
        log_p = self.tails.log_p(z)
        weights = np.array(self.config["part_weights"] or [1.0] * len(self.parts))
        combined = {"z_sum": z @ (weights / weights.sum()), "fisher": -2 * log_p.sum(1), "max": -log_p.min(1)}
        if len(self.weights):
            combined["learned"] = z @ self.weights
        combined |= {f"{name}_score": scores[:, column] for column, name in enumerate(self.parts)}
        return {name: torch.from_numpy(np.ascontiguousarray(score)) for name, score in combined.items()}

    def build_score_module(self) -> nn.Module:
        """Not supported: the parts have different inputs."""
        raise FaroutError(
            "an ensemble cannot be exported as one graph, because its parts prepare images in different ways; export "
            "its parts: farout export DETECTOR/parts/NAME"
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted combination, and the scores of the changed images."""
        fitted = {"standardization": self.standardization, "tails": self.tails}
        state = pack_arrays({name: each for name, each in fitted.items() if each is not None})
        learned = {"weights": self.weights, "changed_scores": self.changed_scores}
        return state | (learned if self.changed_scores.size else {})

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the arrays of `get_state`."""
        self.standardization = Standardization.from_arrays(unpack_arrays(state, "standardization"))
        self.tails = TailProbabilities.from_arrays(unpack_arrays(state, "tails"))
        if "changed_scores" in state:
            self.weights, self.changed_scores = state["weights"], state["changed_scores"]

    def describe_statistics(self) -> dict[str, Any]:
        """The parts, and the learned weights."""
        facts: dict[str, Any] = {"parts": {name: f"score {part.score_name}" for name, part in self.parts.items()}}
        if len(self.weights):
            facts["learned_weights"] = {name: round(float(w), 3) for name, w in zip(self.parts, self.weights)}
        return facts


def _build_part(given: Any) -> Detector | None:
    """An unfitted detector, or the given one; None for the folder of one, which is loaded by the fit."""
    if isinstance(given, Detector):
        if isinstance(given, Ensemble):
            raise FaroutError("a part cannot be an ensemble; give the parts of that one")
        DETECTORS.name_of(type(given))  # raises for one that could not be saved
        return given
    text = str(given)
    if isinstance(given, str) and text in tuple(DETECTORS):
        if text == "ensemble":
            raise FaroutError("a part cannot be an ensemble; give the parts of that one")
        detector: Detector = DETECTORS[text].load()()
        return detector
    if not re.search(r"[/\\]", text) and not find_path(text).exists():
        raise FaroutError(
            f"there is neither a detector {text!r} nor a folder of this name; {suggest_names(text, DETECTORS)}"
        )
    return None


def _load_part(given: Any) -> Detector:
    """A detector that this ensemble alone uses: loaded, or with the same networks and statistics as the given one."""
    part = _build_part(given)
    if part is None:
        part = load(find_detector(given))
        if isinstance(part, Ensemble):
            raise FaroutError(f"{given} contains an ensemble; give the detectors in its folder {Path('parts')}")
        return part
    if part.is_fitted and not hasattr(part, "preprocessing"):
        raise FaroutError("a part that was fitted to plain features cannot score images; fit it to images")
    if not part.is_fitted:
        unfitted = type(part)(**part.config)
        unfitted.features = part.features
        return unfitted
    return part.with_scoring()


def _name_parts(parts: Sequence[Detector | None]) -> dict[str, Detector]:
    """The parts by the name of their method; a second one of a method is called `knn_2`."""
    named: dict[str, Detector] = {}
    for part in parts:
        if part is None:
            continue
        method = re.sub(r"[^\w-]", "_", DETECTORS.name_of(type(part)))
        same = sum(name == method or name.startswith(f"{method}_") for name in named)
        named[f"{method}_{same + 1}" if same else method] = part
    return named
