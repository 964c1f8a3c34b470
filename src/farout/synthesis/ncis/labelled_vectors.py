"""Labelled vectors that a manifold is fitted to: what they must be, and which of them are held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from farout.core.errors import FaroutError, ShortfallWarning
from farout.synthesis.ncis.manifold_config import ManifoldConfig
from farout.training.data_order import seed_of

__all__ = ["check_counts", "check_spread", "checked", "class_names", "split", "warn_counts"]


def class_names(classes: int | Sequence[str] | None, labels: Tensor) -> tuple[str, ...]:
    """The names of `classes`, or of as many as the largest label says; bare numbers where there are none."""
    if classes is None:
        classes = int(labels.max()) + 1 if labels.numel() else 0
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise FaroutError("a manifold requires at least one class, got none")
    return names


def checked(vectors: Tensor, labels: Tensor, names: Sequence[str], dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Both on the CPU, float32 (N, D) and int64 (N,); raises FaroutError for what is not such."""
    vectors, labels = vectors.detach().cpu().float(), labels.detach().cpu()
    if vectors.ndim != 2 or vectors.shape[1] < 2 or (dim is not None and vectors.shape[1] != dim):
        wanted = "at least 2" if dim is None else str(dim)
        raise FaroutError(f"vectors must have the shape (N, D) with D {wanted}, got {tuple(vectors.shape)}")
    if labels.shape != (len(vectors),) or labels.is_floating_point() or labels.is_complex():
        given = f"{tuple(labels.shape)} of {labels.dtype}"
        raise FaroutError(f"labels require one whole number for each of {len(vectors)} vectors, got {given}")
    if not torch.isfinite(vectors).all():
        bad = int((~torch.isfinite(vectors)).any(1).sum())
        raise FaroutError(f"{bad} of {len(vectors)} vectors hold values that are not finite numbers; leave them out")
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise FaroutError(f"labels run from 0 to {len(names) - 1} for {len(names)} classes, got {given}")
    return vectors, labels


def check_counts(labels: Tensor, names: Sequence[str]) -> None:
    """Raises FaroutError for a class with fewer than two vectors."""
    for label, count in enumerate(labels.bincount(minlength=len(names)).tolist()):
        if count < 2:
            given = f"{count} vector{'s' * (count != 1)}"
            raise FaroutError(
                f"the class {names[label]!r} has {given}; a Gaussian requires 2 or more: embed more of its images"
            )


def check_spread(vectors: Tensor, labels: Tensor, names: Sequence[str]) -> None:
    """Raises FaroutError for a class whose vectors are all equal."""
    for label, name in enumerate(names):
        rows = vectors[labels == label]
        if bool((rows == rows[0]).all()):
            hint = "they require one of each image, after at least one step of embedding"
            raise FaroutError(f"all {len(rows)} vectors of the class {name!r} are equal; {hint}")


def split(labels: Tensor, classes: int, config: ManifoldConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit to and rows held out, rising; both by class, two or more to fit to."""
    fit, held = [], []
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed_of(seed, "split", label))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        apart = min(int(config.held_out * len(rows)), len(rows) - 2)
        rest = rows[apart:]
        held.append(rows[:apart])
        fit.append(rest[: max(2, round(config.train_fraction * len(rest)))])
    found = torch.cat(fit).sort().values, torch.cat(held).sort().values
    if config.held_out and not len(found[1]):
        if config.regularization == "held_out":
            raise FaroutError("classes are too small to hold vectors out; give more, or regularization='relative'")
        warnings.warn("classes are too small to hold vectors out; none are held out", ShortfallWarning, stacklevel=3)
    return found


def warn_counts(labels: Tensor, names: Sequence[str], dim: int, config: ManifoldConfig) -> None:
    """Warns of classes that do not span the space; `labels` of the vectors that are fitted to, `config` resolved."""
    counts = labels.bincount(minlength=len(names))
    few = int((counts <= dim).sum())
    if few:
        least = int(counts.argmin())
        advice = "compare held-out distances with those of draws"
        advice += ", or give regularization='held_out'" * (config.regularization != "held_out")
        warnings.warn(
            f"{few} of {len(names)} classes have no more vectors to fit to than the {dim} dimensions (the fewest: "
            f"{int(counts[least])}, of {names[least]!r}): along some directions their spread is the regularization's "
            f"({config.regularization}); {advice}",
            ShortfallWarning,
            stacklevel=3,
        )
