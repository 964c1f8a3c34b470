"""Training a diffusion model on an image source."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from farout import store
from farout.devices import first_process
from farout.diffusion.denoiser import NetworkDenoiser, Prediction
from farout.diffusion.losses import LevelSampling, denoising_loss
from farout.diffusion.model import KIND, DiffusionModel
from farout.diffusion.networks import NetworkName, build_network
from farout.diffusion.schedule import NoiseSchedule, ScheduleKind
from farout.errors import FaroutError
from farout.images.preprocessing import Preprocessing
from farout.images.sources import ImageSource, PreparedImages, open_source
from farout.images.splits import split
from farout.training import TrainingConfig, train

__all__ = ["PRESETS", "DiffusionConfig", "discard_checkpoints", "train_diffusion", "train_model"]


@dataclass(frozen=True)
class DiffusionConfig:
    """What is trained.

    Args:
        network: `tiny` (1.1 M parameters), `small` (17.7 M) or `paper` (171 M).
        prediction: what the network predicts.
        schedule, beta_start, beta_end, snr_shift: see `NoiseSchedule`; the defaults are the reconstruction paper's.
        levels: how training samples levels: `uniform`, or `low_noise`.
        b_scale: factor on the data before noising.
        data_range: `symmetric` maps images to [-1, 1], `unit` leaves them in [0, 1] (the paper's).
        value_range: `fixed`, or `minmax` per image (the paper's).
        size: side in pixels; None: the images' own up to 64.
        channels: 1 or 3; None: the images' own.
        crop: side of a central crop before anything else.
        protocol: see `Preprocessing`.
    """

    network: NetworkName = "tiny"
    prediction: Prediction = "epsilon"
    schedule: ScheduleKind = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    snr_shift: float = 1.0
    levels: LevelSampling = "uniform"
    b_scale: float = 1.0
    data_range: Literal["symmetric", "unit"] = "symmetric"
    value_range: Literal["fixed", "minmax"] = "fixed"
    size: int | None = None
    channels: int | None = None
    crop: int | None = None
    protocol: Literal["native", "direct", "common"] = "native"

    def preprocess(self, source: ImageSource) -> Preprocessing:
        """The preprocessing that suits `source`."""
        return Preprocessing.for_source(
            source,
            size=self.size,
            channels=self.channels,
            protocol=self.protocol,
            crop=self.crop,
            value_range=self.value_range,
        )

    def build(self, preprocessing: Preprocessing, autoencoder: nn.Module | None = None) -> DiffusionModel:
        """A model with fresh weights."""
        channels = preprocessing.channels if autoencoder is None else int(autoencoder.config["latent_channels"])
        schedule = NoiseSchedule(self.schedule, self.beta_start, self.beta_end, snr_shift=self.snr_shift)
        return DiffusionModel(
            build_network(self.network, channels, max(preprocessing.size)),
            schedule,
            preprocessing,
            prediction=self.prediction,
            data_range=(-1.0, 1.0) if self.data_range == "symmetric" else (0.0, 1.0),
            b_scale=self.b_scale,
            autoencoder=autoencoder,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"network": "tiny"},
        "training": {"steps": 2000, "batch_size": 64, "learning_rate": 1e-3, "ema": 0.995},
    },
    "small": {
        "model": {"network": "small"},
        "training": {"steps": 20000, "batch_size": 256, "learning_rate": 2e-4, "ema": 0.9995},
    },
    "paper": {
        "model": {"network": "paper", "data_range": "unit", "value_range": "minmax"},
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
}
"""`tiny` for CPUs; `small`: the size of the reconstruction paper's released code, trained as the card advises; `paper`:
its published setting (section 2.4: 171 M parameters, Adam 2.5e-5, 300 epochs of 57,000 images at batch 180, no EMA)."""


@dataclass(frozen=True)
class _Data:
    """The parts of a source that training sees, and what is known of them."""

    training: Dataset
    validation: Dataset | None
    fingerprint: str
    hashes: list[str] = field(repr=False)


def train_model(
    source: ImageSource,
    model: DiffusionModel,
    training: TrainingConfig,
    *,
    levels: LevelSampling = "uniform",
    out: Path | None = None,
    resume: bool = False,
) -> DiffusionModel:
    """Trains a fresh model on all of `source`; the last twentieth of the images, by hash, validates where
    `training.validate_every` is set. With an autoencoder the latents are computed once.
    """
    data = _prepare(source, model, validate=training.validate_every > 0)

    def step(network: nn.Module, batch: Tensor | list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        rows = batch if isinstance(batch, Tensor) else batch[0]
        x0 = model.encode(rows) if model.autoencoder is None else rows
        denoiser = NetworkDenoiser(network, model.schedule, model.prediction)
        return {"loss": denoising_loss(denoiser, x0, generator, levels)}

    result = train(
        model.network,
        step,
        data.training,
        training,
        out=out,
        validation=data.validation,
        resume=resume,
        fingerprint=data.fingerprint,
    )
    model.trained_on = frozenset(data.hashes)
    model.provenance = {
        "source": source.name,
        "data_fingerprint": data.fingerprint,
        "images": len(data.hashes),
        "steps": result.steps,
        "seed": training.seed,
        "training": asdict(training),
    }
    return model


def _prepare(source: ImageSource, model: DiffusionModel, *, validate: bool) -> _Data:
    hashes = [source.content_hash(i) for i in range(len(source))]
    prepared: Dataset = PreparedImages(source, model.preprocessing)
    if model.autoencoder is not None:
        prepared = TensorDataset(_latents(prepared, len(source), model))
    order = sorted(range(len(source)), key=hashes.__getitem__)
    held = len(source) // 20 if validate else 0
    if validate and not held:
        raise FaroutError(f"validation wants at least 20 training images, there are {len(source)}")
    training = prepared if not held else Subset(prepared, sorted(order[held:]))
    validation = None if not held else Subset(prepared, sorted(order[:held]))
    return _Data(training, validation, source.fingerprint(), hashes)


def _latents(images: Dataset, count: int, model: DiffusionModel) -> Tensor:
    chunks: list[Sequence[int]] = [range(count)[start : start + 32] for start in range(0, count, 32)]
    return torch.cat([model.encode(torch.stack([images[i] for i in chunk])).cpu() for chunk in chunks])


def train_diffusion(
    source: Any,
    out: str | Path,
    *,
    model: DiffusionConfig = DiffusionConfig(),
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    autoencoder: str | None = None,
    limit: int | None = None,
    alpha: float = 0.05,
    statistics: int = 400,
    groups: Literal["none", "folder"] = "none",
    policy: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    resume: bool = False,
) -> DiffusionModel:
    """Trains a diffusion model on images and writes its folder.

    A part of the images is held out, by content hash: a later `farout fit` with this model and the same source and
    seed rests its statistics and p-values on them.

    Args:
        source: any image source.
        out: folder of the model; `OUT.training/` beside it holds the checkpoints while training runs, and after it
            where `training.checkpoint_every` is set.
        model: what is trained.
        training: how it is trained.
        autoencoder: folder of a diffusers `AutoencoderKL` or `VQModel`; the model then works on its latents.
        limit: use a seeded sample of this many images.
        alpha: the false-alarm rate that a later calibration wants images for.
        statistics: images that a later fit's statistics want.
        groups: keep images of one folder together in one part.
        policy: what becomes of an unreadable image: `raise`, or `skip`.
        seed: seed of sample, split, weights and noise.
        resume: go on from the last checkpoint.
    """
    from farout.diffusion.folders import read_autoencoder

    store.check_replaceable(out, KIND)
    images = open_source(source, limit=limit, seed=seed, policy=policy)
    parts = split(images, alpha=alpha, statistics=statistics, train=True, seed=seed, groups=groups)
    torch.manual_seed(seed)
    inner = None if autoencoder is None else read_autoencoder(Path(autoencoder))
    fresh = model.build(model.preprocess(images), inner)
    settings = replace(training, seed=seed)
    folder = Path(f"{out}.training")
    trained = train_model(
        images.subset(parts.training), fresh, settings, levels=model.levels, out=folder, resume=resume
    )
    if first_process():
        trained.save(out)
        discard_checkpoints(folder, settings)
    return trained


def discard_checkpoints(folder: Path, training: TrainingConfig) -> None:
    """Removes what was only there to resume; checkpoints that were asked for (`checkpoint_every`) stay."""
    if not training.checkpoint_every and not training.tensorboard:
        shutil.rmtree(folder, ignore_errors=True)
