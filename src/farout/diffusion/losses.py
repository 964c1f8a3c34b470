"""The training loss: the error of the network's output at random noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.schedule import NoiseSchedule

__all__ = [
    "ErrorKind",
    "LevelSampling",
    "Objective",
    "Reduction",
    "denoising_loss",
    "drop_labels",
    "sample_levels",
    "sample_sigmas",
]

LevelSampling = Literal["uniform", "low_noise", "antithetic", "log_normal"]
ErrorKind = Literal["square", "absolute"]
Reduction = Literal["mean", "sum"]

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -0.4, 1.1
"""Of `log_normal`. Karras et al. 2022 have -1.2 and 1.2 for data of standard deviation 0.5; images in [-1, 1] have
about 0.7, and the detectors use few levels below sigma 0.2."""


@dataclass(frozen=True)
class Objective:
    """Settings of the training loss. Raises FaroutError for values out of range.

    Args:
        levels: how levels are sampled, see `sample_sigmas`.
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
        raise FaroutError(f"levels t are sampled by uniform, low_noise or antithetic, got {sampling!r}")
    return (u * steps).long().clamp(max=steps - 1)


def sample_sigmas(count: int, schedule: NoiseSchedule, sampling: LevelSampling, generator: torch.Generator) -> Tensor:
    """Random noise levels sigma (count,), float32: those of `sample_levels`, or for `log_normal` of log sigma from a
    normal distribution (Karras et al. 2022, table 1), clamped to the schedule's range.

    The normal quantiles of a batch are evenly spaced up to a random number in each interval, which lowers the variance
    of the loss (as the low-discrepancy sampler of Kingma et al. 2021).
    """
    if sampling != "log_normal":
        return schedule.sigma_of(sample_levels(count, schedule.num_levels, sampling, generator)).to(torch.float32)
    u = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    log_sigma = LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.special.ndtri(u)
    return log_sigma.exp().clamp(schedule.sigma[0], schedule.sigma[-1]).to(torch.float32)


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
    sigma = sample_sigmas(len(x0), denoiser.schedule, objective.levels, generator)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    x = x0 + expand_dims(sigma, x0) * noise
    predicted = denoiser.predict(x, sigma.to(x0.device), condition)
    difference = predicted - denoiser.target(x0, noise, sigma)
    error = difference.square() if objective.error == "square" else difference.abs()
    return error.mean() if objective.reduction == "mean" else error.sum() / len(x0)
