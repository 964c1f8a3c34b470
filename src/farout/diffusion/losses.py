"""The training loss: the error of the network's output at random noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims

__all__ = ["ErrorKind", "LevelSampling", "Objective", "Reduction", "denoising_loss", "drop_labels", "sample_levels"]

LevelSampling = Literal["uniform", "low_noise", "antithetic"]
ErrorKind = Literal["square", "absolute"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Objective:
    """Settings of the training loss. Raises FaroutError for values out of range.

    Args:
        levels: how levels are sampled, see `sample_levels`.
        error: square or absolute value of the difference between output and target.
        reduction: mean or sum over C, H, W; always the mean over the batch.
        label_dropout: fraction of labels that are replaced by the null class, for classifier-free guidance.
        flip: whether images are flipped horizontally with probability 0.5.
    """

    levels: LevelSampling = "uniform"
    error: ErrorKind = "square"
    reduction: Reduction = "mean"
    label_dropout: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("levels", LevelSampling), ("error", ErrorKind), ("reduction", Reduction)):
            if getattr(self, name) not in get_args(kind):
                raise FaroutError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}")
        if not 0 <= self.label_dropout < 1:
            raise FaroutError(f"label_dropout is {self.label_dropout}; expected a fraction in [0, 1)")


def sample_levels(count: int, steps: int, sampling: LevelSampling, generator: torch.Generator) -> Tensor:
    """Random levels t (count,) in 0 to steps - 1.

    `uniform`: as published (Ho et al. 2020, algorithm 1); `low_noise`: t = floor(steps u^2), so that half of the
    levels are in the lowest quarter, which reconstruction uses most; `antithetic`: the first half uniform, the second
    half steps - 1 - t of the first (Liu et al. 2022, released code).
    """
    if sampling == "antithetic":
        first = sample_levels((count + 1) // 2, steps, "uniform", generator)
        return torch.cat([first, steps - 1 - first[: count // 2]])
    u = torch.rand(count, generator=generator)
    if sampling == "low_noise":
        u = u**2
    elif sampling != "uniform":
        raise FaroutError(f"levels are sampled by one of {', '.join(get_args(LevelSampling))}, got {sampling!r}")
    return (u * steps).long().clamp(max=steps - 1)


def drop_labels(labels: Tensor, num_classes: int, probability: float, generator: torch.Generator) -> Tensor:
    """Labels (B,), each replaced by `num_classes`, the index of the null row, with this probability.

    Ho & Salimans 2022, algorithm 1. The result depends only on `generator`, a CPU generator.
    """
    dropped = torch.rand(len(labels), generator=generator) < probability
    return labels.masked_fill(dropped.to(labels.device), num_classes)


def denoising_loss(
    denoiser: NetworkDenoiser,
    x0: Tensor,
    generator: torch.Generator,
    objective: Objective = Objective(),
    condition: Condition | None = None,
) -> Tensor:
    """The training loss of clean values x0 (B, ...) in the network's space, a scalar (Ho et al. 2020, eq. 14).

    Each row has its own level and noise, from `generator`, a CPU generator, so that they do not depend on the device.
    """
    t = sample_levels(len(x0), denoiser.schedule.num_levels, objective.levels, generator)
    sigma = denoiser.schedule.sigma_of(t).to(torch.float32)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    x = x0 + expand_dims(sigma, x0) * noise
    predicted = denoiser.predict(x, sigma.to(x0.device), condition)
    difference = predicted - denoiser.target(x0, noise, sigma)
    error = difference.square() if objective.error == "square" else difference.abs()
    return error.mean() if objective.reduction == "mean" else error.sum() / len(x0)
