"""Baselines fitted for comparison with a detector: standard methods, trivial baselines, and random network weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farout.core.errors import FaroutError, FaroutWarning, MisleadingResultWarning
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.detectors.feature_detector import FeatureDetector
from farout.evaluation.trivial_baselines import NAME as TRIVIAL_BASELINES
from farout.evaluation.trivial_baselines import TrivialBaselines

if TYPE_CHECKING:  # importing the networks takes seconds, and most detectors use none of them
    from farout.classifiers.model import Classifier
    from farout.diffusion.model import DiffusionModel
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["EvaluatedDetector", "fit_baselines", "method_name", "with_random_weights"]


logger = logging.getLogger(__name__)


@dataclass
class EvaluatedDetector:
    """A detector in an evaluation: its name in the tables, and the folder of its scores."""

    name: str
    detector: Detector
    folder: Path


def method_name(detector: Detector) -> str:
    """Name of the method in `farout list detectors`; the class name of a method that is not registered."""
    return DETECTORS.find_name(type(detector)) or type(detector).__name__


def fit_baselines(
    detector: Detector,
    out: Path,
    *,
    standard_baselines: bool,
    trivial_baselines: bool,
    random_weights_baseline: bool,
    baseline_images: Any,
    baseline_limit: int | None,
) -> list[EvaluatedDetector]:
    """Fit the baselines of a detector with its alpha, seed, runtime, protocol and groups.

    The arguments are those of `evaluate`. A baseline that cannot be fitted is left out with a warning that states the
    reason.
    """
    scores_folder = out / "baseline_scores"
    common: dict[str, Any] = {
        "alpha": detector.alpha,
        "seed": detector.seed,
        "runtime": detector.runtime,
        "protocol": detector.preprocessing.protocol,
    }
    if baseline_images is None and detector.provenance.get("groups") in ("folder", "none"):
        common["groups"] = detector.provenance["groups"]

    def fit_standard(name: str, images: ImageSource) -> EvaluatedDetector:
        method = DETECTORS[name].load()
        baseline = detector.build_baseline(method) if isinstance(detector, FeatureDetector) else method()
        classifier = detector.classifier if baseline.requirements.classifier else None
        fitted = baseline.fit(images, classifier=classifier, **common)
        return EvaluatedDetector(name, fitted, scores_folder / name)

    def fit_trivial(images: ImageSource) -> EvaluatedDetector:
        fitted = TrivialBaselines().fit(images, limit=baseline_limit, **common)
        return EvaluatedDetector(TRIVIAL_BASELINES, fitted, scores_folder / TRIVIAL_BASELINES)

    def fit_random_weights(images: ImageSource) -> EvaluatedDetector:
        baseline, diffusion, classifier = with_random_weights(detector)
        fitted = baseline.fit(images, diffusion, classifier, limit=baseline_limit, **common)
        name = f"{method_name(detector)}_random_weights"
        return EvaluatedDetector(name, fitted, scores_folder / name)

    fits: dict[str, Callable[[ImageSource], EvaluatedDetector]] = {}
    if standard_baselines:
        fits |= {name: partial(fit_standard, name) for name in detector.baselines}
    if trivial_baselines:
        fits[TRIVIAL_BASELINES] = fit_trivial
    has_network = any(network is not None for network in (detector.diffusion, detector.classifier, detector.features))
    if random_weights_baseline and has_network:
        fits["random_weights"] = fit_random_weights
    if not fits:
        return []
    source = baseline_images if baseline_images is not None else detector.provenance.get("source")
    try:
        images = _open_fitted_images(detector) if baseline_images is None else open_source(baseline_images)
    except FaroutError as error:
        message = (
            f"no baselines: they cannot be fitted on {source!r} ({error}); give images for them with --baseline-images"
        )
        warnings.warn(message, MisleadingResultWarning, stacklevel=3)
        return []
    fitted, messages = [], _FitMessages()
    for name, fit in fits.items():
        try:
            with messages.collect(name):
                fitted.append(fit(images))
        except FaroutError as error:
            message = f"{name} is left out: it cannot be fitted on {source!r} ({error})"
            warnings.warn(message, MisleadingResultWarning, stacklevel=3)
    messages.report()
    _report_calibrations(detector, fitted, images)
    return fitted


@dataclass
class _FitMessages:
    """Warnings and splits of several fits, to be reported once with the names of the fits that have them in common."""

    names: dict[tuple[type[Warning] | None, str], list[str]] = field(default_factory=dict)
    """Names of the fits by message, with the category of a warning and None for the log of a split."""

    @contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Collect the messages of a fit."""

        def add(category: type[Warning] | None, text: str) -> None:
            names = self.names.setdefault((category, text), [])
            if name not in names:
                names.append(name)

        def collect_split(record: logging.LogRecord) -> bool:
            add(None, record.getMessage())
            return False

        splits_logger = logging.getLogger("farout.data.splits")
        splits_logger.addFilter(collect_split)
        try:
            with warnings.catch_warnings(record=True) as caught:
                yield
        finally:
            splits_logger.removeFilter(collect_split)
            for warning in caught:
                add(warning.category, str(warning.message))

    def report(self) -> None:
        """Report every message once."""
        for (category, text), names in self.names.items():
            message = f"baselines ({', '.join(names)}): {text}"
            if category is None:
                logger.info(message)
            elif issubclass(category, FaroutWarning):
                warnings.warn(message, category, stacklevel=4)
            else:  # of another library
                warnings.warn(text, category, stacklevel=4)


def _report_calibrations(detector: Detector, baselines: list[EvaluatedDetector], images: ImageSource) -> None:
    """Log how many images each baseline is calibrated on where these are not the detector's."""
    names: dict[int, list[str]] = {}
    for baseline in baselines:
        if baseline.detector.calibration_hashes != detector.calibration_hashes:
            names.setdefault(len(baseline.detector.calibration), []).append(baseline.name)
    about = detector.provenance
    own = about.get("calibration_source") or about.get("source") or "images in memory"
    for count, group in names.items():
        logger.info(
            "baselines (%s) are calibrated on %d images of %s, the detector on %d of %s",
            ", ".join(group), count, images.name, len(detector.calibration), own,
        )  # fmt: skip


def with_random_weights(
    detector: Detector,
) -> tuple[Detector, DiffusionModel | FeatureDiffusion | None, Classifier | None]:
    """The same method, not fitted, and the networks to fit it with: what is learned by the weights alone is lost.

    The diffusion model has random weights; if there is none, the classifier; of a method that has neither, the
    backbone, which the returned detector creates itself.

    Raises:
        FaroutError: the detector has no network.
    """
    unfitted = type(detector)(**detector.config)
    if detector.diffusion is not None:
        unfitted.features = detector.features
        return unfitted, detector.diffusion.with_random_weights(detector.seed), detector.classifier
    if detector.classifier is not None:
        unfitted.features = detector.features
        return unfitted, None, detector.classifier.with_random_weights(detector.seed)
    if detector.features is None:
        raise FaroutError(f"{type(detector).__name__} has no network whose weights could be random")
    return type(detector)(**{**detector.config, "weights": "random"}), None, None


def _open_fitted_images(detector: Detector) -> ImageSource:
    """Open the images that the detector was fitted on; raise FaroutError if they are unavailable or have changed."""
    about = detector.provenance
    if about.get("source") is None:
        raise FaroutError("the detector was fitted on images in memory")
    images = open_source(
        about["source"], limit=about["limit"], seed=detector.seed, policy="skip", reading=detector.reading_of_fit
    )
    images = images.with_reduced_decoding(detector.preprocessing.reduced_decoding)
    if images.fingerprint() != about["data_fingerprint"]:
        raise FaroutError(f"{about['source']} no longer contains the images that the detector was fitted on")
    return images
