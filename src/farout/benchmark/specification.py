"""The specification of a benchmark: named networks, outliers, reconstructions, detectors and image sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.outlier_exposure import Exposure
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.preprocessing import Protocol
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.image_to_image import DenoisingSpacing, ImageToImage
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import Synthesizer
from farout.training.config import TrainingConfig

__all__ = ["SECTIONS", "BenchmarkSpec", "DetectorSpec", "NetworkSpec", "OutlierSpec", "ReconstructionSpec"]

SECTIONS = ("networks", "outliers", "reconstructions", "detectors")
"""Fields of `BenchmarkSpec` that hold named entries."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network that is trained once per seed and shared by all entries that name it.

    Attributes:
        kind: `diffusion` or `classifier`.
        preset: of `farout train diffusion` or `farout train classifier`; `model`, `training` and `exposure` override
            it.
        source: training images; None: those of the benchmark.
        limit: use a seeded random sample of this many images; None: `train_limit` of the benchmark.
        outliers, reconstructions: names of the sets that a classifier is trained with in addition to its images.
        folder: an existing model, which is used as it is; nothing is trained.
        model: configuration of the network.
        training: configuration of the training; its seed is that of the benchmark.
        exposure: how a classifier is trained with outliers.
    """

    kind: Literal["diffusion", "classifier"]
    preset: str = "tiny"
    source: str | None = None
    limit: int | None = None
    outliers: str | None = None
    reconstructions: str | None = None
    folder: str | None = None
    model: DiffusionConfig | ClassifierConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    exposure: Exposure | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, limit=self.limit)

    @property
    def dependencies(self) -> list[tuple[str, str]]:
        """Section and name of each entry that this one uses."""
        named = {"outliers": self.outliers, "reconstructions": self.reconstructions}
        return [(section, name) for section, name in named.items() if name is not None]


@dataclass(frozen=True)
class OutlierSpec:
    """Synthetic outliers that are generated once per seed.

    Attributes:
        method: see `farout list synthesizers`.
        preset: of the method; `arguments` override it.
        diffusion, classifier: names of networks.
        count: number of outliers, all classes together.
        source: source images; None: the training images of the benchmark.
        limit: use a seeded random sample of this many images; None: `train_limit` of the benchmark.
        arguments: all settings of the method.
    """

    method: str
    preset: str | None = None
    diffusion: str | None = None
    classifier: str | None = None
    count: int = 1000
    source: str | None = None
    limit: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_at_least(1, count=self.count, limit=self.limit)

    @property
    def dependencies(self) -> list[tuple[str, str]]:
        """Section and name of each entry that this one uses."""
        return [("networks", name) for name in (self.diffusion, self.classifier) if name is not None]

    def build_synthesizer(self) -> Synthesizer:
        """The configured synthesizer."""
        synthesizer: Synthesizer = SYNTHESIZERS[self.method].load()(**self.arguments)
        synthesizer.provenance["preset"] = self.preset or ""
        return synthesizer


@dataclass(frozen=True)
class ReconstructionSpec:
    """Images that are reconstructed once per seed, see `farout reconstruct`.

    Attributes:
        diffusion: name of a network.
        source: images to reconstruct; None: the training images of the benchmark.
        limit: use a seeded random sample of this many images; None: `train_limit` of the benchmark.
        level, max_level, classes, solver, steps, spacing: as in `farout reconstruct`.
    """

    diffusion: str
    source: str | None = None
    limit: int | None = None
    level: float = ImageToImage.level
    max_level: float | None = ImageToImage.max_level
    classes: bool = ImageToImage.classes
    solver: str = ImageToImage.solver
    steps: int | None = ImageToImage.steps
    spacing: DenoisingSpacing = ImageToImage.spacing

    def __post_init__(self) -> None:
        _check_at_least(1, limit=self.limit)

    @property
    def dependencies(self) -> list[tuple[str, str]]:
        """Section and name of each entry that this one uses."""
        return [("networks", self.diffusion)]

    @property
    def image_to_image_settings(self) -> dict[str, Any]:
        """The settings that `farout reconstruct` has too."""
        names = ("level", "max_level", "classes", "solver", "steps", "spacing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DetectorSpec:
    """A detector that is fitted and evaluated once per seed.

    Attributes:
        method: see `farout list detectors`.
        preset: of the method; `arguments` override it.
        diffusion, classifier: names of networks.
        limit: fit on a seeded random sample of this many training images; None: `train_limit` of the benchmark.
        statistics: number of images for the statistics; None: the method's own number.
        arguments: all settings of the method.
    """

    method: str
    preset: str | None = None
    diffusion: str | None = None
    classifier: str | None = None
    limit: int | None = None
    statistics: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_at_least(1, limit=self.limit)
        _check_at_least(2, statistics=self.statistics)

    @property
    def dependencies(self) -> list[tuple[str, str]]:
        """Section and name of each entry that this one uses."""
        return [("networks", name) for name in (self.diffusion, self.classifier) if name is not None]

    def build_detector(self) -> Detector:
        """The configured detector, not fitted."""
        detector: Detector = DETECTORS[self.method].load()(**self.arguments)
        detector.provenance["preset"] = self.preset or ""
        return detector


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark.

    Attributes:
        name: title of the tables.
        train: in-distribution images that everything is trained and fitted on.
        id: in-distribution images that are scored.
        ood: out-of-distribution sources by group (`near`, `far`).
        about: a sentence that describes the benchmark.
        protocol: how images are resized, for all networks and detectors.
        limit: use a seeded random sample of this many images of each scored source.
        train_limit: use a seeded random sample of this many training images.
        seeds: everything is run once per seed.
        alpha: false-alarm rate of flagged images.
        statistics: number of images that no network is trained on and that are used for statistics, in addition to the
            calibration images.
        trivial_baselines: also evaluate statistics of raw pixels.
        random_weights_baselines: also evaluate each method that has a network with random weights.
        baseline_limit: number of training images that these baselines are fitted on.
        runtime: how networks are run.
        networks, outliers, reconstructions, detectors: entries by name.

    Raises FaroutError for values out of range and for image sets that are named twice.
    """

    name: str
    train: str
    id: str
    ood: dict[str, tuple[str, ...]]
    detectors: dict[str, DetectorSpec]
    about: str = ""
    protocol: Protocol = "native"
    limit: int | None = None
    train_limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    alpha: float = 0.05
    statistics: int = 400
    trivial_baselines: bool = True
    random_weights_baselines: bool = True
    baseline_limit: int | None = 1000
    runtime: Runtime = field(default_factory=Runtime)
    networks: dict[str, NetworkSpec] = field(default_factory=dict)
    outliers: dict[str, OutlierSpec] = field(default_factory=dict)
    reconstructions: dict[str, ReconstructionSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scored = [self.id, *self.ood_sources]
        repeated = sorted({source for source in scored if scored.count(source) > 1})
        if repeated or not self.ood_sources:
            raise FaroutError(
                f"id and ood name {', '.join(repeated) or 'no out-of-distribution source'}; give each set once"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise FaroutError(f"seeds must be different integers from 0, got {list(self.seeds)}")
        if not 0 < self.alpha < 1:
            raise FaroutError(f"alpha is a false-alarm rate between 0 and 1, got {self.alpha}")
        _check_at_least(
            1,
            limit=self.limit,
            train_limit=self.train_limit,
            baseline_limit=self.baseline_limit,
            statistics=self.statistics,
        )

    @property
    def ood_sources(self) -> tuple[str, ...]:
        """All out-of-distribution sources, group by group."""
        return tuple(source for group in self.ood.values() for source in group)

    def group_of(self, source: str) -> str:
        """The group of an out-of-distribution source."""
        return next(name for name, sources in self.ood.items() if source in sources)

    def section(self, name: str) -> Mapping[str, Any]:
        """The entries of one of `SECTIONS` by name."""
        entries: Mapping[str, Any] = getattr(self, name)
        return entries


def _check_at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise FaroutError(f"{name} must be at least {minimum}, got {value}")
