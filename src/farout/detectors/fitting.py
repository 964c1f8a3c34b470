"""How a detector is fitted: splits, the networks that it lacks, statistics, calibration."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from farout.core.errors import FaroutError, ShortfallWarning, TrapWarning
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, all_grey
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source
from farout.data.splits import Split, calibration_size, log_split, seen_hint, split
from farout.detectors.calibration import calibrate, check_alpha
from farout.detectors.fit_settings import FitSettings
from farout.detectors.interface import DetectorInterface
from farout.detectors.networks import diffusion_class

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.diffusion.model import DiffusionModel
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["fit", "recalibrate", "source_spec"]

_log = logging.getLogger(__name__)
D = TypeVar("D", bound=DetectorInterface)
_ANY = 1 << 20


def fit(detector: D, images: Any, diffusion: Any, classifier: Any, settings: FitSettings) -> D:
    """See `Detector.fit`."""
    check_alpha(settings.alpha)
    if settings.statistics is not None and settings.statistics < 2:
        raise FaroutError(f"statistics require at least 2 images, got {settings.statistics}")
    source = open_source(images, limit=settings.limit, seed=settings.seed, policy=settings.policy)
    given = _given(detector, diffusion)
    detector.classifier = _given_classifier(detector, classifier, source)
    detector.calibration_scores = {}  # what fails halfway is not fitted, whatever an earlier fit has left
    detector.begin()
    if "features" in detector.needs:
        detector.features = detector.features or detector.build_features()
    parts = _split(detector, source, given, settings)
    log_split(source, parts)
    detector.alpha, detector.seed = settings.alpha, settings.seed
    if "features" in detector.needs:
        detector.preprocessing = detector.build_preprocessing(source, settings.protocol)
        detector.use(None, settings.runtime)
    training = source.subset(parts.training)
    if detector.needs & {"diffusion", "classifier"} and detector.diffusion_of == "images":
        from farout.detectors.network_training import check_networks, train_missing_classifier

        check_networks(detector, source, given, settings)
        if "classifier" in detector.needs and detector.classifier is None:
            detector.classifier = train_missing_classifier(detector, training, settings)
    lacking = given is None and "diffusion" in detector.needs
    model = detector.train(training, settings) if lacking else given
    known = model if model is not None and detector.diffusion_of == "images" else detector.classifier
    if known is not None:
        detector.preprocessing = _preprocessing(source, known.preprocessing, settings)
    elif "features" not in detector.needs:
        detector.preprocessing = detector.build_preprocessing(source, settings.protocol)
    detector.use(model, settings.runtime)
    measured = detector.measure_all(source.subset(parts.statistics), "measuring statistics images", watch=True)
    if not bool(measured.finite().all()):
        raise FaroutError(
            "measurements of the statistics images are not all numbers; look for damaged images or weights"
        )
    detector.statistics = measured
    detector.statistics_hashes = frozenset(source.content_hash(i) for i in parts.statistics)
    detector.fit_statistics(measured)
    calibration = detector.measure_all(source.subset(parts.calibration), "measuring calibration images")
    calibrate(detector, calibration)
    detector.calibration_hashes = frozenset(source.content_hash(i) for i in parts.calibration)
    preset = detector.provenance.get("preset", "")
    detector.provenance = {"preset": preset, **_provenance(images, source, parts, settings)}
    return detector


def _given(detector: DetectorInterface, diffusion: Any) -> DiffusionModel | FeatureDiffusion | None:
    if diffusion is None:
        return None
    name = type(detector).__name__
    if "diffusion" not in detector.needs:
        raise FaroutError(f"{name} uses no diffusion model; leave it out")
    kind = diffusion_class(detector.diffusion_of)
    model = kind.load(diffusion) if isinstance(diffusion, str | Path) else diffusion
    if not isinstance(model, kind):
        raise FaroutError(f"{name} works with a {kind.__name__}, got a {type(model).__name__}")
    if not model.trained_on and "random_weights" not in model.provenance:
        message = "it is not known which images this diffusion model was trained on; fit on images it cannot have seen"
        warnings.warn(message, TrapWarning, stacklevel=4)
    return model


def _given_classifier(detector: DetectorInterface, classifier: Any, source: ImageSource) -> Classifier | None:
    name = type(detector).__name__
    if classifier is None:
        if "classifier" in detector.needs and source.labels is None:
            hint = "give a classifier (--classifier FOLDER), or images in one folder per class to train one on"
            raise FaroutError(f"{name} requires a classifier, and {source.name} has no labels; {hint}")
        return None
    if "classifier" not in detector.needs:
        raise FaroutError(f"{name} uses no classifier; leave it out")
    from farout.classifiers.model import Classifier

    model = Classifier.load(classifier) if isinstance(classifier, str | Path) else classifier
    if not isinstance(model, Classifier):
        raise FaroutError(f"{name} works with a Classifier, got a {type(model).__name__}; see Classifier.from_module")
    unknown = not model.trained_on or model.provenance.get("weights")
    if unknown and "random_weights" not in model.provenance:
        message = "it is not known which images this classifier was trained on; fit on images it cannot have seen"
        warnings.warn(message, TrapWarning, stacklevel=4)
    return model


def _split(
    detector: DetectorInterface,
    source: ImageSource,
    given: DiffusionModel | FeatureDiffusion | None,
    settings: FitSettings,
) -> Split:
    lacking = {"diffusion": given, "classifier": detector.classifier}
    train = any(name in detector.needs and network is None for name, network in lacking.items())
    seen = frozenset[str]().union(*(network.trained_on for network in lacking.values() if network is not None))
    wanted = settings.statistics or _wanted(detector, len(source), settings.alpha, train=train)
    parts = split(
        source,
        alpha=settings.alpha,
        statistics=wanted,
        train=train,
        seed=settings.seed,
        exclude=seen,
        groups=settings.groups,
    )
    if len(parts.statistics) < 2:
        taken, left = len(parts.calibration), len(parts.statistics)
        counts = f"calibration at alpha {settings.alpha} takes {taken}, the statistics get {left}"
        hint = seen_hint(sum(content in seen for content in source.content_hashes()))
        raise FaroutError(f"{len(source)} images are too few: {counts}; give more images or a larger alpha{hint}")
    return _trimmed(parts, source, wanted, settings.alpha) if detector.statistics_suffice else parts


def _wanted(detector: DetectorInterface, count: int, alpha: float, *, train: bool) -> int:
    """Images for the statistics: what the method wants, but where a network is trained no more than half of what the
    calibration leaves.
    """
    left = count - calibration_size(count, alpha)
    return min(detector.statistics_minimum, max(2, left // 2)) if train else detector.statistics_minimum


def _trimmed(parts: Split, source: ImageSource, wanted: int, alpha: float) -> Split:
    """Statistics of the wanted size; what is left over goes to a calibration that exclusions have made small."""
    # by hash, so that the choice does not depend on the source's order
    order = sorted(parts.statistics, key=source.content_hash)
    missing = max(0, calibration_size(len(source), alpha) - len(parts.calibration))
    calibration = sorted([*parts.calibration, *order[wanted : wanted + missing]])
    return replace(parts, statistics=tuple(sorted(order[:wanted])), calibration=tuple(calibration))


def _preprocessing(source: ImageSource, known: Preprocessing, settings: FitSettings) -> Preprocessing:
    """A network's, with the native size of the images that this fit calls in-distribution."""
    own = Preprocessing.for_source(source, crop=known.crop, largest=_ANY)
    return replace(known, native=own.native, protocol=settings.protocol or known.protocol)


def _provenance(images: Any, source: ImageSource, parts: Split, settings: FitSettings) -> dict[str, Any]:
    return {
        "source": source_spec(images),
        "limit": settings.limit,
        "data_fingerprint": source.fingerprint(),
        "grey": all_grey(source),
        "images": {
            "training": len(parts.training),
            "statistics": len(parts.statistics),
            "calibration": len(parts.calibration),
        },
        "groups": settings.groups if isinstance(settings.groups, str) else "given",
    }


def source_spec(images: Any) -> str | None:
    """What opens the same images again from any folder; None for images that were given as objects."""
    if not isinstance(images, str | Path):
        return None
    text = str(images)
    spec = parse_spec(text)
    if spec.kind != "path":
        return text
    return str(Path(spec.location).expanduser().resolve()) + text.removeprefix(spec.location)


def recalibrate(
    detector: D,
    images: Any,
    *,
    limit: int | None = None,
    alpha: float | None = None,
    policy: Literal["raise", "skip"] = "raise",
) -> D:
    """Rests the p-values of a fitted detector on other good images; nothing is trained.

    Images that the networks or the statistics have seen are left out. Raises FaroutError when none is left.
    """
    detector.check_fitted()
    wanted = detector.alpha if alpha is None else alpha
    check_alpha(wanted)
    source = open_source(images, limit=limit, seed=detector.seed, policy=policy)
    seen = detector.statistics_hashes | detector.trained_on
    hashes = {i: name for i, name in enumerate(source.content_hashes()) if name is not None}
    fresh = [i for i, name in hashes.items() if name not in seen]
    used = len(hashes) - len(fresh)
    if not fresh:
        readable = f"{len(hashes)} of {len(source)} images can be read"
        raise FaroutError(f"{readable}, and {used} of these were used to fit this detector; calibrate on others")
    if used:
        _log.warning("%d of %d images were used to fit this detector and are left out", used, len(source))
    least = calibration_size(0, wanted)
    if len(fresh) < least:
        message = f"{len(fresh)} calibration images cannot flag anything at alpha {wanted}; that takes {least}"
        warnings.warn(message, ShortfallWarning, stacklevel=2)
    calibrate(detector, detector.measure_all(source.subset(fresh), "measuring calibration images"))
    detector.alpha = wanted
    detector.calibration_hashes = frozenset(hashes[i] for i in fresh)
    # a new one: a `reconfigured` twin has the old one too
    counts = {**detector.provenance.get("images", {}), "calibration": len(fresh)}
    detector.provenance = {**detector.provenance, "calibration_source": source_spec(images), "images": counts}
    return detector
