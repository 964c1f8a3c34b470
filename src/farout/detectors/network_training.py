"""Training of the diffusion model or the classifier that a detector needs and was not given.

Imported by a fit only when a network is missing, since these modules load diffusers and scikit-learn.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import Exposure, ExposureData
from farout.classifiers.presets import PRESETS as CLASSIFIER_PRESETS
from farout.classifiers.train import train_on_source
from farout.core.errors import FaroutError
from farout.data.classes import class_names_of
from farout.data.image_source import ImageSource
from farout.detectors.fit_settings import FitSettings
from farout.detectors.interface import DetectorInterface
from farout.diffusion.config import PRESETS as DIFFUSION_PRESETS
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.model import DiffusionModel
from farout.diffusion.train import build_model, train_model
from farout.training.config import TrainingConfig

__all__ = ["check_networks", "train_missing_classifier", "train_missing_diffusion"]


def train_missing_diffusion(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> DiffusionModel:
    """Trains a diffusion model of images with `settings.network` and `settings.training`, by default the preset of the
    method.
    """
    config = _diffusion_config(detector, settings)
    torch.manual_seed(settings.seed)
    model = build_model(config, config.preprocess(images), class_names=config.class_names(images))
    preset = DIFFUSION_PRESETS[detector.network_preset]["training"]
    return train_model(
        images,
        model,
        settings.resolve_training(settings.training or TrainingConfig(**preset)),
        objective=config.objective,
        out=settings.checkpoints,
        resume=settings.resume,
    )


def train_missing_classifier(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> Classifier:
    """Trains a classifier with the settings of a preset; for other settings, use `farout train classifier` first."""
    training = TrainingConfig(**CLASSIFIER_PRESETS[settings.classifier_preset]["training"])
    if settings.classifier_steps is not None:
        training = replace(training, steps=settings.classifier_steps)
    return train_on_source(
        images,
        _classifier_config(detector, settings),
        settings.resolve_training(training),
        out=settings.checkpoints / "classifier" if settings.checkpoints is not None else None,
        resume=settings.resume,
        exposure_data=ExposureData(_exposure(settings)),
    )


def check_networks(
    detector: DetectorInterface, images: ImageSource, diffusion: DiffusionModel | None, settings: FitSettings
) -> None:
    """Calls the detector's own check before anything is trained, with untrained networks in place of missing ones."""
    classifier = detector.classifier
    if diffusion is None and "diffusion" in detector.needs:
        config = _diffusion_config(detector, settings)
        diffusion = build_model(config, config.preprocess(images), class_names=config.class_names(images))
    if classifier is None and "classifier" in detector.needs:
        classifier = _classifier_config(detector, settings).build(images, class_names_of(images))
    detector.check(images, diffusion, classifier)


def _diffusion_config(detector: DetectorInterface, settings: FitSettings) -> DiffusionConfig:
    config = settings.network or DiffusionConfig(**DIFFUSION_PRESETS[detector.network_preset]["model"])
    if settings.protocol is not None:
        config = replace(config, protocol=settings.protocol)
    return detector.network_config(config)


def _classifier_config(detector: DetectorInterface, settings: FitSettings) -> ClassifierConfig:
    """The configuration of the preset, with the preprocessing of a diffusion model that is trained alongside."""
    if settings.classifier_preset not in CLASSIFIER_PRESETS:
        known = ", ".join(CLASSIFIER_PRESETS)
        raise FaroutError(f"there is no classifier preset {settings.classifier_preset!r}; expected one of {known}")
    _exposure(settings).resolved(has_outliers=False)
    config = ClassifierConfig(**CLASSIFIER_PRESETS[settings.classifier_preset]["model"])
    if "diffusion" in detector.needs:
        shared = _diffusion_config(detector, settings)
        names = ("size", "channels", "crop", "protocol")
        return replace(config, **{name: getattr(shared, name) for name in names})
    return config if settings.protocol is None else replace(config, protocol=settings.protocol)


def _exposure(settings: FitSettings) -> Exposure:
    return Exposure(**CLASSIFIER_PRESETS[settings.classifier_preset].get("exposure", {}))
