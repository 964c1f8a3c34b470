"""The one training loop of the house: devices, precision, processes, moving average, clipping, exact resume.

It is given a step that turns a batch into losses, and knows nothing of images or methods. Started under
`accelerate launch` or `torchrun` it trains in several processes, one device each.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset

from farout.core import progress
from farout.core.devices import autocast, join_processes, resolve_precision
from farout.core.errors import FaroutError, StoreError
from farout.training.checkpoints import (
    checkpoint_weights,
    differences,
    newest_checkpoint,
    prune_checkpoints,
    read_optimizer,
    read_state,
    step_folder,
    write_checkpoint,
)
from farout.training.config import Step, TrainingConfig, TrainingResult, learning_rate, make_optimizer
from farout.training.data_order import DataOrder, loader, seed_of
from farout.training.log import Means, TrainingLog

__all__ = ["Step", "TrainingConfig", "TrainingResult", "train"]

logger = logging.getLogger(__name__)

_FREE_ON_RESUME = ("device", "workers", "tensorboard")
_LOG_POINTS = 200
_LOSS_S = 600.0
"""Seconds of training that a crash may cost: then a checkpoint is written, which the next one replaces."""


def train(
    network: nn.Module,
    step: Step,
    data: Dataset,
    config: TrainingConfig,
    *,
    out: Path | None = None,
    validation: Dataset | None = None,
    resume: bool = False,
    fingerprint: str = "",
) -> TrainingResult:
    """Trains `network` in place; afterwards it holds the chosen weights, on its device, in eval mode.

    Args:
        network: starts from the weights that it has; parameters with `requires_grad=False` stay as they are.
        step: what turns a batch into losses (see `Step`). It gets the network itself, also in several processes.
        data: items by index, or by `at(position, index)` where it has that, collated into batches by torch's rules.
        config: how.
        out: where checkpoints go (see `training.checkpoints`): after each multiple of `checkpoint_every` and the steps
            in `keep` (kept), after the best validation so far, after the step that `checkpoint` names, every ten
            minutes, at an interruption and at the end; of the others only the newest stays. None: nothing is written.
        validation: held-out items; the mean of the step's losses with the averaged weights, the same noise each time.
        resume: go on from the newest whole checkpoint of `out`, exactly as if never interrupted (with the same number
            of processes, device and libraries); without any, start anew. An `out` with checkpoints is refused
            otherwise.
        fingerprint: what the data is, for instance a hash; a resumed run must have the same.

    Raises FaroutError for options that cannot work, and where the loss or the gradient is no longer finite;
    StoreError for a resume with other options, data or network; MissingExtraError without tensorboard.
    """
    _check_request(data, config, out, validation, resume)
    run = _Run(network, step, data, config, out, validation, fingerprint)
    folder = newest_checkpoint(out) if resume and out is not None else None
    if folder is not None:
        run.load(folder)
    elif resume:
        logger.info("no checkpoint in %s to resume from; training starts from the beginning", out)
    return run.run()


def _check_request(
    data: Dataset, config: TrainingConfig, out: Path | None, validation: Dataset | None, resume: bool
) -> None:
    for name, given in (("data", data), ("validation data", validation)):
        if given is not None and not (hasattr(given, "__len__") and len(given) > 0):
            raise FaroutError(f"the {name} ({type(given).__name__}) has no items or no length; expected items by index")
    if config.validate_every and validation is None:
        raise FaroutError(f"validate_every is {config.validate_every}, but there is no validation data; give some or 0")
    if config.checkpoint == "best" and not config.validate_every:
        raise FaroutError("checkpoint is 'best', but validate_every is 0; give validation data and an interval")
    if out is None and (resume or config.tensorboard or config.checkpoint_every or config.keep):
        raise FaroutError("resume, tensorboard, checkpoint_every and keep require a folder, but out is None; give one")
    if out is not None and not resume and any(step_folder(out, 0).parent.glob("step_*")):
        raise FaroutError(
            f"{out} holds checkpoints of an earlier run; give --resume (resume=True) or another folder, or remove them"
        )


def _channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _load_weights(network: nn.Module, folder: Path, average: bool) -> None:
    try:
        network.load_state_dict(checkpoint_weights(folder, average))
    except RuntimeError as error:
        raise StoreError(f"{folder} holds the weights of another network: {error}") from error


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the checkpoint."""
    options = {name: value for name, value in state["config"].items() if name not in _FREE_ON_RESUME}
    return {**options, **{name: state[name] for name in ("fingerprint", "processes", "data_size")}}


class _Run:
    """One training run: its state after `done` updates, and the update that brings it on."""

    def __init__(
        self,
        network: nn.Module,
        step: Step,
        data: Dataset,
        config: TrainingConfig,
        out: Path | None,
        validation: Dataset | None,
        fingerprint: str,
    ) -> None:
        self.step, self.data, self.config, self.validation = step, data, config, validation
        self.out, self.fingerprint = out, fingerprint
        self.processes = join_processes(config.device)
        self.precision = resolve_precision(config.precision, self.processes.device)
        self.part = self._share_of_batch()
        self.network = network.to(self.processes.device)
        if config.channels_last:
            _channels_last(network)
        self.processes.broadcast([*network.parameters(), *network.buffers()])
        self.average = copy.deepcopy(network).eval().requires_grad_(False) if config.ema is not None else None
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trained, config)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.precision == "fp16")
        self.done, self.saved, self.validated = 0, 0, 0
        self.saved_at = time.monotonic()
        self.best: dict[str, float] = {}
        self.chosen: dict[str, Tensor] | None = None
        self.log = TrainingLog(max(1, config.steps // _LOG_POINTS))
        self.whole, self.buffers = True, [buffer.clone() for buffer in network.buffers()]

    def _share_of_batch(self) -> int:
        """Items of one forward pass of one process."""
        size, parts = self.config.batch_size, self.config.accumulate * self.processes.num_processes
        if size % parts:
            raise FaroutError(
                f"batch_size {size} is the items of one update over all {self.processes.num_processes} processes with "
                f"{self.config.accumulate} parts each; expected a multiple of {parts}"
            )
        return size // parts

    def run(self) -> TrainingResult:
        """Trains to the end and leaves the chosen weights in the network."""
        cuda = [self.processes.device] if self.processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), progress.task("training", self.config.steps) as bar:
            self.network.train()
            if self.config.tensorboard and self.out is not None and self.processes.is_main_process:
                self.log.open(self.out / "tensorboard", self.done)
            bar.advance(self.done)
            try:
                self._after()  # what fell due after the last update before an interruption
                batches = self._batches()
                while self.done < self.config.steps:
                    self._update(batches)
                    bar.advance(1, f"loss {self.log.recent[-1]:.4g}")
                    self._after()
            except KeyboardInterrupt:
                self._save_interrupted()
                raise
            finally:
                self.log.close()
        return self._finish()

    def _batches(self) -> Iterator[Any]:
        pin = self.processes.device.type == "cuda"
        return iter(loader(self.data, self._places(), (self.config.seed, "item"), self.config.workers, pin))

    def _places(self) -> Iterator[list[tuple[int, int]]]:
        """Positions and items of this process: disjoint slices of the stream."""
        order = DataOrder(len(self.data), self.config.seed)
        parts = self.config.accumulate * self.processes.num_processes
        for number in range(
            self.done * parts + self.processes.process_index, self.config.steps * parts, self.processes.num_processes
        ):
            yield [(place, order[place]) for place in range(number * self.part, (number + 1) * self.part)]

    def _update(self, batches: Iterator[Any]) -> None:
        totals: dict[str, Tensor] = {}
        for part in range(self.config.accumulate):
            losses = self._losses(self.network, next(batches), self.done, self.processes.process_index, part)
            self.scaler.scale(losses["loss"] / self.config.accumulate).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.config.accumulate
        values = self._gradients(totals)
        self._check_finite(values)
        self.whole = False
        self._apply(values)
        self.whole = True

    def _losses(self, network: nn.Module, batch: Any, *seed: object) -> dict[str, Tensor]:
        """What the step answers; its generator and torch's own both follow from the seed."""
        torch.manual_seed(seed_of(self.config.seed, "global", *seed))
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "step", *seed))
        with autocast(self.processes.device, self.precision):
            losses = self.step(network, send_to_device(batch, self.processes.device, non_blocking=True), generator)
        scalars = isinstance(losses, dict) and all(isinstance(v, Tensor) and v.numel() == 1 for v in losses.values())
        if not scalars or "loss" not in losses:
            raise FaroutError(f"the step returned {losses!r:.200}; expected a dict of scalar tensors with a 'loss'")
        return losses

    def _gradients(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Averages gradients and logged values over the processes, clips, and returns the values."""
        for parameter in self.trained:
            if parameter.grad is None:  # unused in this step, perhaps in this process only
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained]
        self.processes.average(gradients)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.clip or math.inf)
        values = torch.stack([totals[name].reshape(()) for name in sorted(totals)])
        self.processes.average([values])
        numbers = torch.cat([values, norm.float().reshape(1)]).tolist()  # one wait for the device per update
        return dict(zip([*sorted(totals), "grad_norm"], numbers, strict=True))

    def _check_finite(self, values: dict[str, float]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return
        # In fp16 the gradient overflows now and then: the scaler skips the update and lowers its scale.
        overflow = self.precision == "fp16" and math.isfinite(values["loss"]) and self.scaler.get_scale() > 2**-10
        if not overflow:
            recent = ", ".join(f"{loss:.4g}" for loss in self.log.recent) or "none"
            raise FaroutError(
                f"training step {self.done + 1}: the loss is {values['loss']:g} and the norm of its gradient "
                f"{values['grad_norm']:g} in {self.precision}; the last finite losses were {recent}. Try a lower "
                f"learning_rate than {self.config.learning_rate:g}, a longer warmup, clip, or precision=fp32; "
                "checkpoints written before are intact"
            )

    def _apply(self, values: dict[str, float]) -> None:
        """Changes the state: weights, average, step and log. An interruption inside leaves it torn."""
        values["learning_rate"] = learning_rate(self.config, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = values["learning_rate"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.processes.broadcast(self.network.buffers())
        self._follow()
        self.buffers = [buffer.clone() for buffer in self.network.buffers()]
        self.done += 1
        self.log.add(self.done, values, last=self.done == self.config.steps)

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the average towards the weights; buffers are copied."""
        if self.average is None or self.config.ema is None:
            return
        decay = min(self.config.ema, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        for kept, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
            kept.copy_(now)

    def _after(self) -> None:
        """Validation, the chosen weights and the checkpoint that fall due now; a second call changes nothing."""
        if self.done == 0:
            return
        if self.validation is not None and self._due(self.config.validate_every) and self.validated != self.done:
            self._validate(self.validation)
        if self.config.checkpoint != "last" and self._chosen_step() == self.done:
            self.chosen = {name: value.cpu().clone() for name, value in self._current().state_dict().items()}
        marked = self.done in (self._best_step(), self.config.chosen_number, *self.config.keep)
        if self.out is None or self.saved == self.done:
            return
        if marked or self._due(self.config.checkpoint_every):
            self._save(self.out)
            self.processes.wait_for_everyone()  # until the checkpoint is written
        elif self.processes.is_main_process and time.monotonic() - self.saved_at >= _LOSS_S:
            self._save(self.out)  # by one process's clock: the others wait for it at their next average

    def _due(self, every: int) -> bool:
        return self.done == self.config.steps or (every > 0 and self.done % every == 0)

    def _current(self) -> nn.Module:
        return self.network if self.average is None else self.average

    def _best_step(self) -> int | None:
        return int(self.best["step"]) if self.best else None

    def _chosen_step(self) -> int | None:
        return {"last": self.done, "best": self._best_step()}.get(self.config.checkpoint, self.config.chosen_number)

    def _validate(self, data: Dataset) -> None:
        """Mean losses over `data`, weighted by items; each batch has its own seed, whoever computes it."""
        count, means = len(data), Means()
        starts = range(self.processes.process_index * self.part, count, self.processes.num_processes * self.part)
        places = [[(i, i) for i in range(start, min(start + self.part, count))] for start in starts]
        batches = loader(data, places, (self.config.seed, "validation"), self.config.workers, False)
        network = self._current().eval()
        for place, batch in zip(places, batches, strict=True):
            with torch.no_grad():
                losses = self._losses(network, batch, "validation", place[0][0])
            means.add({f"validation_{name}": float(value) for name, value in losses.items()}, len(place))
        self.network.train()
        values = Means.joined(self.processes.gather_objects(means.sums)).take()
        if "validation_loss" not in values:
            raise FaroutError(f"no validation loss is finite at training step {self.done}; try precision=fp32")
        if not self.best or values["validation_loss"] < self.best["loss"]:
            self.best = {"step": self.done, "loss": values["validation_loss"]}
        self.validated = self.done
        self.log.entry(self.done, values)

    def _state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        return {
            "step": self.done,
            "config": {**asdict(self.config), "precision": self.precision, "keep": list(self.config.keep)},
            "fingerprint": self.fingerprint,
            "processes": self.processes.num_processes,
            "data_size": len(self.data),
            "random_state": "derived from seed, step and process",
            "best": self.best,
            "validated": self.validated,
            "scaler": self.scaler.state_dict(),
            "torch": torch.__version__,
            **self.log.state(),
        }

    def _save(self, out: Path) -> None:
        if self.processes.is_main_process:
            ema = None if self.average is None else self.average.state_dict()
            folder = step_folder(out, self.done)
            write_checkpoint(folder, self.network.state_dict(), ema, self.optimizer.state_dict(), self._state())
            keep = [self.done, self._best_step(), self.config.chosen_number, *self.config.keep]
            prune_checkpoints(out, keep, self.config.checkpoint_every)
        self.saved, self.saved_at = self.done, time.monotonic()  # only now: an interruption above saves again

    def _save_interrupted(self) -> None:
        """Saves the last completed step; the processes do not wait for each other, as some may be gone."""
        if self.out is None or self.saved == self.done:
            return
        if not self.whole:
            logger.warning("interrupted within an update: no checkpoint of step %d can be written", self.done)
            return
        for buffer, kept in zip(self.network.buffers(), self.buffers, strict=True):
            buffer.copy_(kept)  # the interrupted forward pass may have moved running statistics
        self._save(self.out)

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint; raises StoreError where it belongs to another run or network."""
        state = read_state(folder)
        changed = differences(_settings(state), _settings(self._state()))
        if changed:
            raise StoreError(
                f"training cannot resume from {folder}, which differs:\n  " + "\n  ".join(changed) + "\n"
                "use the same options and data, or start again in another folder"
            )
        _load_weights(self.network, folder, average=False)
        if self.average is not None:
            _load_weights(self.average, folder, average=True)
        self.optimizer.load_state_dict(read_optimizer(folder))
        self.scaler.load_state_dict(state["scaler"])
        self.done = self.saved = state["step"]
        self.validated, self.best = state["validated"], state["best"]
        self.log.load(state)
        self.buffers = [buffer.clone() for buffer in self.network.buffers()]
        chosen = self._chosen_step()
        if self.out is not None and chosen is not None and chosen < self.done:
            self.chosen = checkpoint_weights(step_folder(self.out, chosen))

    def _finish(self) -> TrainingResult:
        self.network.load_state_dict(self.chosen or self._current().state_dict())
        self.network.eval()
        return TrainingResult(
            steps=self.done,
            images=self.done * self.config.batch_size,
            chosen_step=self._chosen_step() or self.done,
            best_step=self._best_step(),
            best_loss=self.best.get("loss"),
            losses=self.log.last(),
            history=self.log.history,
        )
