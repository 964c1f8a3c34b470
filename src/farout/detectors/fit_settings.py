"""Settings of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from farout.core.runtime import Runtime
from farout.data.preprocessing import Protocol
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.diffusion.config import DiffusionConfig
from farout.training.config import TrainingConfig

__all__ = ["FitSettings"]


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Args:
        limit: use a seeded random sample of this many images; default: all.
        alpha: false-alarm rate: images with p-value <= alpha are flagged; calibration gets max(20 %, ceil(1/alpha) - 1)
            images.
        seed: seed of the sample, split, weights and noise.
        groups: images that stay in the same part of the split and count once for the p-values: `near_copies` (bursts,
            video frames, recompressed, shifted or mirrored images), `folder` (these, and all images of one folder or
            value of the column `group`), or `none` (equal images only); in Python also a group name per image.
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        statistics: number of images for the statistics; default: the method's own number.
        protocol: how images are resized: `native` (to the native size, then to the network's), `direct` (straight to
            the network's size) or `common` (native size, then one JPEG encoding); default: as the given diffusion
            model, else `native`.
        reduced_decoding: decode images of more than 512 x 512 pixels in a smaller size where the network's size is at
            most half of theirs, which is many times faster for photographs, and identify them by the hash of their
            files; given networks that were trained without it turn it off.
        diffusion_config: settings of the diffusion model that is trained if none is given; None: the method's preset.
        training: settings of that training; None: the method's preset.
        classifier_preset: preset of `farout train classifier` used if no classifier is given.
        classifier_steps: number of training steps of that classifier; default: the preset's.
        checkpoints: folder of the training checkpoints; default: OUT.training (in Python: no checkpoints).
        resume: continue training from the last checkpoint.
        runtime: how networks are run.
        reading: how image files are read.
    """

    limit: int | None = None
    alpha: float = 0.05
    seed: int = 0
    groups: Literal["near_copies", "folder", "none"] | Sequence[str] = "near_copies"
    policy: Literal["raise", "skip"] = "raise"
    statistics: int | None = None
    protocol: Protocol | None = None
    reduced_decoding: bool = True
    diffusion_config: DiffusionConfig | None = None
    training: TrainingConfig | None = None
    classifier_preset: str = "tiny"
    classifier_steps: int | None = None
    checkpoints: Path | None = None
    resume: bool = False
    runtime: Runtime = field(default_factory=Runtime)
    reading: ReadSettings = DEFAULT_READING

    def resolve_training(self, training: TrainingConfig) -> TrainingConfig:
        """Returns the training settings with the seed of the fit, and with its device and precision instead of
        `auto`.
        """
        device = self.runtime.device if training.device == "auto" else training.device
        precision = self.runtime.precision if training.precision == "auto" else training.precision
        return replace(training, seed=self.seed, device=device, precision=precision)
