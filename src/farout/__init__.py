"""farout tells which images lie outside what a model has seen, with diffusion models."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ClassNoise": "farout.synthesis.class_noise",
    "Classifier": "farout.classifiers.model",
    "Denoising": "farout.detectors.denoising",
    "DiffusionModel": "farout.diffusion.model",
    "DreamOOD": "farout.synthesis.dream_ood",
    "FeatureDiffusion": "farout.features.feature_diffusion",
    "FeatureExtractor": "farout.features.extractor",
    "NCIS": "farout.synthesis.ncis",
    "NoiseSchedule": "farout.diffusion.schedule",
    "OutlierFolder": "farout.synthesis.base",
    "Patches": "farout.detectors.patches",
    "Posthoc": "farout.detectors.posthoc",
    "Preprocessing": "farout.data.preprocessing",
    "Prompts": "farout.diffusion.conditioning.prompts",
    "Reconstruction": "farout.detectors.reconstruction",
    "SDEdit": "farout.synthesis.editing.sdedit",
    "SONA": "farout.synthesis.editing.sona",
    "Scores": "farout.detectors.base",
    "Semantic": "farout.detectors.semantic",
    "load": "farout.detectors.base",
    "open_source": "farout.data.sources",
    "read_outliers": "farout.synthesis.base",
    "reconstruct": "farout.synthesis.reconstruct",
    "train_classifier": "farout.classifiers.train",
    "train_diffusion": "farout.diffusion.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported from their rooms on first use, so that `import farout` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'farout' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
