"""The main job on the built-in sample: train, fit, score, rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from farout.detectors.reconstruction import Reconstruction
from farout.diffusion.train import PRESETS
from farout.evaluation.evaluate import evaluate_detector
from farout.training_config import TrainingConfig

__all__ = ["ID", "OOD", "demo"]

TRAIN, ID = "sample_fashion:train", "sample_fashion:test"
OOD = ("sample_digits:test", "sample_fashion:test@vflip", "sample_fashion:test@hflip")


def demo(out: str | Path, *, steps: int, limit: int, seed: int) -> pd.DataFrame:
    """Trains a tiny diffusion model on the FashionMNIST sample, fits the reconstruction detector, and rates it against
    MNIST digits and flipped images. Writes `detector/` and `results/` below `out`; a finished detector of the same
    settings is used again. Returns the table.
    """
    out = Path(out)
    training = replace(TrainingConfig(**PRESETS["tiny"]["training"]), steps=steps, seed=seed)
    detector = Reconstruction().fit(TRAIN, training=training, seed=seed, statistics=400)
    detector.save(out / "detector")
    return evaluate_detector(detector, ID, OOD, out / "results", limit=limit)
