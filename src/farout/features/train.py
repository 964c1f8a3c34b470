"""Training of a feature denoiser on extracted features."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import LevelSampling, Objective, denoising_loss
from farout.diffusion.schedule import NoiseSchedule
from farout.features.encoding import FeatureEncoding
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.training.checkpoints import checkpoint_weights, step_folder
from farout.training.loop import Step, TrainingConfig, train

__all__ = ["train_features"]


def train_features(
    features: Tensor,
    hashes: Collection[str],
    *,
    backbone: str,
    encoding: FeatureEncoding,
    network: Mapping[str, Any],
    training: TrainingConfig,
    levels: LevelSampling = "uniform",
    first_step: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    fingerprint: str = "",
) -> FeatureDiffusion:
    """Trains a denoiser on features (n, c) of normal images, with the schedule of the paper.

    Args:
        features: one row per image (or position), float32.
        hashes: content hashes of the images.
        backbone: content hash of their extractor.
        encoding: maps features to the denoiser's space; its statistics are fitted here.
        network: arguments of `FeatureDenoiser` other than the width.
        training: settings of the training loop.
        levels: distribution of noise levels in training.
        first_step: also keep the denoiser after this step, for the likelihood-regret score.
        out: folder of the checkpoints; None: none are kept.
        resume: continue from the last checkpoint in `out`.
        fingerprint: identifies the images or positions of the features; a resumed run requires the same fingerprint,
            backbone, encoding, network and levels.

    Raises FaroutError for features with NaN; StoreError for a resume with other features or settings.
    """
    _check_finite(features)
    fitted = encoding.fit(features)
    torch.manual_seed(training.seed)
    denoiser = FeatureDenoiser(fitted.width, **network)
    model = FeatureDiffusion(denoiser, fitted, paper_schedule(), backbone, trained_on=hashes)
    # networks of one shape can be trained on features of another backbone or with another encoding
    run_fingerprint = (
        f"{fingerprint} {backbone} {encoding.standardize} {encoding.summaries} {sorted(network.items())} {levels}"
    )
    if first_step is not None:
        training = replace(training, keep=(*training.keep, first_step))
    with ExitStack() as exits:
        folder = out or Path(exits.enter_context(TemporaryDirectory()))
        step, data = _training_step(model.schedule, Objective(levels)), TensorDataset(fitted(features))
        result = train(denoiser, step, data, training, out=folder, resume=resume, fingerprint=run_fingerprint)
        if first_step is not None:
            model.first = FeatureDenoiser(fitted.width, **network).to(model.device).eval()
            model.first.load_state_dict(checkpoint_weights(step_folder(folder, first_step)))
    model.provenance = {
        "data_fingerprint": fingerprint,
        "features": len(features),
        "steps": result.steps,
        "loss": result.losses.get("loss"),
        "seed": training.seed,
        "training": asdict(training),
    }
    return model


def _check_finite(features: Tensor) -> None:
    count = int((~torch.isfinite(features)).any(1).sum())
    if count:
        raise FaroutError(f"{count} of {len(features)} rows of features are not finite; the weights may be damaged")


def _training_step(schedule: NoiseSchedule, objective: Objective) -> Step:
    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": denoising_loss(NetworkDenoiser(network, schedule, "sample"), batch[0], generator, objective)}

    return step
