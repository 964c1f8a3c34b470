"""Training of the diffusion model or the classifier that a detector requires and was not given.

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
from farout.features.feature_diffusion import FeatureDiffusion
from farout.training.config import TrainingConfig

__all__ = ["check_with_untrained_networks", "train_classifier", "train_diffusion"]


def check_with_untrained_networks(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> None:
    """Let the method reject images, networks and settings; networks that are missing are built untrained."""
    diffusion, classifier = detector.diffusion, detector.classifier
    if diffusion is None and detector.requirements.diffusion == "images":
        config = _diffusion_config(detector, settings)
        diffusion = build_model(config, config.preprocess(images), class_names=config.class_names(images))
    if classifier is None and detector.requirements.classifier:
        classifier = _classifier_config(detector, settings).build(images, class_names_of(images))
    assert not isinstance(diffusion, FeatureDiffusion)
    detector.check_networks(images, diffusion, classifier)


def train_diffusion(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> DiffusionModel:
    """Train a diffusion model of images with the given settings, or those of the method's preset."""
    config = _diffusion_config(detector, settings)
    preset = DIFFUSION_PRESETS[detector.requirements.diffusion_preset]
    training = settings.resolve_training(settings.training or TrainingConfig(**preset["training"]))
    torch.manual_seed(settings.seed)
    return train_model(
        images,
        build_model(config, config.preprocess(images), class_names=config.class_names(images)),
        training,
        objective=config.objective,
        out=settings.checkpoints,
        resume=settings.resume,
    )


def train_classifier(detector: DetectorInterface, images: ImageSource, settings: FitSettings) -> Classifier:
    """Train a classifier by a preset; `farout train classifier` offers the other settings."""
    config = _classifier_config(detector, settings)
    training = TrainingConfig(**CLASSIFIER_PRESETS[settings.classifier_preset]["training"])
    if settings.classifier_steps is not None:
        training = replace(training, steps=settings.classifier_steps)
    return train_on_source(
        images,
        config,
        settings.resolve_training(training),
        out=settings.checkpoints / "classifier" if settings.checkpoints is not None else None,
        resume=settings.resume,
        exposure_data=ExposureData(_exposure(settings)),
    )


def _diffusion_config(detector: DetectorInterface, settings: FitSettings) -> DiffusionConfig:
    preset = DIFFUSION_PRESETS[detector.requirements.diffusion_preset]
    config = settings.diffusion_config or DiffusionConfig(**preset["model"])
    if settings.protocol is not None:
        config = replace(config, protocol=settings.protocol)
    return detector.configure_diffusion(config)


def _classifier_config(detector: DetectorInterface, settings: FitSettings) -> ClassifierConfig:
    """The preset's configuration; images are preprocessed like those of a diffusion model that is trained with it."""
    if settings.classifier_preset not in CLASSIFIER_PRESETS:
        known = ", ".join(CLASSIFIER_PRESETS)
        raise FaroutError(f"there is no classifier preset {settings.classifier_preset!r}; expected one of {known}")
    _exposure(settings).resolve_defaults(has_outliers=False)  # rejects presets that require outliers
    config = ClassifierConfig(**CLASSIFIER_PRESETS[settings.classifier_preset]["model"])
    if detector.requirements.diffusion == "images":
        diffusion = _diffusion_config(detector, settings)
        return replace(
            config,
            size=diffusion.size,
            channels=diffusion.channels,
            crop=diffusion.crop,
            protocol=diffusion.protocol,
        )
    return config if settings.protocol is None else replace(config, protocol=settings.protocol)


def _exposure(settings: FitSettings) -> Exposure:
    return Exposure(**CLASSIFIER_PRESETS[settings.classifier_preset].get("exposure", {}))
