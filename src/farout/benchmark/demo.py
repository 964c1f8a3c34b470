"""`farout demo`: fit and evaluate two detectors on the built-in sample."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from farout.core.errors import FaroutError
from farout.core.names import expand_path
from farout.detectors.base import Detector
from farout.detectors.reconstruction import Reconstruction
from farout.detectors.semantic import Semantic
from farout.diffusion.config import PRESETS
from farout.evaluation.evaluate import evaluate
from farout.evaluation.results import Evaluation
from farout.training.config import TrainingConfig

__all__ = ["ID", "OOD", "TRAIN", "demo"]

TRAIN, ID = "sample_fashion:train", "sample_fashion:test"
OOD = ("sample_digits:test", "sample_fashion:test@vflip", "sample_fashion:test@hflip")


def demo(out: str | Path, *, steps: int, limit: int, images: int | None, seed: int) -> Iterator[Evaluation]:
    """Fit two detectors on the FashionMNIST sample and evaluate them on MNIST digits and flipped images.

    The first is `semantic`, the second `reconstruction`, which trains a tiny diffusion model of images. Writes
    `semantic/` and `reconstruction/`, each with `detector/` and `results/`, into `out`.

    Args:
        out: a folder; the results of an earlier demo are replaced.
        steps: number of training steps of the diffusion model of images.
        limit: number of images scored of each set.
        images: number of images of the sample that the detectors are fitted on; None: 1,000.
        seed: of all random numbers.

    Yields:
        The evaluation of each detector.
    """
    if limit < 1:
        raise FaroutError(f"limit must be at least 1, got {limit}")
    training = replace(TrainingConfig(**PRESETS["tiny"]["training"]), steps=steps, batch_size=32)
    count = 1000 if images is None else images
    settings: dict[str, Any] = {"limit": count, "seed": seed, "statistics": min(200, count // 4)}
    semantic = Semantic(updates=200).fit(TRAIN, **settings)
    yield _save_and_evaluate(semantic, expand_path(out) / "semantic", limit)
    reconstruction = Reconstruction().fit(TRAIN, training=training, **settings)
    yield _save_and_evaluate(reconstruction, expand_path(out) / "reconstruction", limit)


def _save_and_evaluate(detector: Detector, out: Path, limit: int) -> Evaluation:
    detector.save(out / "detector")
    shutil.rmtree(out / "results", ignore_errors=True)
    return evaluate(detector, ID, OOD, out / "results", limit=limit)
