"""The interface of a training step, the settings, learning rate and optimizer of a run, and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from farout.core.devices import PrecisionChoice
from farout.core.errors import FaroutError, check_options

__all__ = ["Losses", "Step", "TrainingConfig", "TrainingResult", "learning_rate", "make_optimizer"]

Losses = dict[str, Tensor]
"""Scalars by name: `loss`, a mean over the batch, which is minimized, and others to log, the same names every time."""

Step = Callable[[nn.Module, Any, torch.Generator], Losses | Iterator[Losses]]
"""step(network, batch, generator) -> losses of a batch.

All noise comes from `generator`, a CPU generator seeded from (seed, update, process). A step that alternates several
updates with one batch is a generator function: it yields the losses of one update after the other, and each is applied
to the weights before the code after its `yield` runs. In validation (`network.training` is False) it yields once.
"""


@dataclass(frozen=True)
class TrainingConfig:
    """Training settings. Raises FaroutError for a value out of range.

    Args:
        steps: number of optimizer updates.
        batch_size: items per update, over all processes; divisible by processes x `accumulate`. Items repeat if it
            exceeds the data set.
        optimizer: optimization algorithm.
        learning_rate: peak learning rate.
        weight_decay: weight decay of all trainable parameters; decoupled in adamw.
        momentum: momentum of sgd; first beta of adam and adamw.
        nesterov: Nesterov momentum (sgd with momentum > 0 only).
        beta2: second beta of adam and adamw.
        warmup: updates of linear learning-rate warm-up, at most the first half of `steps`.
        decay: learning-rate schedule from the peak to `final_learning_rate`, after the warm-up.
        final_learning_rate: learning rate of the last update.
        ema: decay of the moving average of the weights, min(ema, (1 + n) / (10 + n)) at update n; None: no average.
        clip: maximum norm of the gradient; None: no clipping.
        accumulate: gradient accumulation: parts in which each process computes its share of a batch, to save memory.
        precision: `fp32`, `bf16`, `fp16`, or `auto` (bf16 if the device supports it natively, else fp32).
        channels_last: store convolution weights in channels-last format, which is faster on most devices.
        compile: compile the network with torch.compile, which takes a minute and is faster afterwards on a GPU; results
            change by rounding. On a CPU this requires a C++ compiler.
        seed: seed of the data order and of all noise.
        workers: number of data loading processes; 0: load in the training process. Does not change results.
        validate_every: updates between validations; 0: once at the end (if there is validation data).
        patience: end the training when this many updates have not lowered the validation loss; 0: never.
        checkpoint_every: keep a checkpoint every this many updates; 0: none. A temporary one is written every ten
            minutes anyway.
        keep: numbers of updates after which a checkpoint is kept; default: none.
        checkpoint: weights to return: `last`, `best` (lowest validation loss), or the number of an update.
        device: training device: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        tensorboard: write TensorBoard logs to `tensorboard/` in the checkpoint folder.
    """

    steps: int = 2000
    batch_size: int = 64
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    beta2: float = 0.999
    warmup: int = 100
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final_learning_rate: float = 0.0
    ema: float | None = 0.999
    clip: float | None = 1.0
    accumulate: int = 1
    precision: PrecisionChoice = "auto"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    workers: int = 0
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 0
    keep: tuple[int, ...] = ()
    checkpoint: str = "last"
    device: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_options(self, "training option", _rules(self))

    @property
    def checkpoint_step(self) -> int | None:
        """The number of updates that `checkpoint` names; None for `last` and `best`."""
        return int(self.checkpoint) if self.checkpoint.isdecimal() else None


def _rules(c: TrainingConfig) -> list[tuple[str, bool, str]]:
    step = c.checkpoint_step
    return [
        *((name, getattr(c, name) >= 1, "1 or more") for name in ("steps", "batch_size", "accumulate")),
        *((n, getattr(c, n) >= 0, "0 or more") for n in ("warmup", "workers", "validate_every", "checkpoint_every")),
        ("patience", c.patience >= 0, "0 or more"),
        ("patience", not c.patience or c.validate_every > 0, "0, if validate_every is 0"),
        ("batch_size", c.batch_size % max(1, c.accumulate) == 0, f"a multiple of accumulate ({c.accumulate})"),
        ("optimizer", c.optimizer in ("adamw", "adam", "sgd"), "adamw, adam or sgd"),
        ("learning_rate", 0 < c.learning_rate < math.inf, "a positive number"),
        ("final_learning_rate", 0 <= c.final_learning_rate <= c.learning_rate, "0 to learning_rate"),
        ("weight_decay", 0 <= c.weight_decay < math.inf, "0 or more"),
        *((name, 0 <= getattr(c, name) < 1, "a number in [0, 1)") for name in ("momentum", "beta2")),
        ("decay", c.decay in ("constant", "cosine", "linear"), "constant, cosine or linear"),
        ("ema", c.ema is None or 0 <= c.ema < 1, "None or a number in [0, 1)"),
        ("clip", c.clip is None or c.clip > 0, "None or a positive number"),
        ("precision", c.precision in get_args(PrecisionChoice), "auto, fp32, bf16 or fp16"),
        ("checkpoint", c.checkpoint in ("last", "best") or step is not None, "last, best or a step number"),
        ("keep", all(1 <= kept <= c.steps for kept in c.keep), f"steps from 1 to steps ({c.steps})"),
        ("checkpoint", step is None or 1 <= step <= c.steps, f"a step from 1 to steps ({c.steps})"),
    ]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        steps: number of updates, including those before a resume.
        images: number of items seen, steps x batch_size.
        chosen_step: the update after which the network had the weights that it has now.
        best_step: the update with the lowest validation loss, `best_loss`; None without validation.
        losses: the last entry of `history` with a `loss`.
        history: one dict per log interval (about 200 per run) with `step`, the means of everything that the step
            returned since the previous entry, `grad_norm` (before clipping) and `learning_rate`; and one dict per
            validation with `step`, `validation_loss` and the other values of the step.
    """

    steps: int
    images: int
    chosen_step: int
    best_step: int | None
    best_loss: float | None
    losses: dict[str, float]
    history: list[dict[str, float]] = field(repr=False)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of update `step` (0 to steps - 1): linear warm-up to the peak, then decay to exactly the final
    rate. A run of one update uses the peak.
    """
    warmup = min(config.warmup, (config.steps - 1) // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.decay]
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * factor


def make_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name. Raises FaroutError if there is no parameter to train."""
    if not parameters:
        raise FaroutError("the network has no parameter with requires_grad=True; expected some to train")
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=nesterov, **common)
    optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    # one pass over all values instead of one for each operation: about half of the time on a CPU
    is_fused = all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
    return optimizer_class(parameters, betas=(config.momentum, config.beta2), fused=is_fused, **common)
