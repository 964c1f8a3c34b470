"""The main job on the built-in sample: train, fit, score, rate."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd

from farout.detectors.reconstruction import Reconstruction
from farout.diffusion.train import PRESETS
from farout.evaluation.evaluate import evaluate_detector
from farout.training_config import TrainingConfig

__all__ = ["ID", "OOD", "TRAIN", "demo"]

TRAIN, ID = "sample_fashion:train", "sample_fashion:test"
OOD = ("sample_digits:test", "sample_fashion:test@vflip", "sample_fashion:test@hflip")


def demo(out: str | Path, *, steps: int, limit: int, images: int | None, seed: int) -> pd.DataFrame:
    """Trains a tiny diffusion model on the FashionMNIST sample, fits the reconstruction detector, and rates it against
    MNIST digits and flipped images. Writes `detector/` and `results/` below `out`. Returns the table.

    Args:
        out: a folder; what an earlier demo wrote there is replaced.
        steps: training steps.
        limit: images scored of each set.
        images: images of the sample that the detector is fitted to; None: all 4,000.
        seed: seed of everything.
    """
    out = Path(out)
    training = replace(TrainingConfig(**PRESETS["tiny"]["training"]), steps=steps, batch_size=32)
    statistics = 300 if images is None else min(300, images // 4)
    detector = Reconstruction().fit(TRAIN, limit=images, training=training, seed=seed, statistics=statistics)
    detector.save(out / "detector")
    shutil.rmtree(out / "results", ignore_errors=True)
    return evaluate_detector(detector, ID, OOD, out / "results", limit=limit)
