"""The contract of detectors: fit, measure, combine, score, save, load."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from farout.core import store
from farout.core.config import Configured
from farout.core.devices import Precision
from farout.core.errors import FaroutError
from farout.core.progress import task
from farout.core.runtime import Runtime
from farout.data.batching import Batch, batches
from farout.data.image_source import ImageSource, Policy
from farout.data.preprocessing import Preprocessing, Protocol
from farout.data.sources import open_source
from farout.detectors.calibration import check_scores, is_out, p_values
from farout.detectors.cost import Cost, cost_of
from farout.detectors.results import Measurements, Scores
from farout.diffusion.model import DiffusionModel
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.detectors.fitting import FitSettings
    from farout.diffusion.train import DiffusionConfig

__all__ = ["Cost", "Detector", "Measurements", "Runtime", "Scores", "load"]


class Detector(Configured, ABC):
    """A method that says how far out an image is. The constructor's arguments are the configuration.

    A method implements `measure`, `combine`, `fit_statistics` and `tiny`, and says what it `needs`. HIGHER = FURTHER
    OUT, always.

    Attributes:
        config: the constructor's arguments.
        preprocessing: from any image to the (C, H, W) tensors that `measure` takes.
        statistics, calibration: measurements of the images that the statistics and the p-values rest on.
        calibration_scores: of each indicator, sorted; calibration_rows: in the order of `calibration`.
        alpha: false-alarm rate of `is_ood`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What a fit wants: `diffusion`, `classes` (told to it), `features` (a frozen backbone), `classifier`."""
    diffusion_kind: ClassVar[type[DiffusionModel] | type[FeatureDiffusion]] = DiffusionModel
    """What its diffusion model works on: images, or features."""
    network_preset: ClassVar[str] = "tiny"
    """How a diffusion model of images is trained where none is given, see `farout list presets`."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Detectors that every rating of this one shows beside it."""
    choices: ClassVar[frozenset[str]] = frozenset()
    """Arguments that only `combine` reads: they can be changed after the fact."""
    makes_maps: ClassVar[bool] = False
    """Whether `measure(maps=True)` gives maps."""
    map_unit: ClassVar[str] = "standard deviations above good images"
    """What the numbers of maps are in: captions say it."""
    map_brightest: ClassVar[float] = 6.0
    """The map's value from which on the colour is at its strongest; it begins at 0."""
    map_pictures: ClassVar[frozenset[str]] = frozenset()
    """Pictures of the measurements that are maps (B, 1, H, W) in the same unit."""
    statistics_minimum: ClassVar[int] = 400
    """Images that the statistics want."""
    statistics_suffice: ClassVar[bool] = False
    """Whether more would add little: where no network is trained, what is over is not measured."""

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
        """Runs the networks on preprocessed images (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def fit_statistics(self, measurements: Measurements) -> None:
        """Learns from the measurements of the statistics images what `combine` needs."""

    @abstractmethod
    def combine(self, measurements: Measurements) -> dict[str, Tensor]:
        """Every score that the method defines, by name, float64 (B,); pure; HIGHER = FURTHER OUT."""

    def embedding(self, measurements: Measurements) -> np.ndarray | None:
        """Vectors (B, d), float64, of which near ones belong to images that are alike to the method, so that a page can
        show an image beside good ones; None: it measures no such thing.
        """
        return None

    @classmethod
    @abstractmethod
    def tiny(cls, resources: Any) -> Detector:
        """An unfitted detector that runs in seconds, for the shared tests; `resources.diffusion` is a tiny model."""

    def build_features(self) -> FeatureExtractor:
        """The backbone of a method that needs `features`."""
        raise FaroutError(f"{type(self).__name__} needs features and has no build_features that says of which backbone")

    def build_preprocessing(self, source: ImageSource, protocol: Protocol | None) -> Preprocessing:
        """How images are brought to size where no diffusion model of images and no classifier says it."""
        return Preprocessing.for_source(source, protocol=protocol or "native")

    def companion(self, kind: type[Detector]) -> Detector:
        """A detector of another kind that sees what this one sees."""
        return kind()

    def train(self, images: ImageSource, settings: FitSettings) -> DiffusionModel | FeatureDiffusion:
        """The diffusion model that a method needs and was not given, trained on `images`."""
        from farout.detectors.fitting import train_on_images

        return train_on_images(self, images, settings)

    def network_config(self, config: DiffusionConfig) -> DiffusionConfig:
        """What is trained where a diffusion model of images is lacking, with what the method's settings want of it."""
        return config

    def check(self, source: ImageSource, diffusion: DiffusionModel | None, classifier: Classifier | None) -> None:
        """Called before anything is trained, with the given networks or untrained ones in place of what is lacking:
        refuses what cannot work.
        """

    def prepare(self) -> None:
        """Called once networks and runtime are known, before anything is measured: checks and caches."""

    def begin(self) -> None:
        """Called at the start of a fit, before anything is trained: forgets what an earlier one learnt."""

    def watch(self, measurements: Measurements) -> None:
        """Sees the statistics images' measurements with maps, batch by batch, while they are made."""

    def state(self) -> dict[str, np.ndarray]:
        """What `fit_statistics` and `watch` learnt, as arrays."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Puts `state` back."""

    @property
    def rows_per_image(self) -> int:
        """Rows of the network's input that one image becomes at once; sizes the batches."""
        return 1

    @property
    def score_name(self) -> str:
        """The indicator that is the method's own score."""
        return str(self.config["score"])

    # -- what every detector does --------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether `fit` or `load` has been called."""
        return bool(self.calibration_scores)

    def fit(self, images: Any, diffusion: Any = None, classifier: Any = None, **settings: Any) -> Self:
        """Fits to good images: takes given models, trains what it lacks, then statistics and calibration.

        Args:
            images: any image source.
            diffusion: a `DiffusionModel` or its folder; None: one is trained where the method needs it.
            classifier: a `Classifier` or its folder; None: one is trained where the method needs it and the images
                have labels.
            **settings: see `FitSettings` in `farout.detectors.fitting`.

        Raises:
            FaroutError: for images or models that do not go together.
        """
        from farout.detectors.fitting import FitSettings, fit

        return fit(self, images, diffusion, classifier, FitSettings(**settings))

    def use(self, diffusion: DiffusionModel | FeatureDiffusion | None, runtime: Runtime) -> None:
        """Sets networks and runtime, and moves the networks to their device."""
        self.runtime = runtime.resolved()
        for network in (self.features, self.classifier):
            if network is not None:
                network.to(self.runtime.device)
        if diffusion is not None:
            self.diffusion = diffusion.to(self.runtime.device)
        self.prepare()

    @property
    def trained_on(self) -> frozenset[str]:
        """Content hashes of the images that its networks have seen."""
        networks = [network for network in (self.diffusion, self.classifier) if network is not None]
        return frozenset[str]().union(*(network.trained_on for network in networks))

    @property
    def precision(self) -> Precision:
        """What networks compute in; `use` has resolved it."""
        return cast("Precision", self.runtime.precision)

    @property
    def batch_size(self) -> int:
        """Images measured together: as set, or by memory."""
        shape = (self.preprocessing.channels, *self.preprocessing.size)
        return self.runtime.images_per_batch(shape, self.rows_per_image)

    def batches(self, source: ImageSource) -> Iterator[Batch]:
        """What `measure` is given, `batch_size` positions of the source at a time."""
        return batches(source, self.preprocessing, self.batch_size, workers=self.runtime.workers)

    def measure_all(self, source: ImageSource, title: str, *, watch: bool = False) -> Measurements:
        """The measurements of all readable images of a source."""
        parts = []
        with task(title, len(source)) as bar:
            for batch in self.batches(source):
                measured = self.measure(batch, maps=watch)
                if watch:
                    self.watch(measured)
                parts.append(replace(measured, maps=None, pictures={}))
                bar.advance(len(batch.keys))
        return Measurements.join(parts)

    def set_calibration(self, measurements: Measurements) -> None:
        """Rests the p-values on these measurements; raises FaroutError when a score of them is not a number."""
        scores = {name: value.double().numpy() for name, value in self.combine(measurements).items()}
        bad = sorted(name for name, value in scores.items() if not np.isfinite(value).all())
        if bad:
            raise FaroutError(f"calibration scores are not numbers for {', '.join(bad)}; look for damaged images")
        self.calibration = measurements
        self.calibration_rows = scores
        self.calibration_scores = {name: np.sort(value) for name, value in scores.items()}

    def reconfigured(self, **choices: Any) -> Self:
        """A fitted detector with other choices (score, levels to use, …), refitted and recalibrated from the stored
        measurements; no network runs.

        Raises FaroutError for arguments that decide what is measured.
        """
        wrong = sorted(set(choices) - self.choices)
        if wrong:
            hint = f"choices are {', '.join(sorted(self.choices))}; for others fit again"
            raise FaroutError(f"{', '.join(wrong)} cannot be changed after the fact; {hint}")
        self.check_fitted()
        twin = type(self)(**{**self.config, **choices})
        twin.features, twin.classifier = self.features, self.classifier
        for name in _FITTED:
            setattr(twin, name, getattr(self, name))
        twin.use(self.diffusion, self.runtime)
        twin.restore(self.state())
        twin.fit_statistics(self.statistics)
        twin.set_calibration(self.calibration)
        return twin

    def check_fitted(self) -> None:
        """Raises FaroutError when the detector has not been fitted."""
        if not self.fitted:
            raise FaroutError(
                f"this {type(self).__name__} has not been fitted; call fit(images) or farout.load(folder)"
            )

    def open(self, images: Any, *, limit: int | None = None, policy: Policy = "nan") -> ImageSource:
        """The source to be scored; an unreadable image gets a row without score."""
        return open_source(images, policy=policy, limit=limit, seed=self.seed)

    def score(self, images: Any, *, limit: int | None = None, policy: Policy = "nan") -> Scores:
        """Scores every image of a source, in its order."""
        self.check_fitted()
        source, size, parts = self.open(images, limit=limit, policy=policy), self.batch_size, []
        with task("scoring", len(source)) as bar:
            for position, batch in zip(range(0, len(source), size), self.batches(source), strict=True):
                keys = source.keys[position : position + size]
                measured = self.measure(batch) if batch.keys else None
                parts.append(self.rescore_all(keys, measured, skip=source.policy == "skip"))
                bar.advance(len(keys))
        scores = Scores.join(parts)
        check_scores(scores.score[np.array(scores.status) != "unreadable"], source.name)
        return scores

    def rescore_all(self, keys: tuple[str, ...], measurements: Measurements | None, *, skip: bool) -> Scores:
        """Scores of `keys`, some of which may have no measurements because they could not be read: those are left out
        (`skip`), or get a row without score, which is never normal.
        """
        scores = None if measurements is None else self.rescore(measurements)
        if scores is not None and (skip or scores.keys == keys):
            return scores
        return Scores.with_gaps(() if skip else keys, scores, list(self.calibration_scores))

    def rescore(self, measurements: Measurements) -> Scores:
        """Scores from stored measurements; no network runs."""
        self.check_fitted()
        finite = measurements.finite().numpy()
        combined = {name: value.double().numpy() for name, value in self.combine(measurements).items()}
        indicators = {name: np.where(finite & np.isfinite(v), v, np.nan) for name, v in combined.items()}
        score = indicators[self.score_name]
        p = p_values(score, self.calibration_scores[self.score_name])
        status = tuple("ok" if good else "not a number" for good in np.isfinite(score))
        return Scores(measurements.keys, score, p, is_out(p, self.alpha), status, indicators, measurements)

    def cost(self) -> Cost:
        """Network evaluations and multiply-accumulates of one image, counted on one grey image."""
        return cost_of(self)

    @property
    def evaluations(self) -> int:
        """Rows that its diffusion model, or else its classifier, has evaluated; those of a backbone do not count."""
        return 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides a score: configuration, learnt arrays, calibration, models."""
        plain = {"config": self.config, "seed": self.seed, "preprocessing": self.preprocessing.to_dict()}
        for name in ("diffusion", "features", "classifier"):
            network = getattr(self, name)
            plain[name] = network.content_hash if network is not None else ""
        plain["alpha"] = self.alpha
        arrays = {**self.state(), **{f"calibration.{name}": v for name, v in self.calibration_scores.items()}}
        learnt = store.hash_tensors({name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in arrays.items()})
        return hashlib.sha256((json.dumps(plain, sort_keys=True, default=list) + learnt).encode()).hexdigest()

    def save(self, folder: str | Path, *, link: Path | None = None) -> None:
        """Writes the detector with its models, measurements and calibration.

        `link`: a folder that holds the diffusion model already; its path and hash are written instead of a copy, and
        the way to it, so that both can be moved together.
        """
        from farout.detectors.saving import save

        save(self, Path(folder), link or self.link)

    def describe(self) -> dict[str, Any]:
        """What a reader wants to know: method, configuration, runtime, counts."""
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


_FITTED = (
    "preprocessing",
    "alpha",
    "seed",
    "provenance",
    "statistics",
    "statistics_hashes",
    "calibration_hashes",
    "link",
)


def load(folder: str | Path, **runtime: Any) -> Detector:
    """Loads a fitted detector; `runtime` overrides device, precision, batch_size, workers or cache.

    Raises StoreError for a folder that is missing, incomplete, altered or of another kind.
    """
    from farout.detectors.saving import load as read

    return read(Path(folder), runtime)
