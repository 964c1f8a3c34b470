"""What a benchmark compares: networks, outliers, detectors and sets, each named once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.outlier_exposure import Exposure
from farout.core.runtime import Runtime
from farout.data.preprocessing import Protocol
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.image_to_image import DenoisingSpacing, ImageToImage
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import Synthesizer
from farout.training.config import TrainingConfig

__all__ = ["HEAD", "SECTIONS", "DetectorSpec", "NetworkSpec", "OutlierSpec", "ReconstructionSpec", "Spec"]


@dataclass(frozen=True)
class NetworkSpec:
    """A network that is trained once a seed, for all that name it.

    Attributes:
        kind: `diffusion` or `classifier`.
        preset: of `farout train diffusion` or `farout train classifier`; the other settings lie over it.
        source: images that it is trained on; None: the benchmark's.
        limit: a seeded sample of so many of them; None: the benchmark's `train_limit`.
        outliers, reconstructions: names of what a classifier learns from beside its images.
        folder: an existing model, which is taken as it is; nothing is trained.
        model, training: what is trained, and how; the seed is the benchmark's.
        exposure: how a classifier learns what lies outside the distribution.
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

    def needs(self) -> Iterator[tuple[str, str]]:
        """Section and name of what has to be there before."""
        yield from _named(outliers=self.outliers, reconstructions=self.reconstructions)


@dataclass(frozen=True)
class OutlierSpec:
    """Outliers that are made once a seed.

    Attributes:
        method: see `farout list synthesizers`.
        preset: of the method; `arguments` lie over it.
        diffusion, classifier: names of networks.
        count: of outliers, all classes together.
        source: images that they are made of; None: the benchmark's.
        limit: a seeded sample of so many of them; None: the benchmark's `train_limit`.
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

    def needs(self) -> Iterator[tuple[str, str]]:
        """Section and name of what has to be there before."""
        yield from _networks(self.diffusion, self.classifier)

    def made(self) -> Synthesizer:
        """The synthesizer."""
        made: Synthesizer = SYNTHESIZERS[self.method].load()(**self.arguments)
        made.provenance["preset"] = self.preset or ""
        return made


@dataclass(frozen=True)
class ReconstructionSpec:
    """Images that are made again once a seed, see `farout reconstruct`.

    Attributes:
        diffusion: name of a network.
        source: what is made again; None: the benchmark's training images.
        limit: a seeded sample of so many of them; None: the benchmark's `train_limit`.
        level, highest, classes, solver, steps, spacing: as in `farout reconstruct`.
    """

    diffusion: str
    source: str | None = None
    limit: int | None = None
    level: float = ImageToImage.level
    highest: float | None = ImageToImage.highest
    classes: bool = ImageToImage.classes
    solver: str = ImageToImage.solver
    steps: int | None = ImageToImage.steps
    spacing: DenoisingSpacing = ImageToImage.spacing

    def needs(self) -> Iterator[tuple[str, str]]:
        """Section and name of what has to be there before."""
        yield from _networks(self.diffusion)

    @property
    def trip(self) -> dict[str, Any]:
        """The settings that `farout reconstruct` has too."""
        names = ("level", "highest", "classes", "solver", "steps", "spacing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DetectorSpec:
    """A detector that is fitted, scored and rated once a seed.

    Attributes:
        method: see `farout list detectors`.
        preset: of the method; `arguments` lie over it.
        diffusion, classifier: names of networks.
        limit: fit on a seeded sample of so many training images; None: the benchmark's `train_limit`.
        statistics: images for the statistics; None: what the method wants.
        arguments: all settings of the method.
    """

    method: str
    preset: str | None = None
    diffusion: str | None = None
    classifier: str | None = None
    limit: int | None = None
    statistics: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def needs(self) -> Iterator[tuple[str, str]]:
        """Section and name of what has to be there before."""
        yield from _networks(self.diffusion, self.classifier)

    def made(self) -> Detector:
        """The detector, not fitted."""
        made: Detector = DETECTORS[self.method].load()(**self.arguments)
        made.provenance["preset"] = self.preset or ""
        return made


@dataclass(frozen=True)
class Spec:
    """A benchmark.

    Attributes:
        name: what it is called in tables.
        train: in-distribution images that everything is fitted on.
        id: in-distribution images that are scored.
        ood: out-of-distribution sources, by group (`near`, `far`).
        about: a sentence on it.
        protocol: how images are brought to size, for all networks and detectors alike.
        limit: a seeded sample of so many images of each scored source.
        train_limit: a seeded sample of so many training images.
        seeds: of everything; all is done once for each.
        alpha: false-alarm rate of flagged images.
        statistics: images that trainings leave to the statistics, beside those for calibration.
        trivial: also rate the trivial controls.
        random_weights: also rate, for each method that has a network, the same with random weights.
        control_limit: training images that the controls are fitted on.
        runtime: how networks are run.
        networks, outliers, reconstructions, detectors: by name.
    """

    name: str
    train: str
    id: str
    ood: dict[str, tuple[str, ...]] = field(default_factory=dict)
    about: str = ""
    protocol: Protocol = "native"
    limit: int | None = None
    train_limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    alpha: float = 0.05
    statistics: int = 400
    trivial: bool = True
    random_weights: bool = True
    control_limit: int | None = 1000
    runtime: Runtime = field(default_factory=Runtime)
    networks: dict[str, NetworkSpec] = field(default_factory=dict)
    outliers: dict[str, OutlierSpec] = field(default_factory=dict)
    reconstructions: dict[str, ReconstructionSpec] = field(default_factory=dict)
    detectors: dict[str, DetectorSpec] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """All out-of-distribution sources, group by group."""
        return tuple(source for group in self.ood.values() for source in group)

    def group(self, source: str) -> str:
        """The group that an out-of-distribution source stands in."""
        return next(name for name, sources in self.ood.items() if source in sources)

    def section(self, name: str) -> Mapping[str, Any]:
        """Networks, outliers, reconstructions or detectors, by name."""
        found: Mapping[str, Any] = getattr(self, name)
        return found


SECTIONS = ("networks", "outliers", "reconstructions", "detectors")
"""Fields of `Spec` that hold named entries."""
HEAD = tuple(f.name for f in fields(Spec) if f.name not in (*SECTIONS, "ood", "runtime"))
"""Fields of `Spec` that are plain values."""


def _networks(*names: str | None) -> Iterator[tuple[str, str]]:
    return (("networks", name) for name in names if name is not None)


def _named(**names: str | None) -> Iterator[tuple[str, str]]:
    return ((section, name) for section, name in names.items() if name is not None)
