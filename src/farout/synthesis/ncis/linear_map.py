"""Training a volume-preserving network to flatten classes: their vectors then vary in few coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from farout.core import progress, store
from farout.core.errors import FaroutError
from farout.synthesis.ncis.manifold_checkpoints import Checkpoints
from farout.synthesis.ncis.manifold_config import ManifoldConfig
from farout.synthesis.ncis.volume_preserving import ClassRotations, VolumePreservingNetwork
from farout.training.data_order import seed_of

__all__ = ["Map", "apply", "flatness", "fresh", "invariant_counts", "rate_factor", "train", "update"]

Map = VolumePreservingNetwork | ClassRotations

_STRIDED = 1000
"""At most so many training vectors are validated with, as published."""

_ROWS = 4096
"""Vectors that go through a map at once."""

_SAVES = 20
"""Checkpoints of a whole training: what is lost of it by an interruption is a twentieth at most."""


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


def rate_factor(step: int, total: int, final: float = 0.1) -> float:
    """Rate of batch `step` (0 to total - 1) divided by the first: final + (1 - final)(1 - step / (total - 1))."""
    return final + (1 - final) * (1 - step / (total - 1)) if total > 1 else 1.0


def update(
    net: VolumePreservingNetwork, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, invariants: int
) -> tuple[Tensor, Tensor]:
    """Both updates of a batch; their losses before each.

    First the mean square of the last `invariants` coordinates of z = f(x). Then, with the weights after that update,
    the mean square of f^-1(z~) - x, where z~ is the z from before it, as a constant, with those coordinates set to
    zero: the others must say what x is. Both updates share Adam's moments. Orthogonal matrices are computed once per
    update.
    """
    z = net(x, labels)
    flat = z[:, -invariants:].square().mean()
    _descend(optimizer, flat)
    code = z.detach().clone()
    code[:, -invariants:] = 0
    rebuilt = (net.inverse(code, labels) - x).square().mean()
    _descend(optimizer, rebuilt)
    return flat.detach(), rebuilt.detach()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


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
    code = z.clone()
    code[:, -invariants:] = 0
    rebuilt = apply(net, code, labels, inverse=True)
    return float(z[:, -invariants:].square().sum(1).mean()), float((rebuilt - x.cpu()).square().mean())


def _batches(count: int, size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Rows of one batch after another from number `start` on, without end: a permutation per epoch, whose last batch
    may be smaller.
    """
    epoch, passed = divmod(start, -(-count // size))
    while True:
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        yield from torch.randperm(count, generator=generator).split(size)[passed:]
        epoch, passed = epoch + 1, 0


def fresh(dim: int, classes: int, config: ManifoldConfig, seed: int) -> VolumePreservingNetwork:
    """An untrained network, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "network"))
        return VolumePreservingNetwork(dim, classes, layers=config.layers, orthogonal_map=config.orthogonal_map)


@dataclass
class _Watch:
    """Validates, and remembers the best weights."""

    net: VolumePreservingNetwork
    sets: dict[str, tuple[Tensor, Tensor]]
    invariants: int

    def __post_init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.best = float("inf")
        self.weights: dict[str, Tensor] = {}

    def look(self, step: int, rate: float) -> None:
        """Adds an entry to the history; raises FaroutError where a loss is no longer a finite number."""
        entry = {"step": float(step), "learning_rate": rate}
        if self.losses:
            means = torch.stack(self.losses).mean(0).tolist()
            entry |= {"invariant_loss": means[0], "reconstruction_loss": means[1]}
            self.losses = []
        for name, (x, labels) in self.sets.items():
            entry[f"{name}_invariants"], entry[f"{name}_reconstruction"] = flatness(
                self.net, x, labels, self.invariants
            )
        if not all(torch.isfinite(torch.tensor(list(entry.values())))):
            raise FaroutError(f"the manifold's losses are no longer finite after {step} batches; lower learning_rate")
        self.history.append(entry)
        measure = entry["held_out_invariants" if "held_out" in self.sets else "strided_invariants"]
        if step and measure < self.best:
            self.best = measure
            self.weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All but the history: losses since the last look (n, 2), the best measure, and the weights that it is of."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0, 2)
        best = torch.tensor(self.best, dtype=torch.float64)
        return {"losses": losses, "best": best, **{f"weights.{name}": value for name, value in self.weights.items()}}

    def load(self, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None:
        """Goes back to what `tensors` told, and to the history of then."""
        device = next(self.net.parameters()).device
        self.history, self.best = history, float(tensors["best"])
        self.losses = list(tensors["losses"].to(device))
        weights = {n.removeprefix("weights."): value for n, value in tensors.items() if n.startswith("weights.")}
        self.weights = {name: value.to(device) for name, value in weights.items()}


def train(
    x: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    classes: int,
    invariants: int,
    config: ManifoldConfig,
    seed: int,
    device: torch.device,
    out: Path | None = None,
) -> tuple[VolumePreservingNetwork, list[dict[str, float]]]:
    """A network trained on x (N, D) and labels (N,), and the history: one entry per validation, the first before
    training, with `step` (batches so far), `learning_rate`, the mean losses since the entry before, and `flatness` of
    strided training vectors and of those held out (where there are any). All randomness follows from `seed`.

    `out` is where checkpoints go, and where training goes on from, exactly as if never interrupted; StoreError where it
    holds those of another training. None: nothing is written.
    """
    net = fresh(x.shape[1], classes, config, seed).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    stride = slice(None, None, -(-len(x) // _STRIDED))
    sets = {"strided": (x[stride], labels[stride]), "held_out": held_out}
    watch = _Watch(net, {name: pair for name, pair in sets.items() if len(pair[0])}, invariants)
    total = config.total_steps(len(x))
    due = {-(-total * number // config.validations) for number in range(1, config.validations + 1)}
    kept = None
    if out is not None:
        told = _told(x, labels, held_out, classes=classes, invariants=invariants, config=config, seed=seed)
        kept = Checkpoints(out, told, max(1, total // _SAVES))
    done = _begin(kept, optimizer, watch, config.learning_rate)
    order = _batches(len(x), config.batch_size, seed, done)
    x, labels = x.to(device), labels.to(device)
    with progress.task("flattening classes", total) as bar:
        if done:
            bar.advance(done)
        for step in range(done, total):
            rate = config.learning_rate * rate_factor(step, total, config.final_factor)
            _set_rate(optimizer.param_groups, rate)
            rows = next(order).to(device)
            watch.losses.append(torch.stack(update(net, optimizer, x[rows], labels[rows], invariants)))
            if step + 1 in due:
                watch.look(step + 1, rate)
            if kept is not None and kept.due(step + 1):
                kept.save(step + 1, net, optimizer, watch.tensors(), watch.history)
            bar.advance(1)
    if config.checkpoint == "best":
        net.load_state_dict(watch.weights)
    return net.eval(), watch.history


def _begin(kept: Checkpoints | None, optimizer: torch.optim.Optimizer, watch: _Watch, rate: float) -> int:
    """Goes back to the newest checkpoint, or looks for the first time; the batches that are done."""
    found = None if kept is None else kept.load(watch.net, optimizer)
    if found is None:
        watch.look(0, rate)
        return 0
    done, watched, history = found
    watch.load(watched, history)
    return done


def _told(x: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], **settings: Any) -> dict[str, Any]:
    """All that decides the training but the device."""
    vectors = {"x": x, "labels": labels, "held_out": held_out[0], "held_out_labels": held_out[1]}
    config = {name: value for name, value in asdict(settings.pop("config")).items() if name != "device"}
    return {**config, **settings, "vectors": store.hash_tensors(vectors)}


def _set_rate(groups: Sequence[dict], rate: float) -> None:
    for group in groups:
        group["lr"] = rate
