"""What a detection method implements, and what a fit leaves in it; see `docs/add-a-detector.md`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from torch import Tensor

from farout.core.config import Configured
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import Batch, batches
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol
from farout.detectors.results import Measurements

if TYPE_CHECKING:  # importing the networks takes seconds, and most detectors use only one of them
    from farout.classifiers.model import Classifier
    from farout.diffusion.config import DiffusionConfig
    from farout.diffusion.model import DiffusionModel
    from farout.features.extractor import FeatureExtractor
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["DetectorInterface"]


class DetectorInterface(Configured, ABC):
    """The hooks of a detection method. The constructor's arguments are the configuration.

    A method implements `measure`, `fit_statistics`, `compute_scores` and `tiny`, and declares what it `needs`. Scores:
    higher = more anomalous, for every indicator.

    Attributes:
        config: the constructor's arguments.
        preprocessing: from any image to the (C, H, W) tensors that `measure` takes.
        statistics, calibration: measurements of the statistics images and of the calibration images.
        calibration_scores: per indicator, sorted; `calibration_rows`: in the order of `calibration`.
        alpha: false-alarm rate of `is_ood`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What a fit requires: `diffusion`, `classes` (a class-conditional one), `features` (a backbone), `classifier`."""
    diffusion_of: ClassVar[Literal["images", "features"]] = "images"
    """What its diffusion model generates: images (`DiffusionModel`) or feature vectors (`FeatureDiffusion`)."""
    network_preset: ClassVar[str] = "tiny"
    """The training preset where no diffusion model of images is given, see `farout list presets`."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Baselines that every evaluation of this method includes."""
    choices: ClassVar[frozenset[str]] = frozenset()
    """Arguments that only `compute_scores` reads: they can be changed after the fit, see `Detector.reconfigured`."""
    makes_maps: ClassVar[bool] = False
    """Whether `measure(maps=True)` returns heat maps."""
    map_unit: ClassVar[str] = "standard deviations above normal images"
    """Unit of the heat maps' values, for captions."""
    map_brightest: ClassVar[float] = 6.0
    """Value of a heat map from which on the color is at its strongest; the scale begins at 0."""
    map_pictures: ClassVar[frozenset[str]] = frozenset()
    """Pictures of the measurements that are maps (B, 1, H, W) in the same unit."""
    statistics_minimum: ClassVar[int] = 400
    """Number of statistics images that the method requires."""
    statistics_suffice: ClassVar[bool] = False
    """Whether more statistics images would add little: the rest is then not measured where no network is trained."""

    preprocessing: Preprocessing
    statistics: Measurements
    calibration: Measurements
    diffusion: DiffusionModel | FeatureDiffusion | None = None
    features: FeatureExtractor | None = None
    classifier: Classifier | None = None

    def _start(self) -> None:
        super()._start()
        self.runtime = Runtime()
        self.alpha, self.seed = 0.05, 0
        self.statistics_hashes: frozenset[str] = frozenset()
        self.calibration_hashes: frozenset[str] = frozenset()
        self.link: Path | None = None
        self.cache_hits = 0
        self.calibration_scores: dict[str, np.ndarray] = {}
        self.calibration_rows: dict[str, np.ndarray] = {}

    # -- what a method implements --------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Runs the networks on preprocessed images (B, C, H, W) in [0, 1]; each image on its own."""

    @abstractmethod
    def fit_statistics(self, measurements: Measurements) -> None:
        """Estimates what `compute_scores` needs from the measurements of the statistics images."""

    @abstractmethod
    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every indicator of the method by name, float64 (B,). Runs no network and has no side effects."""

    @classmethod
    @abstractmethod
    def tiny(cls, resources: Any) -> DetectorInterface:
        """An unfitted detector that runs in seconds, for the shared tests; `resources.diffusion` is a tiny model."""

    # -- what a method may override ------------------------------------------------------------------------------

    @abstractmethod
    def train(self, images: ImageSource, settings: Any) -> DiffusionModel | FeatureDiffusion:
        """Trains the diffusion model that a method needs and was not given; `settings`: a `FitSettings`."""

    def embedding(self, measurements: Measurements) -> np.ndarray | None:
        """Vectors (B, d), float64, close for images that the method finds similar, so that a page can show the nearest
        normal image; None: the method has no such vectors.
        """
        return None

    def build_features(self) -> FeatureExtractor:
        """The backbone of a method that needs `features`."""
        raise FaroutError(f"{type(self).__name__} needs features, but does not implement build_features")

    def build_preprocessing(self, source: ImageSource, protocol: Protocol | None) -> Preprocessing:
        """The preprocessing where neither a diffusion model of images nor a classifier defines it."""
        return Preprocessing.for_source(source, protocol=protocol or "native")

    def companion(self, kind: type[Any]) -> Any:
        """An unfitted detector of another class that shares this one's backbone settings."""
        return kind()

    def network_config(self, config: DiffusionConfig) -> DiffusionConfig:
        """The configuration of a diffusion model to train, with what the method's settings require of it."""
        return config

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Called before anything is trained, with the given networks or untrained ones: raises for what cannot work."""

    def prepare(self) -> None:
        """Called once networks and runtime are known, before anything is measured: checks and caches."""

    def begin(self) -> None:
        """Called at the start of a fit, before anything is trained: discards the results of an earlier fit."""

    def watch(self, measurements: Measurements) -> None:
        """Called with the measurements and maps of each batch of statistics images."""

    def state(self) -> dict[str, np.ndarray]:
        """What `fit_statistics` and `watch` estimated, as arrays."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restores `state`."""

    def describe(self) -> dict[str, Any]:
        """For the model card and the reports: method, configuration, runtime, counts."""
        return {
            "method": type(self).__name__,
            "config": self.config,
            **({"features": self.features.describe()} if self.features is not None else {}),
            "runtime": asdict(self.runtime),
            "alpha": self.alpha,
            "seed": self.seed,
            "statistics_images": len(self.statistics),
            "calibration_images": len(self.calibration),
        }

    @property
    def rows_per_image(self) -> int:
        """Rows of the network's input per image, all at once; determines the batch size."""
        return 1

    @property
    def score_name(self) -> str:
        """The indicator that is the method's own score."""
        return str(self.config["score"])

    @property
    def evaluations(self) -> int:
        """Rows that the diffusion model, or without one the classifier, has evaluated; a backbone's do not count."""
        return 0

    @property
    def batch_size(self) -> int:
        """Number of images measured together."""
        return self.runtime.images_per_batch(
            (self.preprocessing.channels, *self.preprocessing.size), self.rows_per_image
        )

    def batches(self, source: ImageSource) -> Iterator[Batch]:
        """What `measure` is given: `batch_size` positions of the source at a time."""
        return batches(source, self.preprocessing, self.batch_size, workers=self.runtime.workers)

    def measure_all(self, source: ImageSource, title: str, *, watch: bool = False) -> Measurements:
        """The measurements of all readable images of a source; `watch`: also call the hook `watch` with their maps."""
        parts = []
        with task(title, len(source)) as bar:
            for batch in self.batches(source):
                measured = self.measure(batch, maps=watch)
                if watch:
                    self.watch(measured)
                parts.append(replace(measured, maps=None, pictures={}))
                bar.advance(len(batch.keys))
        return Measurements.join(parts)

    # -- state of every detector ---------------------------------------------------------------------------------

    def use(self, diffusion: DiffusionModel | FeatureDiffusion | None, runtime: Runtime) -> None:
        """Sets the diffusion model and the runtime, and moves all networks to the runtime's device."""
        self.runtime = runtime.resolved()
        for network in (self.features, self.classifier):
            if network is not None:
                network.to(self.runtime.device)
        if diffusion is not None:
            self.diffusion = diffusion.to(self.runtime.device)
        self.prepare()

    @property
    def is_fitted(self) -> bool:
        """Whether the detector has been fitted or loaded."""
        return bool(self.calibration_scores)

    def check_fitted(self) -> None:
        """Raises FaroutError unless the detector has been fitted."""
        if not self.is_fitted:
            raise FaroutError(
                f"this {type(self).__name__} has not been fitted; call fit(images) or farout.load(folder)"
            )

    @property
    def trained_on(self) -> frozenset[str]:
        """Content hashes of the images that its networks were trained on."""
        networks = [network for network in (self.diffusion, self.classifier) if network is not None]
        return frozenset[str]().union(*(network.trained_on for network in networks))

    @property
    def precision(self) -> Precision:
        """The precision of the networks; `use` has resolved it."""
        return cast("Precision", self.runtime.precision)
