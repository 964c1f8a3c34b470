"""How a detector is fitted: splits, the networks that it lacks, statistics, calibration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import Exposure, Outside
from farout.classifiers.train import PRESETS as CLASSIFIERS
from farout.classifiers.train import ClassifierConfig, train_on
from farout.core.errors import FaroutError, ShortfallWarning, TrapWarning
from farout.core.runtime import Runtime
from farout.data.classes import class_names_of
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing, Protocol, all_grey
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source
from farout.data.splits import Split, calibration_size, seen_hint, split
from farout.detectors.calibration import calibrate, check_alpha
from farout.detectors.interface import DetectorInterface
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import PRESETS, DiffusionConfig, train_model
from farout.features.feature_diffusion import FeatureDiffusion
from farout.training.loop import TrainingConfig

__all__ = ["FitSettings", "fit", "recalibrate", "source_spec", "train_on_images", "training_of"]

_log = logging.getLogger(__name__)
D = TypeVar("D", bound=DetectorInterface)
_ANY = 1 << 20


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Args:
        limit: use a seeded random sample of this many images; default: all.
        alpha: false-alarm rate: images with p-value <= alpha are flagged; calibration gets max(20 %, ceil(1/alpha) - 1)
            images.
        seed: seed of the sample, split, weights and noise.
        groups: `folder`: keep images of one folder in the same part of the split; in Python also a group name per
            image.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        statistics: number of images for the statistics; default: the method's own number.
        protocol: how images are resized: `native` (to the native size, then to the network's), `direct` (straight to
            the network's size) or `common` (native size, then one JPEG encoding); default: as the given diffusion
            model, else `native`.
        network: settings of the diffusion model that is trained if none is given; None: the method's preset.
        training: settings of that training; None: the method's preset.
        classifier_preset: preset of `farout train classifier` used if no classifier is given.
        classifier_steps: number of training steps of that classifier; default: the preset's.
        checkpoints: folder of the training checkpoints; default: OUT.training (in Python: no checkpoints).
        resume: continue training from the last checkpoint.
        runtime: how networks are run.
    """

    limit: int | None = None
    alpha: float = 0.05
    seed: int = 0
    groups: Literal["none", "folder"] | Sequence[str] = "none"
    policy: Literal["raise", "skip"] = "raise"
    statistics: int | None = None
    protocol: Protocol | None = None
    network: DiffusionConfig | None = None
    training: TrainingConfig | None = None
    classifier_preset: str = "tiny"
    classifier_steps: int | None = None
    checkpoints: Path | None = None
    resume: bool = False
    runtime: Runtime = field(default_factory=Runtime)


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
    detector.alpha, detector.seed = settings.alpha, settings.seed
    if "features" in detector.needs:
        detector.preprocessing = detector.build_preprocessing(source, settings.protocol)
        detector.use(None, settings.runtime)
    training = source.subset(parts.training)
    _check(detector, source, given, settings)
    if "classifier" in detector.needs and detector.classifier is None:
        detector.classifier = _train_classifier(detector, training, settings)
    lacking = given is None and "diffusion" in detector.needs
    model = detector.train(training, settings) if lacking else given
    known = model if isinstance(model, DiffusionModel) else detector.classifier
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
    kind, name = detector.diffusion_kind, type(detector).__name__
    if "diffusion" not in detector.needs:
        raise FaroutError(f"{name} uses no diffusion model; leave it out")
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


def _network_config(detector: DetectorInterface, settings: FitSettings) -> DiffusionConfig:
    config = settings.network or DiffusionConfig(**PRESETS[detector.network_preset]["model"])
    if settings.protocol is not None:
        config = replace(config, protocol=settings.protocol)
    return detector.network_config(config)


def _classifier_config(detector: DetectorInterface, settings: FitSettings) -> ClassifierConfig:
    """The preset's, with images prepared as those of a diffusion model that is trained with it."""
    if settings.classifier_preset not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise FaroutError(f"there is no classifier preset {settings.classifier_preset!r}; expected one of {known}")
    _exposure(settings).resolved(outliers=False)
    config = ClassifierConfig(**CLASSIFIERS[settings.classifier_preset]["model"])
    if "diffusion" in detector.needs:
        shared = _network_config(detector, settings)
        names = ("size", "channels", "crop", "protocol")
        return replace(config, **{name: getattr(shared, name) for name in names})
    return config if settings.protocol is None else replace(config, protocol=settings.protocol)


def _exposure(settings: FitSettings) -> Exposure:
    return Exposure(**CLASSIFIERS[settings.classifier_preset].get("exposure", {}))


def _check(detector: DetectorInterface, images: ImageSource, given: Any, settings: FitSettings) -> None:
    """Lets the detector refuse what cannot work before anything is trained."""
    if detector.diffusion_kind is not DiffusionModel:
        return
    diffusion, classifier = given, detector.classifier
    if diffusion is None and "diffusion" in detector.needs:
        config = _network_config(detector, settings)
        diffusion = config.build(config.preprocess(images), class_names=config.class_names(images))
    if classifier is None and "classifier" in detector.needs:
        classifier = _classifier_config(detector, settings).build(images, class_names_of(images))
    detector.check(images, diffusion, classifier)


def train_on_images(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> DiffusionModel:
    """Trains a diffusion model of images as the settings say."""
    config = _network_config(detector, settings)
    torch.manual_seed(settings.seed)
    fresh = config.build(config.preprocess(images), class_names=config.class_names(images))
    given = settings.training or TrainingConfig(**PRESETS[detector.network_preset]["training"])
    training = training_of(given, settings)
    return train_model(
        images, fresh, training, objective=config.objective, out=settings.checkpoints, resume=settings.resume
    )


def _train_classifier(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> Classifier:
    """Trains a classifier by a preset; other settings come from `farout train classifier`."""
    training = TrainingConfig(**CLASSIFIERS[settings.classifier_preset]["training"])
    if settings.classifier_steps is not None:
        training = replace(training, steps=settings.classifier_steps)
    out = settings.checkpoints / "classifier" if settings.checkpoints is not None else None
    config = _classifier_config(detector, settings)
    training, outside = training_of(training, settings), Outside(_exposure(settings))
    return train_on(images, config, training, out=out, resume=settings.resume, outside=outside)


def training_of(given: TrainingConfig, settings: FitSettings) -> TrainingConfig:
    """A training with the fit's seed, and its device and precision where the training names none."""
    runtime = settings.runtime
    device = runtime.device if given.device == "auto" else given.device
    precision = runtime.precision if given.precision == "auto" else given.precision
    return replace(given, seed=settings.seed, device=device, precision=precision)


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
