"""Configuration of a diffusion model and of its training, and named presets of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from farout.core.errors import FaroutError
from farout.data.classes import class_names_of
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing
from farout.diffusion.denoiser import Prediction
from farout.diffusion.losses import ErrorKind, LevelSampling, Objective, Reduction
from farout.diffusion.schedule import ScheduleKind
from farout.diffusion.unets import NetworkName

__all__ = ["PRESETS", "DiffusionConfig"]


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion model. Raises FaroutError for a scale that is not positive.

    Args:
        network: U-Net: `tiny` (1.1 M parameters), `compact` (2.6 M) or `mini` (1.1 M) for patches, `small` (17.7
            M), `paper` (171 M), `cifar` (35.75 M), `iddpm` (52.5 M), or `tokens` (1.4 M, classes by cross-attention).
        patch: side of the square patches of pixels that become channels of one position of the network's input (space
            to depth); 1: none.
        classes: train a class-conditional model on the source's labels.
        label_dropout: probability of dropping a label in training, which guidance needs; class-conditional models only.
        dropout: dropout rate of the network; default: the network's own.
        prediction: what the network predicts: `epsilon` (the noise), `v_prediction`, or `sample` (the clean image).
        schedule: noise schedule; `scaled_linear` is the reconstruction paper's.
        beta_start: first beta of the noise schedule (not used by `cosine`).
        beta_end: last beta of the noise schedule (not used by `cosine`).
        snr_shift: factor on the signal-to-noise ratio of every level of the schedule.
        levels: distribution of noise levels in training: `uniform` in t, `low_noise` (more low t), `antithetic`
            (mirrored pairs of t) or `log_normal` (log sigma from a normal distribution, Karras et al. 2022).
        error: loss: `square` or `absolute` error.
        reduction: `mean` or `sum` of the loss over channels and pixels.
        flip: flip images horizontally with probability 0.5 in training.
        b_scale: factor on the images before noise is added.
        data_range: `symmetric`: images in [-1, 1]; `unit`: images in [0, 1] (the reconstruction paper).
        scaling: `fixed`, or `minmax`: scale each image to [0, 1] by its own minimum and maximum (the reconstruction
            paper).
        size: side of the network's input in pixels; default: that of the training images, at most 64.
        channels: 1 (gray) or 3 (RGB); default: as the training images.
        crop: crop the central square of this many pixels first; default: no crop.
        protocol: how images are resized: `native` (to the native size, then to the network's), `direct` (straight to
            the network's size) or `common` (native size, then one JPEG encoding).
        reduced_decoding: decode images of more than 512 x 512 pixels in a smaller size where the network's size is at
            most half of theirs, which is many times faster for photographs, and identify them by the hash of their
            files.
    """

    network: NetworkName = "tiny"
    patch: int = 1
    classes: bool = False
    label_dropout: float = 0.1
    dropout: float | None = None
    prediction: Prediction = "epsilon"
    schedule: ScheduleKind = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    snr_shift: float = 1.0
    levels: LevelSampling = "uniform"
    error: ErrorKind = "square"
    reduction: Reduction = "mean"
    flip: bool = False
    b_scale: float = 1.0
    data_range: Literal["symmetric", "unit"] = "symmetric"
    scaling: Literal["fixed", "minmax"] = "fixed"
    size: int | None = None
    channels: int | None = None
    crop: int | None = None
    protocol: Literal["native", "direct", "common"] = "native"
    reduced_decoding: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.b_scale < math.inf:
            raise FaroutError(f"b_scale must be a positive number, got {self.b_scale}")
        if not 1 <= self.patch <= 64:
            raise FaroutError(f"patch must be 1 to 64 pixels, got {self.patch}")

    def preprocess(self, source: ImageSource) -> Preprocessing:
        """The preprocessing that suits `source`."""
        return Preprocessing.for_source(
            source,
            size=self.size,
            channels=self.channels,
            protocol=self.protocol,
            crop=self.crop,
            scaling=self.scaling,
        )

    @property
    def objective(self) -> Objective:
        """Settings of the training loss; raises FaroutError for values out of range."""
        dropout = self.label_dropout if self.classes else 0.0
        return Objective(self.levels, self.error, self.reduction, dropout, self.flip)

    def class_names(self, source: ImageSource) -> tuple[str, ...] | None:
        """Names of the training classes, or None; raises SourceError for a source without labels or with one class."""
        return class_names_of(source) if self.classes else None


_LINEAR = {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_CIFAR: dict[str, Any] = {
    "steps": 160000,
    "batch_size": 128,
    "optimizer": "adamw",
    "learning_rate": 2e-4,
    "warmup": 5000,
    "decay": "constant",
    "ema": 0.9999,
    "clip": 1.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"network": "compact", "patch": 2, "prediction": "v_prediction", "levels": "log_normal"},
        "training": {"steps": 2000, "batch_size": 64, "learning_rate": 1e-3, "ema": 0.995},
    },
    "small": {
        "model": {"network": "small"},
        "training": {"steps": 20000, "batch_size": 256, "learning_rate": 2e-4, "ema": 0.9995},
    },
    "paper": {
        "model": {"network": "paper", "data_range": "unit", "scaling": "minmax"},
        "training": {
            "steps": 95000,
            "batch_size": 180,
            "optimizer": "adam",
            "learning_rate": 2.5e-5,
            "warmup": 0,
            "decay": "constant",
            "ema": None,
            "clip": None,
        },
    },
    "classes": {
        "model": {"network": "tiny", "classes": True, **_LINEAR},
        "training": {"steps": 4000, "batch_size": 64, "learning_rate": 1e-3, "ema": 0.998},
    },
    "tokens": {
        "model": {"network": "tokens", "classes": True, **_LINEAR},
        "training": {"steps": 4000, "batch_size": 64, "learning_rate": 1e-3, "ema": 0.998},
    },
    "cifar": {
        "model": {
            "network": "cifar",
            "classes": True,
            "levels": "antithetic",
            "reduction": "sum",
            "flip": True,
            **_LINEAR,
        },
        "training": _CIFAR,
    },
    "iddpm": {
        "model": {
            "network": "iddpm",
            "classes": True,
            "schedule": "cosine",
            "levels": "antithetic",
            "reduction": "sum",
            "flip": True,
        },
        "training": {**_CIFAR, "batch_size": 256},
    },
}
"""`tiny` for CPUs; `small`: the size of the reconstruction paper's released code, with a shorter training of ours;
`paper`: its published setting (171 M parameters, Adam 2.5e-5, 300 epochs of 57,000 images at batch 180, no EMA).

With classes: `classes` and `tokens` for CPUs, conditioned by class vectors and by cross-attention; `cifar`: that of the
denoising paper (Liu et al. 2022; 35.75 M parameters, `--no-model.classes` for its unconditional one);
`iddpm`: its variant with the network and the cosine schedule of Nichol & Dhariwal 2021."""
