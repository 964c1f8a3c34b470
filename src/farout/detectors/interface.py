"""The interface of detection methods; docs/add-a-detector.md shows how a method implements it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from farout.core.backends import Backend
from farout.core.config import Configured
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.batching import Batch, iterate_batches
from farout.data.image_source import ImageSource, Policy
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.read_settings import DEFAULT_READING, FULL_RANGE, ReadSettings
from farout.data.sources import open_source
from farout.detectors.declarations import HeatMaps, Requirements
from farout.detectors.results import Measurements

if TYPE_CHECKING:  # importing the networks takes seconds, and most detectors use only one of them
    from farout.classifiers.model import Classifier
    from farout.data.splits import Split
    from farout.detectors.fit_settings import FitSettings
    from farout.diffusion.config import DiffusionConfig
    from farout.diffusion.model import DiffusionModel
    from farout.features.extractor import FeatureExtractor
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["DetectorInterface"]


class DetectorInterface(Configured, ABC):
    """What a detection method declares and implements; the arguments of its constructor are its configuration.

    A method implements `measure`, `fit_statistics` and `compute_scores`, and overrides what it needs of the rest. For
    every indicator, higher means more anomalous.
    """

    requirements: ClassVar[Requirements] = Requirements()
    """What the fit requires: networks and statistics images."""
    heat_maps: ClassVar[HeatMaps | None] = None
    """How the maps of `measure(maps=True)` are shown; None: the method has no maps."""
    scoring_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that do not change the measurements; `Detector.with_scoring` changes them after the fit."""
    baselines: ClassVar[tuple[str, ...]] = ()
    """Registered methods that every evaluation of this method includes."""
    test_arguments: ClassVar[Mapping[str, Any]] = {}
    """Arguments with which the method runs in seconds on tiny untrained networks, for the contract tests."""

    # State of a fitted detector.
    parts: Mapping[str, DetectorInterface] = MappingProxyType({})  # detectors that this one combines, by name
    preprocessing: Preprocessing
    diffusion: DiffusionModel | FeatureDiffusion | None = None
    classifier: Classifier | None = None
    features: FeatureExtractor | None = None
    runtime: Runtime = Runtime()
    backend: Backend = "eager"  # the library that evaluates the networks, see `choose_backend`
    alpha: float = 0.05
    seed: int = 0
    statistics: Measurements
    statistics_hashes: frozenset[str] = frozenset()
    calibration: Measurements
    calibration_hashes: frozenset[str] = frozenset()
    calibration_scores: Mapping[str, np.ndarray] = MappingProxyType({})  # by indicator, sorted
    loaded_from: Path | None = None  # folder that the detector was loaded from, if it was not fitted again
    linked_model: Path | None = None  # folder of the diffusion model that is linked, not copied
    cache_hits: int = 0  # images whose features came from the cache

    @abstractmethod
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Run the networks on preprocessed images (B, C, H, W) in [0, 1], B >= 1; each image on its own."""

    @abstractmethod
    def fit_statistics(self, measurements: Measurements) -> None:
        """Estimate what `compute_scores` needs from the measurements of the statistics images."""

    @abstractmethod
    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every indicator of the method by name, float64 (B,). Runs no network and has no side effects."""

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that was estimated in the fit, as arrays to be saved."""
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the arrays of `get_state`."""

    def __repr__(self) -> str:
        shown = self.get_changed_arguments()
        if "score" in self.config:
            shown["score"] = self.config["score"]
        arguments = [f"{name}={value!r}" for name, value in shown.items()]
        if not self.is_fitted:
            return f"{type(self).__name__}({', '.join([*arguments, 'not fitted'])})"
        counts = f"{len(self.statistics)} statistics, {len(self.calibration)} calibration images"
        return f"{type(self).__name__}({', '.join([*arguments, f'alpha={self.alpha}', counts])})"

    @property
    def is_fitted(self) -> bool:
        """Whether the detector has been fitted or loaded."""
        return bool(self.calibration_scores)

    @property
    def score_name(self) -> str:
        """The indicator that is the method's score."""
        return str(self.config["score"])

    # Hooks of a fit, in the order in which they are called.

    def reset_statistics(self) -> None:
        """Discard what an earlier fit has estimated."""

    def build_features(self) -> FeatureExtractor:
        """Build the backbone of a method that requires one."""
        raise FaroutError(f"{type(self).__name__} requires a backbone, but does not implement build_features")

    def build_preprocessing(self, source: ImageSource, protocol: Protocol | None) -> Preprocessing:
        """Choose the preprocessing where neither a diffusion model of images nor a classifier defines it."""
        return Preprocessing.for_source(source, protocol=protocol or "native")

    def configure_diffusion(self, config: DiffusionConfig) -> DiffusionConfig:
        """Adapt the configuration of a diffusion model of images that is to be trained to the method's settings."""
        return config

    def check_networks(
        self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None
    ) -> None:
        """Raise FaroutError for images, networks and settings that do not go together, before anything is trained.

        Networks that are to be trained are given untrained.
        """

    def train_feature_diffusion(self, images: ImageSource, settings: FitSettings) -> FeatureDiffusion:
        """Train the diffusion model of a method that requires one of features."""
        raise FaroutError(f"{type(self).__name__} does not implement train_feature_diffusion")

    def fit_parts(self, source: ImageSource, split: Split, settings: FitSettings) -> None:
        """Fit the detectors that this one combines, to images that are not in its own statistics and calibration.

        Called instead of the hooks above for a detector with parts; it sets the preprocessing.
        """

    def prepare_networks(self) -> None:
        """Check and prepare networks, noise and levels, once networks and runtime are set."""

    def prepare_statistics(self, images: ImageSource) -> None:
        """Called with the statistics images before they are measured."""

    def measure_statistics(self, batch: Batch) -> Measurements:
        """Measure a batch of statistics images; override to estimate something from more than the measurements."""
        return self.measure(batch)

    # Networks, batches and reports.

    def attach_runtime(self, runtime: Runtime) -> None:
        """Set the runtime, move all networks to its device and prepare them."""
        self.runtime = runtime.resolve_auto()
        self.backend = "eager" if self.runtime.backend == "auto" else self.runtime.backend
        for network in (self.diffusion, self.classifier, self.features):
            if network is not None:
                network.to(self.runtime.device)
        self.prepare_networks()

    def use_backend(self, backend: Backend) -> None:
        """Evaluate the networks with another library; see `farout.detectors.backend_choice`."""
        for part in self.parts.values():
            part.use_backend(backend)
        if backend != self.backend:
            self.backend = backend
            self.prepare_networks()

    def run_networks(self, batch: Batch) -> None:
        """Run what takes the time of `measure`, also in a detector that is not fitted yet."""
        self.measure(batch)

    @property
    def trained_on(self) -> frozenset[str]:
        """Content hashes of the images that the networks were trained on."""
        networks = [network for network in (self.diffusion, self.classifier) if network is not None]
        return frozenset[str]().union(*(network.trained_on for network in networks))

    @property
    def precision(self) -> Precision:
        """Precision of the networks, which `attach_runtime` has resolved."""
        return cast("Precision", self.runtime.precision)

    @property
    def rows_per_image(self) -> int:
        """Rows that the solver holds per image, which the batch size depends on."""
        return 1

    @property
    def batch_size(self) -> int:
        """Number of images measured together."""
        shape = (self.preprocessing.channels, *self.preprocessing.size)
        return self.runtime.images_per_batch(shape, self.rows_per_image)

    def open_images(
        self,
        images: Any,
        *,
        limit: int | None = None,
        policy: Policy = "nan",
        reading: ReadSettings = DEFAULT_READING,
        memory_mib: int = 1024,
    ) -> ImageSource:
        """Open images that are to be scored, with the value range of the fitted ones unless `reading` has another.

        Of images that are read once, little is worth keeping: `memory_mib` is the memory for decoded ones.
        """
        value_range = self.preprocessing.value_range
        source = open_source(
            images,
            policy=policy,
            limit=limit,
            seed=self.seed,
            memory_mib=memory_mib,
            reading=reading,
            require_range=value_range is None,
        )
        source = source.with_reduced_decoding(self.preprocessing.reduced_decoding)
        return source.with_value_range(value_range or FULL_RANGE)

    @property
    def reading_of_fit(self) -> ReadSettings:
        """How the images of the fit are read again."""
        return ReadSettings(self.preprocessing.value_range, self.provenance.get("frames", "first"))

    def load_batches(self, source: ImageSource) -> Iterator[Batch]:
        """Load `batch_size` images at a time for `measure`; unreadable images are missing in their batch."""
        return iterate_batches(source, self.preprocessing, self.batch_size, workers=self.runtime.workers)

    @property
    def evaluations(self) -> int:
        """Rows that the diffusion model, or without one the classifier, has evaluated so far."""
        return 0

    def compute_embedding(self, measurements: Measurements) -> np.ndarray | None:
        """Vectors (B, d) that are close for similar images, so that a report can show the nearest normal images."""
        return None

    def build_score_module(self) -> nn.Module:
        """Build a module that computes the method's score, for `farout export`.

        It turns preprocessed images (B, C, H, W), float32 in [0, 1], into the score `score_name`, float64 (B,), in
        plain tensor operations: in fp32 on the CPU, without random numbers, and independently of the rest of the batch.
        """
        uses_images = self.requirements.diffusion == "images"
        advice = "; export the denoiser of its diffusion model instead: farout export DIFFUSION_MODEL" * uses_images
        raise FaroutError(f"{type(self).__name__} cannot be exported as one graph{advice}")

    def describe_statistics(self) -> dict[str, Any]:
        """Facts about the fitted statistics for the model card and the report."""
        return {}
