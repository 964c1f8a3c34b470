"""Fitting a detector: split, networks that are required and not given, statistics, calibration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from farout.core.errors import (
    FaroutError,
    MisleadingResultWarning,
    TooFewImagesWarning,
    UnknownArgumentError,
    suggest_names,
)
from farout.core.profiling import count_images, timed
from farout.core.progress import task
from farout.data.batching import Batch
from farout.data.image_source import ImageSource
from farout.data.normal_images import check_normal_images
from farout.data.preprocessing import Preprocessing, is_all_gray
from farout.data.read_settings import DEFAULT_READING, ReadSettings, format_value_range
from farout.data.sources import open_source, parse_source
from farout.data.splits import Groups, Split, calibration_size, group_images, log_split, split_source
from farout.detectors.backend_choice import choose_backend
from farout.detectors.calibration import check_alpha, check_fitted, check_seed, set_calibration
from farout.detectors.fit_settings import FitSettings
from farout.detectors.interface import DetectorInterface
from farout.detectors.networks import diffusion_class
from farout.detectors.results import Measurements

if TYPE_CHECKING:
    from farout.classifiers.model import Classifier
    from farout.diffusion.model import DiffusionModel
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = [
    "copy_with_scoring",
    "fit",
    "fit_to_split",
    "measure_source",
    "recalibrate",
    "source_spec",
    "train_missing_networks",
]

logger = logging.getLogger(__name__)
D = TypeVar("D", bound=DetectorInterface)


def fit(detector: DetectorInterface, images: Any, diffusion: Any, classifier: Any, settings: FitSettings) -> None:
    """Fit a detector to normal images; see `Detector.fit`."""
    check_alpha(settings.alpha)
    check_seed(settings.seed)
    if settings.statistics is not None and settings.statistics < 2:
        raise FaroutError(f"statistics require at least 2 images, got {settings.statistics}")
    source = open_source(
        images,
        limit=settings.limit,
        seed=settings.seed,
        policy=settings.policy,
        reading=settings.reading,
        require_range=diffusion is None and classifier is None,  # the networks may have one
    )
    check_normal_images(source)
    detector.diffusion = _load_diffusion(detector, diffusion)
    detector.classifier = _load_classifier(detector, classifier, source)
    source = _with_range_of_networks(detector, source)
    source = source.with_reduced_decoding(_choose_reduced_decoding(detector, settings))
    detector.loaded_from = None
    detector.calibration_scores = {}  # a detector whose fit fails is not fitted, whatever an earlier fit has left
    detector.reset_statistics()
    if detector.requirements.backbone:
        with timed("loading"):
            detector.features = detector.features or detector.build_features()

    split = _split_source(detector, source, settings)
    log_split(source, split)
    source.warn_about_reading()
    if source.value_range is not None and source.reading.value_range is None:
        text = format_value_range(source.value_range)
        logger.info("value range %s, estimated from the images; another is given with --value-range", text)
    fit_to_split(detector, source, split, settings)
    detector.provenance["source"] = source_spec(images)


def fit_to_split(detector: DetectorInterface, source: ImageSource, split: Split, settings: FitSettings) -> None:
    """Fit a detector whose given networks, and backbone, are set: missing networks, statistics and calibration.

    Args:
        detector: the detector.
        source: all images.
        split: indices of the images of each part.
        settings: settings of the fit; `statistics` and the settings of the split are not used.
    """
    training_images, statistics_images, calibration_images = (
        source.subset(indices) for indices in (split.training, split.statistics, split.calibration)
    )
    detector.alpha, detector.seed = settings.alpha, settings.seed
    if detector.parts:
        detector.fit_parts(source, split, settings)
    else:
        _prepare_networks(detector, source, training_images, settings)
    backend = detector.backend  # of the backbone, with which the features of training images were computed
    detector.attach_runtime(settings.runtime)
    if detector.requirements.backbone:
        detector.use_backend(backend)
    choose_backend(detector, len(statistics_images) + len(calibration_images))

    detector.prepare_statistics(statistics_images)
    detector.statistics = measure_source(
        detector, statistics_images, "measuring statistics images", detector.measure_statistics
    )
    if not bool(detector.statistics.is_finite().all()):
        raise FaroutError(
            "measurements of the statistics images are not all numbers; look for damaged images or weights"
        )
    with timed("statistics"):
        detector.fit_statistics(detector.statistics)
    calibration = measure_source(detector, calibration_images, "measuring calibration images")
    with timed("statistics"):
        set_calibration(detector, calibration)
    detector.statistics_hashes = frozenset(source.content_hash(i) for i in split.statistics)
    detector.calibration_hashes = frozenset(source.content_hash(i) for i in split.calibration)
    detector.provenance = {
        "preset": detector.provenance.get("preset", ""),
        "source": None,
        "limit": settings.limit,
        "frames": settings.reading.frames,
        "data_fingerprint": source.fingerprint(),
        "gray": is_all_gray(source),
        "images": {
            "training": len(training_images),
            "statistics": len(statistics_images),
            "calibration": len(calibration_images),
            "unused": len(split.unused),
            "copies": split.copies,
        },
        "unreadable": len(source.unreadable),
        "left_out": source.left_out,
        "further_frames": sum(source.further_frames.values()),
        "groups": settings.groups if isinstance(settings.groups, str) else "given",
        **_describe_backend(detector),
    }


def _describe_backend(detector: DetectorInterface) -> dict[str, str]:
    """The library that has evaluated the networks on the calibration images, if it is not torch itself."""
    return {} if detector.backend == "eager" else {"backend": detector.backend}


def _prepare_networks(
    detector: DetectorInterface, source: ImageSource, training_images: ImageSource, settings: FitSettings
) -> None:
    """Train the networks that are required and not given, and choose the preprocessing."""
    requirements = detector.requirements
    if requirements.backbone:
        # features of the training images need the backbone on its device
        detector.preprocessing = detector.build_preprocessing(source, settings.protocol)
        detector.attach_runtime(settings.runtime)
        choose_backend(detector, len(source))

    train_missing_networks(detector, source, training_images, settings)
    if requirements.diffusion == "features" and detector.diffusion is None:
        detector.diffusion = detector.train_feature_diffusion(training_images, settings)
        detector.diffusion.provenance |= {"reduced_decoding": True} if source.reduced_decoding else {}

    network = detector.diffusion if requirements.diffusion == "images" else detector.classifier
    if network is not None:
        # the network's own preprocessing, with the native size of the images that are in-distribution in this fit
        own = cast("DiffusionModel | Classifier", network).preprocessing
        native = Preprocessing.for_source(source, crop=own.crop, largest=1 << 20).native
        detector.preprocessing = replace(
            own,
            native=native,
            protocol=settings.protocol or own.protocol,
            value_range=source.value_range,
            reduced_decoding=source.reduced_decoding,
        )
    elif not requirements.backbone:
        detector.preprocessing = detector.build_preprocessing(source, settings.protocol)


def train_missing_networks(
    detector: DetectorInterface, source: ImageSource, training_images: ImageSource, settings: FitSettings
) -> None:
    """Train the classifier and the diffusion model of images that the detector requires and does not have."""
    requirements = detector.requirements
    if requirements.diffusion != "images" and not requirements.classifier:
        return
    from farout.detectors import network_training  # loads diffusers and scikit-learn

    network_training.check_with_untrained_networks(detector, source, settings)
    if requirements.classifier and detector.classifier is None:
        detector.classifier = network_training.train_classifier(detector, training_images, settings)
    if requirements.diffusion == "images" and detector.diffusion is None:
        detector.diffusion = network_training.train_diffusion(detector, training_images, settings)


def measure_source(
    detector: DetectorInterface,
    source: ImageSource,
    description: str,
    measure: Callable[[Batch], Measurements] | None = None,
) -> Measurements:
    """Measure all readable images of a source; by default with `detector.measure`."""
    parts = []
    with task(description, len(source)) as bar:
        for batch in detector.load_batches(source):
            count_images(len(batch.keys))
            if batch.keys:
                with timed("network"):
                    measurements = (measure or detector.measure)(batch)
                parts.append(replace(measurements, maps=None, pictures={}))
            bar.advance(len(batch.keys))
    return Measurements.join(parts)


def recalibrate(
    detector: D,
    images: Any,
    *,
    limit: int | None = None,
    alpha: float | None = None,
    policy: Literal["raise", "skip"] = "raise",
    must_flag: bool = False,
    reading: ReadSettings = DEFAULT_READING,
    groups: Groups = "near_copies",
) -> D:
    """Compute the p-values of a fitted detector from other normal images; nothing is trained.

    Images that the networks or the statistics have seen are left out, with their near-copies and groups, and one image
    of each other group is used; see `FitSettings` for `groups`. Raises FaroutError when no others are left, and with
    `must_flag` also when there are too few to flag anything at alpha, which is else a warning.
    """
    check_fitted(detector)
    alpha = detector.alpha if alpha is None else alpha
    check_alpha(alpha)
    source = detector.open_images(images, limit=limit, policy=policy, reading=reading)
    check_normal_images(source)
    seen = detector.statistics_hashes | detector.trained_on
    grouped = group_images(source, groups)
    hashes = grouped.hashes
    is_seen = {i for i, content in hashes.items() if content in seen}
    new_groups = [group for group in grouped.groups if is_seen.isdisjoint(group)]
    new = sorted(grouped.choose_image(group, detector.seed) for group in new_groups)
    source.warn_about_reading()
    if not new:
        readable = f"{len(hashes)} of {len(source)} images can be read"
        raise FaroutError(
            f"{readable}, and {len(is_seen)} of these were used to fit this detector; calibrate on others"
        )
    if is_seen:
        logger.warning("%d of %d images were used to fit this detector and are left out", len(is_seen), len(source))
        related = len(hashes) - sum(map(len, new_groups)) - len(is_seen)
        if related:
            logger.warning("%d near-copies of these, or images of their groups, are left out, too", related)
    if grouped.copies:
        logger.info("%s: %s", source.name, grouped.describe_copies())
    least = calibration_size(0, alpha)
    if len(new) < least:
        message = f"{len(new)} calibration images cannot flag anything at alpha {alpha} ({least} needed)"
        if grouped.copies:
            message += f"; {grouped.describe_copies()}"
        if must_flag:
            raise FaroutError(f"{message}; give more images, a larger alpha, or --out to write it anyway")
        warnings.warn(message, TooFewImagesWarning, stacklevel=2)
    choose_backend(detector, len(new))
    set_calibration(detector, measure_source(detector, source.subset(new), "measuring calibration images"))
    detector.alpha, detector.loaded_from = alpha, None
    detector.calibration_hashes = frozenset(hashes[i] for i in new)
    # a new dictionary: copies with other scoring arguments share the old one
    counts = {**detector.provenance.get("images", {}), "calibration": len(new)}
    provenance = {name: value for name, value in detector.provenance.items() if name != "backend"}
    own = {"calibration_source": source_spec(images), "images": counts, **_describe_backend(detector)}
    detector.provenance = {**provenance, **own}
    return detector


def copy_with_scoring(detector: D, arguments: dict[str, Any]) -> D:
    """Copy a fitted detector with other scoring arguments; see `Detector.with_scoring`."""
    check_fitted(detector)
    others = sorted(set(arguments) - detector.scoring_arguments)
    if others:
        name = type(detector).__name__
        for argument in others:
            if argument not in detector.config:
                hint = suggest_names(argument, detector.config)
                raise UnknownArgumentError(f"{name} has no argument {argument!r}; {hint}")
        changeable = " and ".join(sorted(detector.scoring_arguments)) or "nothing"
        raise FaroutError(
            f"{', '.join(others)} cannot be changed after the fit; only {changeable} can be changed (or fit again)"
        )
    copy = type(detector)(**{**detector.config, **arguments})
    copy.diffusion, copy.classifier, copy.features = detector.diffusion, detector.classifier, detector.features
    copy.parts = detector.parts
    copy.preprocessing, copy.alpha, copy.seed = detector.preprocessing, detector.alpha, detector.seed
    copy.statistics, copy.statistics_hashes = detector.statistics, detector.statistics_hashes
    copy.calibration_hashes = detector.calibration_hashes
    copy.provenance, copy.linked_model = detector.provenance, detector.linked_model
    copy.attach_runtime(detector.runtime)
    copy.use_backend(detector.backend)
    copy.set_state(detector.get_state())
    copy.fit_statistics(copy.statistics)
    set_calibration(copy, detector.calibration)
    return copy


def source_spec(images: Any) -> str | None:
    """A specification that opens the same images from any working directory; None for images given as objects."""
    if not isinstance(images, str | Path):
        return None
    return parse_source(images).canonical


def _with_range_of_networks(detector: DetectorInterface, source: ImageSource) -> ImageSource:
    """Return the source with the value range that the given networks were trained with, unless another is declared."""
    for network in (detector.diffusion, detector.classifier):
        preprocessing = getattr(network, "preprocessing", None)
        value_range = None if preprocessing is None else preprocessing.value_range
        if value_range is not None:
            source = source.with_value_range(value_range)
            if source.reading.value_range != value_range:
                name = type(network).__name__
                message = f"the {name} was trained with the value range {format_value_range(value_range)}"
                warnings.warn(f"{message}, and another is given", MisleadingResultWarning, stacklevel=4)
    return source


def _choose_reduced_decoding(detector: DetectorInterface, settings: FitSettings) -> bool:
    """Return whether images are decoded in reduced sizes: as the images were that the given networks have seen.

    Which images these are is known by their content hashes, which depend on it.
    """
    used: dict[bool, str] = {}
    for network in (detector.diffusion, detector.classifier):
        if network is not None and network.trained_on:
            preprocessing = getattr(network, "preprocessing", None)
            if preprocessing is None:  # a diffusion model of features
                used[bool(network.provenance.get("reduced_decoding"))] = f"the {type(network).__name__} was trained"
            else:
                used[preprocessing.reduced_decoding] = f"the {type(network).__name__} was trained"
    for name, part in detector.parts.items():
        if part.is_fitted:
            used[part.preprocessing.reduced_decoding] = f"the detector {name} was fitted"
    if len(used) > 1:
        raise FaroutError(f"{used[True]} with reduced decoding, {used[False]} without it; use the same for all")
    if True in used and not settings.reduced_decoding:
        raise FaroutError(f"reduced_decoding is off, and {used[True]} with it; train one without it, or leave it on")
    return next(iter(used), settings.reduced_decoding)


def _load_diffusion(detector: DetectorInterface, diffusion: Any) -> DiffusionModel | FeatureDiffusion | None:
    if diffusion is None:
        return None
    name, required = type(detector).__name__, detector.requirements.diffusion
    if required is None:
        raise FaroutError(f"{name} uses no diffusion model; leave it out")
    cls = diffusion_class(required)
    model = cls.load(diffusion) if isinstance(diffusion, str | Path) else diffusion
    if not isinstance(model, cls):
        raise FaroutError(f"{name} works with a {cls.__name__}, got a {type(model).__name__}")
    if not model.trained_on and "random_weights" not in model.provenance:
        message = "it is not known which images this diffusion model was trained on; fit on images it cannot have seen"
        warnings.warn(message, MisleadingResultWarning, stacklevel=4)
    return model


def _load_classifier(detector: DetectorInterface, classifier: Any, source: ImageSource) -> Classifier | None:
    name, required = type(detector).__name__, detector.requirements.classifier
    if classifier is None:
        if required and source.labels is None:
            hint = "give a classifier (--classifier FOLDER), or images in one folder per class to train one on"
            raise FaroutError(f"{name} requires a classifier, and {source.name} has no labels; {hint}")
        return None
    if not required:
        raise FaroutError(f"{name} uses no classifier; leave it out")
    from farout.classifiers.model import Classifier  # loads timm, which a detector without classifier does not need

    model = Classifier.load(classifier) if isinstance(classifier, str | Path) else classifier
    if not isinstance(model, Classifier):
        raise FaroutError(f"{name} works with a Classifier, got a {type(model).__name__}; see Classifier.from_module")
    unknown = not model.trained_on or model.provenance.get("weights")
    if unknown and "random_weights" not in model.provenance:
        message = "it is not known which images this classifier was trained on; fit on images it cannot have seen"
        warnings.warn(message, MisleadingResultWarning, stacklevel=4)
    return model


def _split_source(detector: DetectorInterface, source: ImageSource, settings: FitSettings) -> Split:
    requirements, alpha = detector.requirements, settings.alpha
    has_new_parts = any(not part.is_fitted for part in detector.parts.values())
    train = (
        has_new_parts
        or (requirements.diffusion is not None and detector.diffusion is None)
        or (requirements.classifier and detector.classifier is None)
    )
    count = settings.statistics or requirements.statistics
    if has_new_parts and settings.statistics is None:
        count = min(count, max(2, len(source) // 5))  # in a small set the parts need most images
    return split_source(
        source,
        alpha=alpha,
        statistics=count,
        train=train,
        seed=settings.seed,
        exclude=detector.trained_on,
        groups=settings.groups,
        limit_statistics=settings.statistics is None or has_new_parts,
        min_statistics=2,
        max_statistics=None if requirements.more_statistics else count,
    )
