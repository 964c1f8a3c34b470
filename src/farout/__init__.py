"""farout tells which images lie outside what a model has seen, with diffusion models."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ClassNoise": "farout.outliers.class_noise",
    "Classifier": "farout.classifiers.model",
    "Denoising": "farout.detectors.denoising",
    "DiffusionModel": "farout.diffusion.model",
    "DreamOOD": "farout.outliers.dream_ood",
    "FeatureDiffusion": "farout.features.diffusion",
    "FeatureExtractor": "farout.features.extractor",
    "NCIS": "farout.outliers.ncis",
    "NoiseSchedule": "farout.diffusion.schedule",
    "OutlierFolder": "farout.outliers.base",
    "Patches": "farout.detectors.patches",
    "Posthoc": "farout.detectors.posthoc",
    "Preprocessing": "farout.images.preprocessing",
    "Prompts": "farout.diffusion.prompts",
    "Reconstruction": "farout.detectors.reconstruction",
    "SDEdit": "farout.outliers.sdedit",
    "SONA": "farout.outliers.sona",
    "Scores": "farout.detectors.base",
    "Semantic": "farout.detectors.semantic",
    "load": "farout.detectors.base",
    "open_source": "farout.images.sources",
    "read_outliers": "farout.outliers.base",
    "reconstruct": "farout.outliers.reconstruct",
    "train_classifier": "farout.classifiers.train",
    "train_diffusion": "farout.diffusion.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported from their rooms on first use, so that `import farout` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'farout' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
