"""Training of denoisers on extracted features."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
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
from farout.diffusion.empirical import measure_neighbor_distances
from farout.diffusion.losses import LevelSampling, Objective, denoising_loss
from farout.diffusion.schedule import NoiseSchedule
from farout.features.densities import Mahalanobis, PrincipalAxes
from farout.features.encoding import FeatureEncoding
from farout.features.feature_denoiser import FeatureDenoiser, initialize_with_zeros
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.features.residual_denoiser import ResidualDenoiser, ResidualNetwork
from farout.training.checkpoints import checkpoint_weights, step_folder
from farout.training.loop import Step, TrainingConfig, train

__all__ = ["train_features", "train_residual"]

_LOWEST_SIGMA, _HIGHEST_SIGMA = 0.1, 3.0
"""Range of noise levels in the training of a residual denoiser, where the vectors have a mean variance of 1."""
_VALIDATION_SHARE, _MAX_VALIDATION = 0.1, 1000
"""Share of the images that decide when the training of a residual denoiser ends, and the most images."""


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


def train_residual(
    features: Tensor,
    hashes: Sequence[str],
    *,
    backbone: str,
    encoding: FeatureEncoding,
    whiten: bool,
    network: Mapping[str, Any],
    training: TrainingConfig,
    out: Path | None = None,
    resume: bool = False,
    fingerprint: str = "",
) -> FeatureDiffusion:
    """Train the residual of a Gaussian's exact denoiser on features (n, c) of normal images, n >= 2.

    A tenth of the images (at most 1,000), chosen by their content hash, is not trained on: its loss decides which
    update is kept and when the training ends. If no update is better than the Gaussian alone, the residual is zero.

    Args:
        features: one row per image, float32.
        hashes: content hashes of the images, in the same order.
        backbone: content hash of their extractor.
        encoding: maps features to vectors; its statistics are fitted here.
        whiten: denoise in coordinates of variance 1, instead of principal axes with their own variances.
        network: arguments of `ResidualNetwork` other than the width.
        training: settings of the training loop.
        out: folder of the checkpoints; None: none are kept.
        resume: continue from the last checkpoint in `out`.
        fingerprint: identifies the images; a resumed run requires the same, and the same backbone, encoding and
            network.

    Raises FaroutError for features with NaN; StoreError for a resume with other features or settings.
    """
    _check_finite(features)
    fitted = encoding.fit(features)
    vectors = fitted(features)
    held_out = min(_MAX_VALIDATION, int(_VALIDATION_SHARE * len(vectors)))
    ranks = [hashlib.sha256(f"{training.seed} {content}".encode()).digest() for content in hashes]
    by_hash = sorted(range(len(vectors)), key=ranks.__getitem__)
    validation, rest = vectors[by_hash[:held_out]], vectors[sorted(by_hash[held_out:])]
    axes = PrincipalAxes.fit(rest.double().numpy(), whiten=whiten)
    torch.manual_seed(training.seed)
    residual = ResidualNetwork(fitted.width, **network)
    model = FeatureDiffusion(
        residual,
        fitted,
        None,
        backbone,
        axes=axes,
        vectors=vectors,
        neighbor_distances=measure_neighbor_distances(vectors),
        trained_on=hashes,
    )
    settings = f"{encoding.standardize} {encoding.summaries} {sorted(network.items())} residual whiten={whiten}"
    variances = torch.from_numpy(axes.variances)

    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        denoiser = ResidualDenoiser(network, variances)
        return {"loss": denoiser.loss(batch[0], generator, _LOWEST_SIGMA, _HIGHEST_SIGMA)}

    def to_coordinates(x: Tensor) -> Tensor:
        return torch.from_numpy(axes.transform(x.double().numpy())).float()

    steps, kept_step, loss = 0, 0, None
    if held_out:  # from fewer than ten images nothing more than the Gaussian is learned
        held_out_coordinates = to_coordinates(validation)
        result = train(
            residual,
            step,
            TensorDataset(to_coordinates(rest)),
            training,
            out=out,
            validation=TensorDataset(held_out_coordinates),
            resume=resume,
            fingerprint=f"{fingerprint} {backbone} {settings}",
        )
        steps, kept_step = result.steps, result.chosen_step
        loss, untrained = _compare_with_untrained(residual, held_out_coordinates, variances)
        if not loss < untrained:  # too few images to learn more than their mean and covariance, or NaN
            loss, kept_step = untrained, 0
            initialize_with_zeros(residual.leave[-1])
    model.gaussian = Mahalanobis.fit(vectors.double().numpy())
    model.provenance = {
        "data_fingerprint": fingerprint,
        "features": len(features),
        "validation": held_out,
        "steps": steps,
        "kept_step": kept_step,
        "loss": loss,
        "seed": training.seed,
        "training": asdict(training),
    }
    return model


def _compare_with_untrained(network: ResidualNetwork, x: Tensor, variances: Tensor) -> tuple[float, float]:
    """Losses of the trained network and of F = 0 on the same noised vectors."""
    untrained = copy.deepcopy(network)
    initialize_with_zeros(untrained.leave[-1])
    x, losses = x.to(next(network.parameters()).device), []
    for each in (network, untrained):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        with torch.no_grad():
            denoiser = ResidualDenoiser(each, variances)
            parts = [denoiser.loss(x, generator, _LOWEST_SIGMA, _HIGHEST_SIGMA) for generator in generators]
        losses.append(float(torch.stack(parts).mean()))
    return losses[0], losses[1]


def _check_finite(features: Tensor) -> None:
    count = int((~torch.isfinite(features)).any(1).sum())
    if count:
        raise FaroutError(f"{count} of {len(features)} rows of features are not finite; the weights may be damaged")


def _training_step(schedule: NoiseSchedule, objective: Objective) -> Step:
    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": denoising_loss(NetworkDenoiser(network, schedule, "sample"), batch[0], generator, objective)}

    return step
