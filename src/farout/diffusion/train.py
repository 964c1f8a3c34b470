"""Training a diffusion model on an image source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from farout.core import store
from farout.core.devices import is_main_process, resolve_device
from farout.core.errors import FaroutError
from farout.core.names import find_path
from farout.data.batching import PreparedImages
from farout.data.classes import (
    LabelledImages,
    check_no_class_is_empty,
    encode_classes,
    labelled_fingerprint,
)
from farout.data.image_source import ImageSource
from farout.data.normal_images import check_one_set
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.sources import open_source
from farout.data.splits import log_split, split_off_validation, split_source
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.losses import Objective, denoising_loss, drop_labels
from farout.diffusion.model import KIND, DiffusionModel, WeightFormat
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.unets import build_network, create_conditioning, network_config
from farout.training.checkpoints import discard_checkpoints, training_folder
from farout.training.loop import Step, TrainingConfig, train

__all__ = [
    "build_model",
    "train_diffusion",
    "train_model",
]


def build_model(
    config: DiffusionConfig,
    preprocessing: Preprocessing,
    autoencoder: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
) -> DiffusionModel:
    """Builds a model with random weights.

    Args:
        config: the model's configuration.
        preprocessing: preprocessing of its images.
        autoencoder: autoencoder whose latents the model generates; None: a model of pixels.
        class_names: names of the classes; required exactly when `config.classes` is set.

    Raises:
        FaroutError: for class names without `config.classes`, or the reverse.
    """
    if config.classes != (class_names is not None):
        raise FaroutError(f"classes is {config.classes}, the class names are {class_names}; expected both or none")
    channels = preprocessing.channels if autoencoder is None else int(network_config(autoencoder)["latent_channels"])
    count = None if class_names is None else len(class_names)
    size = -(-max(preprocessing.size) // config.patch)
    network = build_network(config.network, channels * config.patch**2, size, classes=count, dropout=config.dropout)
    conditioning = None
    if class_names is not None:
        conditioning = create_conditioning(network, class_names, has_null=config.objective.label_dropout > 0)
    return DiffusionModel(
        network,
        NoiseSchedule(config.schedule, config.beta_start, config.beta_end, snr_shift=config.snr_shift),
        preprocessing,
        prediction=config.prediction,
        data_range=(-1.0, 1.0) if config.data_range == "symmetric" else (0.0, 1.0),
        b_scale=config.b_scale,
        patch=config.patch,
        autoencoder=autoencoder,
        conditioning=conditioning,
    )


@dataclass(frozen=True)
class _TrainingData:
    """Training and validation set of a source, its fingerprint and the content hashes of its images."""

    training: Dataset[Any]
    validation: Dataset[Any] | None
    fingerprint: str
    hashes: list[str] = field(repr=False)


def train_model(
    source: ImageSource,
    model: DiffusionModel,
    training: TrainingConfig,
    *,
    objective: Objective = Objective(),  # noqa: B008
    out: Path | None = None,
    resume: bool = False,
) -> DiffusionModel:
    """Trains a model on all images of a source; returns the same model.

    With `training.validate_every` a twentieth of the images, chosen by hash, is used for validation. The latents of an
    autoencoder are computed once. A class-conditional model is trained on the source's labels, matched by class name.

    Args:
        source: training images.
        model: the model, with random weights.
        training: settings of the training loop.
        objective: settings of the loss.
        out: folder of the checkpoints; None: none are kept.
        resume: continue from the last checkpoint in `out`.

    Raises:
        FaroutError: for an objective that does not suit the model, and a class without images.
        SourceError: for labels that are missing or of a class that the model does not have.
        StoreError: for a resume with other images, labels or settings.
    """
    _check_objective(model, objective)
    model.to(resolve_device(training.device))  # training moves the network alone
    data = _prepare_data(source, model, validate=training.validate_every > 0)
    trained = model.network if model.conditioning is None else model.conditioning.trainable_module(model.network)
    result = train(
        trained,
        _training_step(model, objective),
        data.training,
        training,
        out=out,
        validation=data.validation,
        resume=resume,
        fingerprint=_training_fingerprint(data.fingerprint, model, objective),
    )
    model.trained_on = frozenset(data.hashes)
    model.provenance = {
        "source": source.name,
        "data_fingerprint": data.fingerprint,
        "images": len(data.hashes),
        "steps": result.steps,
        "seed": training.seed,
        "training": asdict(training),
        "objective": asdict(objective),
    }
    return model


def _training_fingerprint(fingerprint: str, model: DiffusionModel, objective: Objective) -> str:
    """Everything but the network's shape that decides what is learned; a run resumes only with the same."""
    settings = {
        "dropout": network_config(model.network)["dropout"],
        "prediction": model.prediction,
        "data_range": model.data_range,
        "b_scale": model.b_scale,
        **({} if model.patch == 1 else {"patch": model.patch}),  # so that runs of earlier versions can be resumed
        "autoencoder": None if model.autoencoder is None else store.hash_tensors(model.autoencoder.state_dict()),
    }
    return f"{fingerprint} {objective} {model.schedule} {model.preprocessing} {settings}"


def _check_objective(model: DiffusionModel, objective: Objective) -> None:
    if objective.flip and model.autoencoder is not None:
        raise FaroutError(
            "latents are computed once, so images cannot be flipped at random in each step; leave flip out"
        )
    if objective.label_dropout and model.conditioning is None:
        raise FaroutError("label_dropout requires a model with classes; this one is unconditional")
    if objective.label_dropout and model.conditioning is not None and not model.conditioning.has_null:
        raise FaroutError("label_dropout requires a model with a null condition; this one has none")


def _training_step(model: DiffusionModel, objective: Objective) -> Step:
    """The training step of a batch: images or latents, with their labels if the model has classes."""
    conditioning = model.conditioning

    def step(network: nn.Module, batch: Tensor | list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of a batch; see `farout.training.loop.Step`."""
        rows = batch if isinstance(batch, Tensor) else batch[0]
        if objective.flip:
            is_flipped = torch.rand(len(rows), generator=generator).to(rows.device) < 0.5
            rows = torch.where(is_flipped[:, None, None, None], rows.flip(-1), rows)
        x0 = model.encode(rows) if model.autoencoder is None else rows
        condition = None
        if conditioning is not None:
            labels = batch[1]
            if objective.label_dropout:
                labels = drop_labels(labels, conditioning.num_classes, objective.label_dropout, generator)
            # labels instead of vectors: the trained module looks them up, the null row included
            condition = Condition({"class_labels": labels})
        denoiser = NetworkDenoiser(network, model.schedule, model.prediction)
        return {"loss": denoising_loss(denoiser, x0, generator, objective, condition)}

    return step


def _prepare_data(source: ImageSource, model: DiffusionModel, *, validate: bool) -> _TrainingData:
    source = source.with_reduced_decoding(model.preprocessing.reduced_decoding)
    names = None if model.conditioning is None else model.conditioning.class_names
    labels = None if names is None else encode_classes(source, names)  # first, because it may raise
    if labels is not None:
        check_no_class_is_empty(labels, names or ())
    hashes = [source.content_hash(i) for i in range(len(source))]
    images = PreparedImages(source, model.preprocessing)
    prepared: Dataset[Any] = images if labels is None else LabelledImages(images, labels)
    if model.autoencoder is not None:
        latents = _compute_latents(images, len(source), model)
        prepared = TensorDataset(latents) if labels is None else TensorDataset(latents, labels)
    training, validation = split_off_validation(prepared, hashes, validate=validate)
    fingerprint = source.fingerprint() if labels is None else labelled_fingerprint(source, names or (), labels)
    return _TrainingData(training, validation, fingerprint, hashes)


def _compute_latents(images: Dataset[Any], count: int, model: DiffusionModel) -> Tensor:
    chunks: list[Sequence[int]] = [range(count)[start : start + 32] for start in range(0, count, 32)]
    return torch.cat([model.encode(torch.stack([images[i] for i in chunk])).cpu() for chunk in chunks])


def train_diffusion(
    source: Any,
    out: str | Path,
    *,
    model: DiffusionConfig = DiffusionConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    autoencoder: str | None = None,
    weights: WeightFormat = "fp32",
    limit: int | None = None,
    alpha: float = 0.05,
    statistics: int = 400,
    groups: Literal["near_copies", "folder", "none"] = "near_copies",
    policy: Literal["raise", "skip"] = "raise",
    reading: ReadSettings = DEFAULT_READING,
    seed: int = 0,
    resume: bool = False,
) -> DiffusionModel:
    """Train a diffusion model on images.

    A part of the images is held out, by content hash: a later `farout fit` with this model and the same source and
    seed rests its statistics and p-values on them.

    Args:
        source: images: a named set, folder, glob, file, or hf://owner/name:split.
        out: folder of the model; checkpoints are in OUT.training while training runs, and stay there with
            `training.checkpoint_every`, `training.keep` or `training.tensorboard`.
        model: settings of the model.
        training: settings of the training.
        autoencoder: folder of a diffusers `AutoencoderKL` or `VQModel`, to train a model of its latents; default: a
            model of pixels.
        weights: number format in which the weights are stored: `fp32`, or `fp16` for half the size (they are rounded
            after training).
        limit: use a seeded random sample of this many images; default: all.
        alpha: hold out enough images for a later calibration at this false-alarm rate.
        statistics: number of images to hold out for the statistics of a later fit; at most as many as are trained on.
        groups: images that stay in the same part of the split: `near_copies` (bursts, video frames, recompressed,
            shifted or mirrored images), `folder` (these, and all images of one folder or value of the column `group`),
            or `none` (equal images only).
        policy: what to do with an unreadable image: `raise` an error, or `skip` it.
        reading: how image files are read.
        seed: seed of the sample, split, weights and noise.
        resume: continue training from the last checkpoint.

    Raises:
        FaroutError: for settings that do not go together, and a training that cannot go on; see `train_model`.
        SourceError: for images that cannot be split, and labels that are missing.
        StoreError: where `out` contains something else, an autoencoder that cannot be read, and a resume that differs.
    """
    store.check_replaceable(out, KIND)
    images = open_source(source, limit=limit, seed=seed, policy=policy, reading=reading)
    images = images.with_reduced_decoding(model.reduced_decoding)
    check_one_set(images)
    torch.manual_seed(seed)
    inner = None if autoencoder is None else folders.read_autoencoder(find_path(autoencoder))
    new_model = build_model(model, model.preprocess(images), inner, model.class_names(images))
    _check_objective(new_model, model.objective)
    parts = split_source(images, alpha=alpha, statistics=statistics, train=True, seed=seed, groups=groups)
    log_split(images, parts)
    images.warn_about_reading()
    settings = replace(training, seed=seed)
    folder = training_folder(out)
    trained = train_model(
        images.subset(parts.training), new_model, settings, objective=model.objective, out=folder, resume=resume
    )
    if is_main_process():
        if weights == "fp16":
            trained.round_weights()
        trained.save(out)
        discard_checkpoints(folder, settings)
    return trained
