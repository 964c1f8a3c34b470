"""Training of the volume-preserving network, which makes the vectors of each class vary in few coordinates only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from farout.core import store
from farout.synthesis.ncis.manifold_config import ManifoldConfig
from farout.synthesis.ncis.volume_preserving import ClassRotations, VolumePreservingNetwork
from farout.training import loop
from farout.training.checkpoints import newest_checkpoint
from farout.training.config import Losses, Step, TrainingConfig
from farout.training.data_order import seed_of

__all__ = [
    "FlatteningMap",
    "apply_map",
    "count_invariants",
    "create_network",
    "flattening_step",
    "measure_flatness",
    "train_network",
    "training_config",
]

FlatteningMap = VolumePreservingNetwork | ClassRotations

_MAX_VALIDATION_VECTORS = 1000
"""Number of evenly strided training vectors for validation, as published."""

_CHUNK_ROWS = 4096
"""Vectors that pass through a map in one call."""


def count_invariants(x: Tensor, labels: Tensor, classes: int, pca_variance: float) -> list[int]:
    """The number of invariants of each class, D - j, by PCA.

    j, counted from 0, is the first principal component at which the cumulative share of explained variance exceeds
    1 - pca_variance / 100. The k of the paper is the integer part of the mean over the classes. x (N, D), labels (N,);
    every class must have vectors that differ.
    """
    counts = []
    for label in range(classes):
        rows = x[labels == label].double()
        variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
        explained = variances.cumsum(0) / variances.sum()
        exceeding = (explained > 1 - pca_variance / 100).nonzero()
        # rounding can leave the last share slightly below 1
        j = int(exceeding[0]) if len(exceeding) else len(variances) - 1
        counts.append(x.shape[1] - j)
    return counts


def flattening_step(invariants: int) -> Step:
    """The training step of a `VolumePreservingNetwork` f on batches of vectors x and labels: two updates per batch.

    Both updates share the moments of Adam. The orthogonal matrices are computed once per update.
    """

    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> Iterator[Losses]:
        assert isinstance(network, VolumePreservingNetwork)
        x, labels = batch
        if not network.training:
            with parametrize.cached():
                z = network(x, labels)
                reconstruction = (network.inverse(_zero_invariants(z, invariants), labels) - x).square().mean()
            squared_norm = z[:, -invariants:].square().sum(1).mean()
            yield {"loss": squared_norm, "invariants": squared_norm, "reconstruction": reconstruction}
            return
        # L_inv = mean over the last k coordinates of z^2, z = f(x, y)
        z = network(x, labels)
        invariant_loss = z[:, -invariants:].square().mean()
        yield {"loss": invariant_loss, "invariant_loss": invariant_loss}
        # L_rec = mean (f^-1(z~, y) - x)^2, where z~ is z from before the update, without gradient and with the last k
        # coordinates set to 0, and f^-1 has the updated weights: the other coordinates must determine x
        z_kept = _zero_invariants(z.detach(), invariants)
        reconstruction_loss = (network.inverse(z_kept, labels) - x).square().mean()
        yield {"loss": reconstruction_loss, "reconstruction_loss": reconstruction_loss}

    return step


def _zero_invariants(z: Tensor, invariants: int) -> Tensor:
    """A copy of z with the last k coordinates set to 0."""
    z = z.clone()
    z[:, -invariants:] = 0
    return z


def apply_map(network: FlatteningMap, x: Tensor, labels: Tensor, *, inverse: bool = False) -> Tensor:
    """x (N, D) through the map or its inverse, without gradients, computed on the map's device, returned on the CPU."""
    device = next(iter(network.state_dict().values())).device
    function = network.inverse if inverse else network.forward
    with torch.no_grad(), parametrize.cached():
        parts = [
            function(rows.to(device), row_labels.to(device)).cpu()
            for rows, row_labels in zip(torch.split(x, _CHUNK_ROWS), torch.split(labels, _CHUNK_ROWS), strict=True)
        ]
    return torch.cat(parts) if parts else x.cpu()


def measure_flatness(network: FlatteningMap, x: Tensor, labels: Tensor, invariants: int) -> tuple[float, float]:
    """The mean squared norm of the invariants (the paper's measure), and the mean squared error of a vector that is
    reconstructed with its invariants set to 0.
    """
    z = apply_map(network, x, labels)
    reconstructed = apply_map(network, _zero_invariants(z, invariants), labels, inverse=True)
    return float(z[:, -invariants:].square().sum(1).mean()), float((reconstructed - x.cpu()).square().mean())


def create_network(dim: int, classes: int, config: ManifoldConfig, seed: int) -> VolumePreservingNetwork:
    """An untrained network with weights that depend on `seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "network"))
        return VolumePreservingNetwork(dim, classes, layers=config.layers, orthogonal_map=config.orthogonal_map)


def training_config(config: ManifoldConfig, count: int, seed: int) -> TrainingConfig:
    """The settings of the training loop for `count` vectors: Adam, with a learning rate that decreases linearly from
    the first to the last batch.
    """
    steps = config.total_steps(count)
    return TrainingConfig(
        steps=steps,
        batch_size=config.batch_size,
        optimizer="adam",
        learning_rate=config.learning_rate,
        warmup=0,
        decay="linear",
        final_learning_rate=config.final_factor * config.learning_rate,
        ema=None,
        clip=None,
        precision="fp32",
        seed=seed,
        validate_every=math.ceil(steps / config.validations),
        checkpoint=config.checkpoint,
        device=config.device,
    )


def train_network(
    x: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    classes: int,
    invariants: int,
    config: ManifoldConfig,
    seed: int,
    out: Path | None = None,
) -> tuple[VolumePreservingNetwork, list[dict[str, float]]]:
    """Train a network on x (N, D) and labels (N,).

    The second result is the history of the training (see `TrainingResult`), with `invariant_loss` and
    `reconstruction_loss`, and at each validation the flatness (see `measure_flatness`) of strided training vectors
    (`strided_invariants`, `strided_reconstruction`) and of the held-out ones, if there are any (`held_out_invariants`,
    …). Its first entry is from before the training. All random numbers depend on `seed` only.

    Args:
        x: vectors (N, D).
        labels: their classes (N,).
        held_out: held-out vectors and their classes; may be empty.
        classes: number of classes.
        invariants: k, the number of invariant coordinates.
        config: settings of the network and its training.
        seed: seed of the network and of the order of the training.
        out: folder of the checkpoints; training continues from the newest one exactly as if never interrupted. None:
            no checkpoints.

    Raises:
        StoreError: if `out` contains checkpoints of another training.
    """
    network = create_network(x.shape[1], classes, config, seed)
    stride = slice(None, None, -(-len(x) // _MAX_VALIDATION_VECTORS))
    sets = {"held_out": held_out, "strided": (x[stride], labels[stride])}
    sets = {name: pair for name, pair in sets.items() if len(pair[0])}
    first_entry: dict[str, float] = {"step": 0, "learning_rate": config.learning_rate}
    for name, pair in sets.items():
        flatness = measure_flatness(network, *pair, invariants)
        first_entry[f"{name}_invariants"], first_entry[f"{name}_reconstruction"] = flatness
    vectors = {"x": x, "labels": labels, "held_out": held_out[0], "held_out_labels": held_out[1]}
    settings: dict[str, Any] = {**asdict(config), "device": None, "classes": classes, "invariants": invariants}
    result = loop.train(
        network,
        flattening_step(invariants),
        TensorDataset(x, labels),
        training_config(config, len(x), seed),
        out=out,
        validation={name: TensorDataset(*pair) for name, pair in sets.items()},
        resume=out is not None and newest_checkpoint(out) is not None,
        fingerprint=f"{store.hash_tensors(vectors)} {settings}",
        description="flattening classes",
        items="vectors",
        short_last_batch=True,
    )
    return network, [first_entry, *result.history]
