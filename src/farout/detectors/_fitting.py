"""How a detector is fitted: splits, the networks that it lacks, statistics, calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from farout.detectors.base import Detector, Runtime
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import PRESETS, DiffusionConfig, train_model
from farout.errors import FaroutError
from farout.images.preprocessing import Preprocessing, Protocol
from farout.images.sources import ImageSource, open_source
from farout.images.splits import Split, split
from farout.training import TrainingConfig

__all__ = ["FitSettings", "fit", "recalibrate"]

_log = logging.getLogger(__name__)
D = TypeVar("D", bound=Detector)
_ANY = 1 << 20


@dataclass(frozen=True)
class FitSettings:
    """How a fit is done.

    Args:
        limit: use a seeded sample of this many images.
        alpha: false-alarm rate of `is_ood`; calibration gets max(20 %, ceil(1/alpha) - 1) images.
        seed: seed of sample, split, weights and noise.
        groups: keep images of one folder together in one part, or a group name per image.
        statistics: images for the statistics; None: what the method wants.
        protocol: how images are brought to size; None: as the diffusion model has it.
        network: what is trained where a diffusion model is lacking.
        training: how it is trained.
        checkpoints: folder of the training's checkpoints; None: none are kept.
        resume: go on from the last checkpoint there.
        runtime: how networks are run.
    """

    limit: int | None = None
    alpha: float = 0.05
    seed: int = 0
    groups: Literal["none", "folder"] | Sequence[str] = "none"
    statistics: int | None = None
    protocol: Protocol | None = None
    network: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(**PRESETS["tiny"]["model"]))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(**PRESETS["tiny"]["training"]))
    checkpoints: Path | None = None
    resume: bool = False
    runtime: Runtime = field(default_factory=Runtime)


def fit(detector: D, images: Any, diffusion: Any, classifier: Any, settings: FitSettings) -> D:
    """See `Detector.fit`."""
    if not 0 < settings.alpha < 1:
        raise FaroutError(f"alpha is a false-alarm rate between 0 and 1, got {settings.alpha}")
    if classifier is not None and "classifier" not in detector.needs:
        raise FaroutError(f"{type(detector).__name__} uses no classifier; leave it out")
    source = open_source(images, limit=settings.limit, seed=settings.seed)
    given = _given(detector, diffusion)
    parts = _split(detector, source, given, settings)
    model = given if given is not None or "diffusion" not in detector.needs else _train(source, parts, settings)
    detector.alpha, detector.seed = settings.alpha, settings.seed
    detector.preprocessing = _preprocessing(source, model, settings)
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
    detector.set_calibration(calibration)
    detector.provenance = _provenance(source, parts, settings)
    return detector


def _given(detector: Detector, diffusion: Any) -> DiffusionModel | None:
    if diffusion is None:
        return None
    if "diffusion" not in detector.needs:
        raise FaroutError(f"{type(detector).__name__} uses no diffusion model; leave it out")
    return diffusion if isinstance(diffusion, DiffusionModel) else DiffusionModel.load(diffusion)


def _split(detector: Detector, source: ImageSource, given: DiffusionModel | None, settings: FitSettings) -> Split:
    parts = split(
        source,
        alpha=settings.alpha,
        statistics=settings.statistics or detector.statistics_minimum,
        train="diffusion" in detector.needs and given is None,
        seed=settings.seed,
        exclude=given.trained_on if given is not None else (),
        groups=settings.groups,
    )
    if len(parts.statistics) < 2:
        taken, left = len(parts.calibration), len(parts.statistics)
        counts = f"calibration at alpha {settings.alpha} takes {taken}, the statistics get {left}"
        raise FaroutError(f"{len(source)} images are too few: {counts}; give more images or a larger alpha")
    wanted = settings.statistics or detector.statistics_minimum
    if detector.statistics_suffice and len(parts.statistics) > wanted:
        # by hash, so that the choice does not depend on the source's order
        some = sorted(parts.statistics, key=source.content_hash)[:wanted]
        parts = replace(parts, statistics=tuple(sorted(some)))
    return parts


def _train(source: ImageSource, parts: Split, settings: FitSettings) -> DiffusionModel:
    config = settings.network
    if settings.protocol is not None:
        config = replace(config, protocol=settings.protocol)
    torch.manual_seed(settings.seed)
    fresh = config.build(config.preprocess(source))
    part = source.subset(parts.training)
    training = _training(settings)
    return train_model(part, fresh, training, levels=config.levels, out=settings.checkpoints, resume=settings.resume)


def _training(settings: FitSettings) -> TrainingConfig:
    """The training's settings with the fit's seed, and its device and precision where the training names none."""
    given, runtime = settings.training, settings.runtime
    device = runtime.device if given.device == "auto" else given.device
    precision = runtime.precision if given.precision == "auto" else given.precision
    return replace(given, seed=settings.seed, device=device, precision=precision)


def _preprocessing(source: ImageSource, model: DiffusionModel | None, settings: FitSettings) -> Preprocessing:
    """The model's, with the native size of the images that this fit calls in-distribution."""
    if model is None:
        return Preprocessing.for_source(source, protocol=settings.protocol or "native")
    protocol = settings.protocol or model.preprocessing.protocol
    own = Preprocessing.for_source(source, crop=model.preprocessing.crop, largest=_ANY)
    return replace(model.preprocessing, native=own.native, protocol=protocol)


def _provenance(source: ImageSource, parts: Split, settings: FitSettings) -> dict[str, Any]:
    return {
        "source": source.name,
        "limit": settings.limit,
        "data_fingerprint": source.fingerprint(),
        "images": {
            "training": len(parts.training),
            "statistics": len(parts.statistics),
            "calibration": len(parts.calibration),
        },
        "groups": settings.groups if isinstance(settings.groups, str) else "given",
    }


def recalibrate(detector: D, images: Any, *, limit: int | None = None, alpha: float | None = None) -> D:
    """Rests the p-values of a fitted detector on other good images; nothing is trained.

    Images that the networks or the statistics have seen are left out. Raises FaroutError when none is left.
    """
    detector.check_fitted()
    source = open_source(images, limit=limit, seed=detector.seed)
    seen = detector.statistics_hashes | (detector.diffusion.trained_on if detector.diffusion else frozenset())
    fresh = [i for i in range(len(source)) if source.content_hash(i) not in seen]
    if not fresh:
        raise FaroutError(f"all {len(source)} images were used to fit this detector; calibrate on others")
    if len(fresh) < len(source):
        _log.warning(
            "%d of %d images were used to fit this detector and are left out", len(source) - len(fresh), len(source)
        )
    detector.alpha = alpha if alpha is not None else detector.alpha
    detector.set_calibration(detector.measure_all(source.subset(fresh), "measuring calibration images"))
    detector.provenance["calibration_source"] = source.name
    return detector
