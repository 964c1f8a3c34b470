"""Commands that train networks other than diffusion models."""

from __future__ import annotations

from typing import Literal

from farout.classifiers.model import Classifier
from farout.classifiers.train import ClassifierConfig
from farout.classifiers.train import train_classifier as _train_classifier
from farout.training_config import TrainingConfig

__all__ = ["train_classifier"]


def train_classifier(
    source: str,
    *,
    out: str,
    model: ClassifierConfig,
    training: TrainingConfig,
    weights: str | None = None,
    keep_weights: bool = False,
    limit: int | None = None,
    alpha: float = 0.05,
    statistics: int = 400,
    groups: Literal["none", "folder"] = "none",
    policy: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    resume: bool = False,
) -> Classifier:
    """Train a classifier on labelled images.

    Args:
        source: labelled images: a set's name, a folder of one folder per class, a table, or hf://owner/name:split.
        out: folder of the classifier.
        model: what is trained.
        training: how it is trained.
        weights: a file of weights to start from, such as an OpenOOD checkpoint.
        keep_weights: train nothing, keep the given weights as they are.
        limit: use a seeded sample of this many images.
        alpha: the false-alarm rate that a later calibration wants images for.
        statistics: images held out for a later fit's statistics.
        groups: keep images of one folder together in one part.
        policy: what becomes of an unreadable image: raise, or skip.
        seed: seed of sample, split, weights and augmentation.
        resume: go on from the last checkpoint.
    """
    return _train_classifier(
        source,
        out,
        model=model,
        training=training,
        weights=weights,
        keep_weights=keep_weights,
        limit=limit,
        alpha=alpha,
        statistics=statistics,
        groups=groups,
        policy=policy,
        seed=seed,
        resume=resume,
    )
