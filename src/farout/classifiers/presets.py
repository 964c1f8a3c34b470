"""Presets of the settings of classifiers."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

_SGD: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "warmup": 0,
    "final_learning_rate": 1e-6,
    "ema": None,
    "clip": None,
}

_TINY: dict[str, Any] = {"network": "wrn16_1", "crop_padding": 2, "flip": False}
_IMAGENET: dict[str, Any] = {
    "stem": "imagenet",
    "size": 224,
    "protocol": "direct",
    "resized_crop": True,
    "flip": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": _TINY,
        "training": {**_SGD, "steps": 2000, "batch_size": 128, "warmup": 100},
    },
    "openood": {
        "model": {"network": "resnet18", "crop_padding": 4, "flip": True},
        "training": {**_SGD, "steps": 39100, "batch_size": 128},
    },
    "ncis_tiny": {
        "model": _TINY,
        "exposure": {"loss": "energy", "weight": 1.0, "resize": "both"},
        "training": {**_SGD, "steps": 2000, "batch_size": 128, "warmup": 100},
    },
    "ncis_cifar100": {
        "model": {
            "network": "resnet34",
            "crop_padding": 4,
            "flip": True,
            "mean": (0.4914, 0.4824, 0.4467),
            "std": (0.2471, 0.2435, 0.2616),
        },
        "exposure": {"loss": "energy", "weight": 1.0, "limit": 6400, "resize": "both"},
        "training": {**_SGD, "steps": 49000, "batch_size": 256},
    },
    "ncis_imagenet100": {
        "model": {"network": "resnet34", **_IMAGENET},
        "exposure": {"loss": "energy", "weight": 1.0, "hidden": 512},
        "training": {**_SGD, "steps": 32500, "batch_size": 80},
    },
    "sona": {
        "model": {"network": "resnet18", **_IMAGENET},
        "exposure": {
            "loss": "sona",
            "weight": 0.5,
            "mutual_information_weight": 0.7,
            "resize": "bilinear",
            "reconstruction_fraction": 0.5,
        },
        "training": {**_SGD, "steps": 406250, "batch_size": 128},
    },
    "sona_tiny": {
        "model": _TINY,
        "exposure": {"loss": "sona", "weight": 0.5, "mutual_information_weight": 0.7, "resize": "both"},
        "training": {**_SGD, "steps": 2000, "batch_size": 128, "warmup": 100},
    },
    "vos": {
        "model": {"network": "wrn40_2", "crop_padding": 4, "flip": True},
        "exposure": {
            "loss": "vos",
            "weight": 0.1,
            "start_fraction": 0.4,
            "queue": 1000,
            "draws": 10000,
            "virtual_per_class": 1,
        },
        "training": {**_SGD, "steps": 39100, "batch_size": 128},
    },
}
"""`tiny` for CPUs, without mirroring, which would make other digits of digits; `openood`: the recipe of OpenOOD's
classifiers (SGD with Nesterov momentum 0.9, 100 epochs of CIFAR's 391 updates at batch 128, cosine to 1e-6).

With outliers: `ncis_tiny` is `tiny` with the energy regulariser, for CPUs. `ncis_cifar100` is the released recipe of
NCIS: 250 epochs of 196 updates, 6,400 outliers, the mean and deviation of CIFAR-10. `ncis_imagenet100` is 20 epochs of
1,625 updates with the head of two layers; the released code keeps the `small` stem at 224 pixels, 16 times the work
(`--model.stem small`), and does not say whether its 20 epochs start from trained weights. `sona` is SONA's for
ImageNet-200: 100 passes over 260,000 images and as many reconstructions of them (`--reconstructions`), from scratch;
`sona_tiny` is `tiny` with its loss. `vos`, which needs no outliers, is the recipe of VOS for CIFAR-10: 100 epochs, of
which the first 40 learn the classes only; its network has a dropout of 0.3, ours none."""
