"""Recipes of classifiers by name."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"network": "wrn16_1", "crop_padding": 2, "flip": False},
        "training": {
            "steps": 2000,
            "batch_size": 128,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "warmup": 100,
            "final_learning_rate": 1e-6,
            "ema": None,
            "clip": None,
        },
    },
    "openood": {
        "model": {"network": "resnet18", "crop_padding": 4, "flip": True},
        "training": {
            "steps": 39100,
            "batch_size": 128,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "warmup": 0,
            "final_learning_rate": 1e-6,
            "ema": None,
            "clip": None,
        },
    },
}
"""`tiny` for CPUs, without mirroring, which would make other digits of digits; `openood`: the recipe of OpenOOD's
classifiers (SGD with Nesterov momentum 0.9, 100 epochs of CIFAR's 391 updates at batch 128, cosine to 1e-6)."""
