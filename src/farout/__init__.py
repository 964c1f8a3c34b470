"""Out-of-distribution detection on images with diffusion models."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "AutoEncoder": "farout.detectors.autoencoder",
    "ClassNoise": "farout.synthesis.class_noise",
    "Classifier": "farout.classifiers.model",
    "ClassifierConfig": "farout.classifiers.config",
    "Denoising": "farout.detectors.denoising",
    "DiffPath": "farout.detectors.diffpath",
    "DiffusionConfig": "farout.diffusion.config",
    "DiffusionModel": "farout.diffusion.model",
    "DreamOOD": "farout.synthesis.dream_ood",
    "Ensemble": "farout.detectors.ensemble",
    "FeatureDiffusion": "farout.features.feature_diffusion",
    "FeatureExtractor": "farout.features.extractor",
    "FitSettings": "farout.detectors.fit_settings",
    "FolderWatcher": "farout.scoring.watch",
    "GMM": "farout.detectors.gmm",
    "ImageSource": "farout.data.image_source",
    "KNN": "farout.detectors.knn",
    "MSMA": "farout.detectors.msma",
    "Mahalanobis": "farout.detectors.mahalanobis",
    "Monitor": "farout.evaluation.monitoring",
    "NCIS": "farout.synthesis.ncis",
    "NoiseSchedule": "farout.diffusion.schedule",
    "OutlierFolder": "farout.synthesis.generated_folder",
    "PCA": "farout.detectors.pca",
    "Patches": "farout.detectors.patches",
    "Posthoc": "farout.detectors.posthoc",
    "Preprocessing": "farout.data.preprocessing",
    "Prompts": "farout.diffusion.conditioning.prompts",
    "Reconstruction": "farout.detectors.reconstruction",
    "Runtime": "farout.core.runtime",
    "SDEdit": "farout.synthesis.editing.sdedit",
    "SONA": "farout.synthesis.editing.sona",
    "Scorer": "farout.scoring.scorer",
    "Scores": "farout.detectors.results",
    "Semantic": "farout.detectors.semantic",
    "TrainingConfig": "farout.training.config",
    "evaluate": "farout.evaluation.evaluate",
    "load": "farout.detectors.base",
    "monitor_results": "farout.evaluation.monitored_results",
    "open_source": "farout.data.sources",
    "read_outliers": "farout.synthesis.generated_folder",
    "reconstruct": "farout.synthesis.reconstruct",
    "score_folder": "farout.scoring.folder",
    "train_classifier": "farout.classifiers.train",
    "train_diffusion": "farout.diffusion.train",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use, so that `import farout` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'farout' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)
