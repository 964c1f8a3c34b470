"""Training a volume-preserving network to flatten classes: their vectors then vary in few coordinates."""

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
    "Map",
    "apply",
    "flatness",
    "flattening_step",
    "fresh",
    "invariant_counts",
    "train",
    "training_config",
]

Map = VolumePreservingNetwork | ClassRotations

_STRIDED = 1000
"""At most so many training vectors are validated with, as published."""

_ROWS = 4096
"""Vectors that go through a map at once."""


def invariant_counts(x: Tensor, labels: Tensor, classes: int, pca_variance: float) -> list[int]:
    """Per class, D - j: j counts from 0 and is the first component, by falling variance, at which the share of the
    variance explained by it and those before exceeds 1 - pca_variance / 100. The paper's k is the integer part of the
    mean over classes. x (N, D), labels (N,); every class with vectors that differ.
    """
    found = []
    for label in range(classes):
        rows = x[labels == label].double()
        variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
        explained = variances.cumsum(0) / variances.sum()
        # rounding may leave the last share a little below 1
        first = (explained > 1 - pca_variance / 100).nonzero()
        found.append(x.shape[1] - (int(first[0]) if len(first) else len(variances) - 1))
    return found


def flattening_step(invariants: int) -> Step:
    """The training step of a `VolumePreservingNetwork` on batches of vectors x and labels.

    It updates the weights twice per batch. First, the loss is the mean square of the last `invariants` coordinates of
    z = f(x). Then, with the weights after that update, it is the mean square of f^-1(z~) - x, where z~ is the z from
    before it, as a constant, with those coordinates set to zero: the other coordinates must determine x. Both updates
    share the moments of Adam. Orthogonal matrices are computed once per update.
    """

    def step(network: nn.Module, batch: list[Tensor], generator: torch.Generator) -> Iterator[Losses]:
        assert isinstance(network, VolumePreservingNetwork)
        x, labels = batch
        if not network.training:
            with parametrize.cached():
                z = network(x, labels)
                reconstruction = (network.inverse(_without_invariants(z, invariants), labels) - x).square().mean()
            flat = z[:, -invariants:].square().sum(1).mean()
            yield {"loss": flat, "invariants": flat, "reconstruction": reconstruction}
            return
        z = network(x, labels)
        invariant_loss = z[:, -invariants:].square().mean()
        yield {"loss": invariant_loss, "invariant_loss": invariant_loss}
        code = _without_invariants(z.detach(), invariants)
        reconstruction_loss = (network.inverse(code, labels) - x).square().mean()
        yield {"loss": reconstruction_loss, "reconstruction_loss": reconstruction_loss}

    return step


def _without_invariants(z: Tensor, invariants: int) -> Tensor:
    code = z.clone()
    code[:, -invariants:] = 0
    return code


def apply(net: Map, x: Tensor, labels: Tensor, *, inverse: bool = False) -> Tensor:
    """x (N, D) through the map or its inverse, without gradients, on the device where the map is; on the CPU after."""
    device = next(iter(net.state_dict().values())).device
    turn = net.inverse if inverse else net.forward
    with torch.no_grad(), parametrize.cached():
        parts = [
            turn(rows.to(device), numbers.to(device)).cpu()
            for rows, numbers in zip(x.split(_ROWS), labels.split(_ROWS), strict=True)
        ]
    return torch.cat(parts) if parts else x.cpu()


def flatness(net: Map, x: Tensor, labels: Tensor, invariants: int) -> tuple[float, float]:
    """Means over vectors of the sum of the squared invariants (the paper's measure), and of the mean square of what is
    lost when they are set to zero.
    """
    z = apply(net, x, labels)
    rebuilt = apply(net, _without_invariants(z, invariants), labels, inverse=True)
    return float(z[:, -invariants:].square().sum(1).mean()), float((rebuilt - x.cpu()).square().mean())


def fresh(dim: int, classes: int, config: ManifoldConfig, seed: int) -> VolumePreservingNetwork:
    """An untrained network, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "network"))
        return VolumePreservingNetwork(dim, classes, layers=config.layers, orthogonal_map=config.orthogonal_map)


def training_config(config: ManifoldConfig, count: int, seed: int) -> TrainingConfig:
    """The settings of the training loop for `count` vectors: Adam, whose learning rate falls linearly from the first to
    the last batch.
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


def train(
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
    `reconstruction_loss`, and at each validation the `flatness` of strided training vectors (`strided_invariants`,
    `strided_reconstruction`) and of the held-out ones, if there are any (`held_out_invariants`, …). Its first entry is
    from before the training. All randomness follows from `seed`.

    Args:
        out: folder of the checkpoints; training continues from the newest one exactly as if never interrupted. None:
            no checkpoints.

    Raises:
        StoreError: if `out` holds checkpoints of another training.
    """
    network = fresh(x.shape[1], classes, config, seed)
    stride = slice(None, None, -(-len(x) // _STRIDED))
    sets = {"held_out": held_out, "strided": (x[stride], labels[stride])}
    sets = {name: pair for name, pair in sets.items() if len(pair[0])}
    first: dict[str, float] = {"step": 0, "learning_rate": config.learning_rate}
    for name, pair in sets.items():
        first[f"{name}_invariants"], first[f"{name}_reconstruction"] = flatness(network, *pair, invariants)
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
    return network, [first, *result.history]
