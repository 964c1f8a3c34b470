"""The main job on the built-in sample: fit, score, rate; features first, then images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from farout.core.errors import FaroutError
from farout.detectors.base import Detector
from farout.detectors.reconstruction import Reconstruction
from farout.detectors.semantic import Semantic
from farout.diffusion.config import PRESETS
from farout.evaluation.evaluate import evaluate_detector
from farout.training.config import TrainingConfig

__all__ = ["ID", "OOD", "TRAIN", "demo"]

TRAIN, ID = "sample_fashion:train", "sample_fashion:test"
OOD = ("sample_digits:test", "sample_fashion:test@vflip", "sample_fashion:test@hflip")


def demo(out: str | Path, *, steps: int, limit: int, images: int | None, seed: int) -> Iterator[pd.DataFrame]:
    """Fits two detectors to the FashionMNIST sample and rates them against MNIST digits and flipped images: `semantic`
    on 1,000 images, then `reconstruction`, which trains a tiny diffusion model of images.

    Writes `semantic/` and `reconstruction/`, each with `detector/` and `results/`, below `out`, and gives the table of
    each as soon as it is there.

    Args:
        out: a folder; what an earlier demo wrote there is replaced.
        steps: training steps of the diffusion model of images.
        limit: images scored of each set.
        images: images of the sample that the detectors are fitted to; None: 1,000.
        seed: seed of everything.
    """
    if limit < 1:
        raise FaroutError(f"limit must be at least 1, got {limit}")
    training = replace(TrainingConfig(**PRESETS["tiny"]["training"]), steps=steps, batch_size=32)
    few = 1000 if images is None else images
    fewer = {"limit": few, "seed": seed, "statistics": min(200, few // 4)}
    semantic = Semantic(updates=200).fit(TRAIN, **fewer)
    yield _rated(semantic, Path(out) / "semantic", limit)
    reconstruction = Reconstruction().fit(TRAIN, training=training, **fewer)
    yield _rated(reconstruction, Path(out) / "reconstruction", limit)


def _rated(detector: Detector, out: Path, limit: int) -> pd.DataFrame:
    detector.save(out / "detector")
    shutil.rmtree(out / "results", ignore_errors=True)
    return evaluate_detector(detector, ID, OOD, out / "results", limit=limit)
