"""What is rated beside a detector: the methods that it must beat, trivial controls, and its own random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farout.classifiers.model import Classifier
from farout.core.errors import FaroutError, TrapWarning
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.evaluation.baselines import TRIVIAL, TrivialControls

__all__ = ["Beside", "Rated", "name_of", "random_twin", "rated_beside"]


@dataclass(frozen=True)
class Beside:
    """What is wanted beside a detector.

    companions: the methods that it names; trivial: controls that need no model; random: the same detector with random
    weights (see `random_twin`); reference: source that they are fitted on, None: the one that the detector was fitted
    on; control_limit: images of it that the controls are fitted on (companions see all), 1 or more.
    """

    companions: bool = True
    trivial: bool = True
    random: bool = False
    reference: Any = None
    control_limit: int | None = 1000

    def __post_init__(self) -> None:
        if self.control_limit is not None and self.control_limit < 1:
            raise FaroutError(f"control_limit must be at least 1, got {self.control_limit}")


@dataclass
class Rated:
    """A detector, its name, and the folder of its scores."""

    name: str
    detector: Detector
    folder: Path


def name_of(detector: Detector) -> str:
    """The method's name as in `farout list detectors`, or its class's where it is not listed."""
    known = {member.class_name: member.name for member in DETECTORS.values()}
    return known.get(type(detector).__name__, type(detector).__name__)


def rated_beside(detector: Detector, wanted: Beside, out: Path) -> Iterator[Rated]:
    """Fitted like the detector; what cannot be fitted is left out with a warning that says why."""
    makers = _makers(detector, wanted, out)
    if not makers:
        return
    source = wanted.reference if wanted.reference is not None else detector.provenance.get("source")
    try:
        images = open_source(source) if wanted.reference is not None else _fitted_images(detector)
    except FaroutError as error:
        message = f"no controls: they cannot be fitted on {source!r} ({error}); give images for them with --reference"
        warnings.warn(message, TrapWarning, stacklevel=3)
        return
    for name, make in makers.items():
        try:
            yield make(images)
        except FaroutError as error:
            message = f"{name} is left out: it cannot be fitted on {source!r} ({error})"
            warnings.warn(message, TrapWarning, stacklevel=3)


def _makers(detector: Detector, wanted: Beside, out: Path) -> dict[str, Callable[[ImageSource], Rated]]:
    """By name, what is rated beside a detector, as functions that fit it to images."""
    few = {**_settings(detector), "limit": wanted.control_limit}

    def companion(name: str) -> Callable[[ImageSource], Rated]:
        twin = detector.companion(DETECTORS[name].load())
        classifier = detector.classifier if "classifier" in twin.needs else None
        given = {"classifier": classifier, **_settings(detector)}
        return lambda images: Rated(name, twin.fit(images, **given), out / "companion_scores" / name)

    def trivial(images: ImageSource) -> Rated:
        return Rated(TRIVIAL, TrivialControls().fit(images, **few), out / "control_scores" / "trivial")

    def random(images: ImageSource) -> Rated:
        twin, *networks = random_twin(detector)
        twin.fit(images, *networks, **few)
        return Rated(f"{name_of(detector)}_random_weights", twin, out / "control_scores" / "random")

    makers = {name: companion(name) for name in detector.companions} if wanted.companions else {}
    if wanted.trivial:
        makers[TRIVIAL] = trivial
    if wanted.random and any(each is not None for each in (detector.diffusion, detector.classifier, detector.features)):
        makers["random_weights"] = random
    return makers


def random_twin(detector: Detector) -> tuple[Detector, Any, Classifier | None]:
    """The same method, not fitted, and the networks that it is to be fitted with: the diffusion model with random
    weights; without one the classifier; of a method that has neither, the backbone, which the twin then makes itself.

    Raises FaroutError for a detector without a network.
    """
    twin = type(detector)(**detector.config)
    if detector.diffusion is not None:
        twin.features = detector.features
        return twin, detector.diffusion.with_random_weights(detector.seed), detector.classifier
    if detector.classifier is not None:
        twin.features = detector.features
        return twin, None, detector.classifier.with_random_weights(detector.seed)
    if detector.features is None:
        raise FaroutError(f"{type(detector).__name__} has no network whose weights could be random")
    return type(detector)(**{**detector.config, "weights": "random"}), None, None


def _settings(detector: Detector) -> dict[str, Any]:
    protocol = detector.preprocessing.protocol
    return {"alpha": detector.alpha, "seed": detector.seed, "runtime": detector.runtime, "protocol": protocol}


def _fitted_images(detector: Detector) -> ImageSource:
    """The images that the detector was fitted to; raises FaroutError where they are not at hand or have changed."""
    about = detector.provenance
    if about.get("source") is None:
        raise FaroutError("the detector was fitted to images in memory")
    images = open_source(about["source"], limit=about["limit"], seed=detector.seed, policy="skip")
    if images.fingerprint() != about["data_fingerprint"]:
        raise FaroutError(f"{about['source']} no longer holds the images that the detector was fitted to")
    return images
