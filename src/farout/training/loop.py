"""The training loop: devices, precision, processes, moving average, clipping, validation, checkpoints, exact resume.

Everything that trains a network goes through `train`. It is given a step, which turns a batch into losses, and knows
nothing of images or methods. Under `accelerate launch` or `torchrun` it trains in several processes, one device each.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset

from farout.core import progress, store
from farout.core.devices import autocast, join_processes, resolve_precision
from farout.core.errors import FaroutError, StoreError
from farout.core.interruption import Interruption, defer_interruption, received_interruption
from farout.core.profiling import timed
from farout.training.checkpoints import (
    checkpoint_weights,
    describe_differences,
    newest_checkpoint,
    prune_checkpoints,
    read_optimizer,
    read_state,
    step_folder,
    write_checkpoint,
)
from farout.training.config import Losses, Step, TrainingConfig, TrainingResult, learning_rate, make_optimizer
from farout.training.data_order import DataOrder, make_loader, num_items, seed_of
from farout.training.log import RunningMeans, TrainingLog

__all__ = ["Step", "TrainingConfig", "TrainingResult", "train"]

logger = logging.getLogger(__name__)

_MAY_CHANGE_ON_RESUME = ("compile", "device", "workers", "tensorboard")
_HISTORY_ENTRIES = 200
_CHECKPOINT_INTERVAL_S = 600.0
"""Seconds of training that a crash may cost: after them a temporary checkpoint is written."""


def train(
    network: nn.Module,
    step: Step,
    data: Dataset[Any],
    config: TrainingConfig,
    *,
    out: Path | None = None,
    validation: Dataset[Any] | Mapping[str, Dataset[Any]] | None = None,
    resume: bool = False,
    fingerprint: str = "",
    description: str = "training",
    items: str = "images",
    short_last_batch: bool = False,
) -> TrainingResult:
    """Train `network` in place; afterwards it has the chosen weights, on its device, in eval mode.

    Args:
        network: the network with its initial weights; parameters with `requires_grad=False` are not changed.
        step: turns a batch into losses (see `Step`). It gets the network itself, also in several processes.
        data: items by index, or by `item_at(position, index)` if the data set has it, collated by torch's
            rules.
        config: the training settings.
        out: folder of the checkpoints (see `training.checkpoints`). They are written after each multiple of
            `checkpoint_every` and the steps in `keep` (kept), after the best validation so far, after the step that
            `checkpoint` names, every ten minutes, at an interruption and at the end; of the others only the newest is
            kept. None: no checkpoints.
        validation: held-out items, or several sets of them by name, the first of which chooses the `best` step. Their
            losses are means over the items, with the averaged weights and the same noise each time.
        resume: continue from the newest complete checkpoint in `out`, exactly as if never interrupted (with the same
            number of processes, device and libraries); without a checkpoint, start anew. Without `resume`, an `out`
            with checkpoints is refused.
        fingerprint: identifies the data and all that is learned, for instance a hash; a resumed run must have the same.
        description: name of the work in progress bars and logs.
        items: what the items are, in the plural, likewise.
        short_last_batch: end each epoch with a smaller batch, if the data do not divide evenly; by default it is filled
            up from the next epoch. Requires one process and `accumulate` 1.

    Raises:
        FaroutError: for settings that cannot work, and if the loss or the gradient is no longer finite.
        StoreError: for a resume with other settings, data or network.
        MissingExtraError: if TensorBoard logs are required and tensorboard is not installed.
    """
    sets = {} if validation is None else validation if isinstance(validation, Mapping) else {"validation": validation}
    for name, dataset in {"data": data, **sets}.items():
        if not (hasattr(dataset, "__len__") and len(dataset) > 0):
            raise FaroutError(
                f"the training's {name} ({type(dataset).__name__}) has no items or no length; expected items by index"
            )
    if config.validate_every and not sets:
        raise FaroutError(f"validate_every is {config.validate_every}, but there is no validation data; give some or 0")
    if config.checkpoint == "best" and not config.validate_every:
        raise FaroutError("checkpoint is 'best', but validate_every is 0; give validation data and an interval")
    if out is None and (resume or config.tensorboard or config.checkpoint_every or config.keep):
        raise FaroutError("resume, tensorboard, checkpoint_every and keep require a folder, but out is None; give one")
    if out is not None and not resume and any(step_folder(out, 0).parent.glob("step_*")):
        raise FaroutError(
            f"{out} contains checkpoints of an earlier run; continue it with --resume (resume=True), or remove it"
        )

    run = TrainingRun(network, step, data, config, out, sets, fingerprint, description, items, short_last_batch)
    checkpoint = newest_checkpoint(out) if resume and out is not None else None
    if checkpoint is not None:
        run.load(checkpoint)
    elif resume:
        logger.info("no checkpoint in %s to resume from; training starts from the beginning", out)
    return run.run()


class TrainingRun:
    """One run of the training loop; see `train` for the arguments.

    Attributes:
        completed: number of completed updates.
        average: the network with the moving average of the weights; None if the run has no average.
    """

    def __init__(
        self,
        network: nn.Module,
        step: Step,
        data: Dataset[Any],
        config: TrainingConfig,
        out: Path | None,
        validation: Mapping[str, Dataset[Any]],
        fingerprint: str,
        description: str,
        items: str,
        short_last_batch: bool,
    ) -> None:
        self.step, self.data, self.config, self.validation = step, data, config, validation
        self.out, self.fingerprint, self.short_last_batch = out, fingerprint, short_last_batch
        self.description, self.items = description, items
        self.processes = join_processes(config.device)
        self.device = self.processes.device
        self.precision = resolve_precision(config.precision, self.device)

        # Each update's batch is computed in parts: `accumulate` forward passes in each process.
        self.parts = config.accumulate * self.processes.num_processes
        if config.batch_size % self.parts:
            raise FaroutError(
                f"batch_size {config.batch_size} is the number of items of one update over all "
                f"{self.processes.num_processes} processes with {config.accumulate} parts each; expected a multiple of "
                f"{self.parts}"
            )
        if short_last_batch and self.parts > 1:
            raise FaroutError(f"{description} runs in one process and with accumulate 1, got {self.parts} parts")
        self.part_size = config.batch_size // self.parts

        self.network = network.to(self.device)
        if config.channels_last:
            for parameter in network.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.processes.broadcast([*network.parameters(), *network.buffers()])
        self.average = copy.deepcopy(network).eval().requires_grad_(False) if config.ema is not None else None
        self.trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trainable, config)
        # fp16 gradients underflow without a scaled loss.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.log = TrainingLog(max(1, config.steps // _HISTORY_ENTRIES))

        self.completed = 0
        self.validation_loss: float | None = None  # the last one
        self.best: dict[str, float] = {}  # step and loss of the best validation
        self.chosen_weights: dict[str, Tensor] | None = None  # those of the step that `checkpoint` names
        self.last_saved_step, self.last_validated_step, self.last_saved_time = 0, 0, time.monotonic()
        # An interruption can come at any point; these tell whether the weights are those of a completed update.
        self.is_consistent = True
        self.must_end = False  # one of several processes received a signal
        self.buffers = [buffer.clone() for buffer in network.buffers()]

    def run(self) -> TrainingResult:
        """Train to the end."""
        config, is_cuda = self.config, self.device.type == "cuda"
        logger.info(
            "%s: %d %s to train on%s; %d steps with batches of %d; %s parameters; processes: %d; %s, %s",
            self.description,
            num_items(self.data),
            self.items,
            "".join(f", {num_items(each)} for {name}" for name, each in self.validation.items()),
            config.steps,
            config.batch_size,
            f"{sum(parameter.numel() for parameter in self.trainable):,}",
            self.processes.num_processes,
            self.device,
            self.precision,
        )
        task = progress.task(
            self.description, config.steps, unit="steps", item=self.items, items_per_unit=config.batch_size
        )
        rng = torch.random.fork_rng(devices=[self.device] if is_cuda else [])
        with rng, task as bar, _compiled(self.network) if config.compile else nullcontext():
            self.network.train()
            if config.tensorboard and self.out is not None and self.processes.is_main_process:
                self.log.open_tensorboard(self.out / "tensorboard", self.completed)
            seed = (config.seed, "item")
            batches = iter(make_loader(self.data, self._batch_indices(), seed, config.workers, pin_memory=is_cuda))
            if self.completed:
                bar.skip(self.completed)
            # several processes end after the same update; one that ended alone would leave the others waiting for it
            is_alone = self.processes.num_processes == 1
            try:
                with nullcontext() if is_alone else defer_interruption():
                    self._validate_and_save()  # an interrupted run may not have got to it
                    while not self._has_ended():
                        self._update(batches)
                        self._validate_and_save()
                        bar.advance(1, self._describe_losses())
                        if self.must_end:
                            raise received_interruption() or Interruption(signal.SIGTERM)
            except BaseException as error:
                # a signal may also end worker processes, whose end is then reported first
                if isinstance(error, KeyboardInterrupt) or received_interruption() is not None:
                    try:
                        self._save_interrupted()
                    except RuntimeError:  # torch reports once, at any point, that the signal also ended its workers
                        self._save_interrupted()
                if self.must_end:
                    self.processes.wait_for_everyone()  # a launcher ends the others when the first one has ended
                raise
            finally:
                self.log.close()
        self.network.load_state_dict(self.chosen_weights or self._evaluated_network().state_dict())
        self.network.eval()
        return TrainingResult(
            steps=self.completed,
            images=self.completed * config.batch_size,
            chosen_step=self._chosen_step() or self.completed,
            best_step=self._best_step(),
            best_loss=self.best.get("loss"),
            losses=self.log.last_training_values(),
            history=self.log.history,
        )

    def _describe_losses(self) -> str:
        """The loss of the last update and of the last validation."""
        text = f"loss {self.log.recent[-1]:.4g}"
        return text if self.validation_loss is None else f"{text}, validation loss {self.validation_loss:.4g}"

    def _batch_indices(self) -> Iterator[list[tuple[int, int]]]:
        """(position, index) of the items of each forward pass of this process; the processes' shares are disjoint."""
        order = DataOrder(num_items(self.data), self.config.seed)
        for update in range(self.completed, self.config.steps):
            positions = order.positions_of_update(update, self.config.batch_size, self.short_last_batch)
            for part in range(self.processes.process_index, self.parts, self.processes.num_processes):
                share = positions[part * self.part_size : (part + 1) * self.part_size]
                yield [(position, order[position]) for position in share]

    @timed("training")
    def _update(self, batches: Iterator[Any]) -> None:
        """Train on one batch: one optimizer step for each dict of losses that the step returns."""
        config = self.config
        rate = learning_rate(config, self.completed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        means = RunningMeans()
        parts = [self._backward(next(batches), part) for part in range(config.accumulate)]
        with ExitStack() as whole_update:
            for losses_of_parts in zip(*parts, strict=True):
                names = sorted(losses_of_parts[0])
                losses = torch.stack([torch.stack([part[name] for part in losses_of_parts]).sum() for name in names])
                for parameter in self.trainable:
                    if parameter.grad is None:  # unused in this step, perhaps in this process only
                        parameter.grad = torch.zeros_like(parameter)
                self.processes.average([parameter.grad for parameter in self.trainable if parameter.grad is not None])
                signals = losses.new_tensor([float(received_interruption() is not None)])
                self.processes.average([losses, signals])
                self.must_end = self.processes.num_processes > 1 and bool(signals)
                self.scaler.unscale_(self.optimizer)
                norm = nn.utils.clip_grad_norm_(self.trainable, config.clip or math.inf)
                numbers = torch.cat([losses, norm.float().reshape(1)]).tolist()  # one wait for the device per update
                values = dict(zip([*names, "grad_norm"], numbers, strict=True))
                self._check_finite(values)
                means.add(values)

                if self.is_consistent:
                    whole_update.enter_context(defer_interruption())  # so that a checkpoint can be written after it
                    self.is_consistent = False
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
            self.processes.broadcast(self.network.buffers())
            if self.average is not None and config.ema is not None:
                decay = min(config.ema, (1 + self.completed) / (10 + self.completed))
                with torch.no_grad():
                    torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
                    for average, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
                        average.copy_(buffer)
            self.buffers = [buffer.clone() for buffer in self.network.buffers()]
            self.completed += 1
            values = {**means.pop(), "learning_rate": rate}
            self.log.add_update(self.completed, values, is_last=self.completed == config.steps)
            self.is_consistent = True

    def _backward(self, batch: Any, part: int) -> Iterator[Losses]:
        """Add the gradients of one part of a batch; yield its share of the mean losses, update by update."""
        seed = (self.completed, self.processes.process_index, part)
        for losses in self._compute_losses(self.network, batch, *seed):
            torch.autograd.backward(self.scaler.scale(losses["loss"] / self.config.accumulate))
            yield {name: value.detach().float().reshape(()) / self.config.accumulate for name, value in losses.items()}

    def _compute_losses(self, network: nn.Module, batch: Any, *seed: object) -> Iterator[Losses]:
        """The losses that the step returns or yields; its generator and torch's own are seeded by `seed`."""
        torch.manual_seed(seed_of(self.config.seed, "global", *seed))
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "step", *seed))
        with autocast(self.device, self.precision):
            returned = self.step(network, send_to_device(batch, self.device, non_blocking=True), generator)
        updates = returned if isinstance(returned, Iterator) else iter([returned])
        while True:
            with autocast(self.device, self.precision):
                losses = next(updates, None)
            if losses is None:
                return
            is_scalars = isinstance(losses, dict) and all(
                isinstance(value, Tensor) and value.numel() == 1 for value in losses.values()
            )
            if not is_scalars or "loss" not in losses:
                raise FaroutError(f"the step returned {losses!r:.200}; expected a dict of scalar tensors with a 'loss'")
            yield losses

    def _check_finite(self, values: dict[str, float]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return
        # In fp16 the gradient overflows now and then: the scaler skips the update and lowers its scale.
        is_overflow = self.precision == "fp16" and math.isfinite(values["loss"]) and self.scaler.get_scale() > 2**-10
        if not is_overflow:
            recent = ", ".join(f"{loss:.4g}" for loss in self.log.recent) or "none"
            raise FaroutError(
                f"training step {self.completed + 1}: the loss is {values['loss']:g} and the norm of its gradient "
                f"{values['grad_norm']:g} in {self.precision}; the last finite losses were {recent}. Try a lower "
                f"learning_rate than {self.config.learning_rate:g}, a longer warmup, clip, or precision=fp32; "
                "checkpoints written before are intact"
            )

    def _validate_and_save(self) -> None:
        """Validate, keep the chosen weights and write a checkpoint if they are due; a second call changes nothing."""
        config = self.config
        if self.completed == 0:
            return
        if self.validation and self._is_due(config.validate_every) and self.last_validated_step != self.completed:
            self._validate()
        if config.checkpoint != "last" and self._chosen_step() == self.completed:
            weights = self._evaluated_network().state_dict()
            self.chosen_weights = {name: value.cpu().clone() for name, value in weights.items()}
        if self.out is None or self.last_saved_step == self.completed:
            return
        if self._is_due(config.checkpoint_every) or self.completed in self._kept_steps():
            self._save(self.out)
            self.processes.wait_for_everyone()  # until the checkpoint is written
        elif self.processes.is_main_process and time.monotonic() - self.last_saved_time >= _CHECKPOINT_INTERVAL_S:
            self._save(self.out)  # by the clock of one process: the others wait for it in the next update

    def _has_ended(self) -> bool:
        """Whether all updates are completed, or `patience` of them without a lower validation loss."""
        patience, best_step = self.config.patience, self._best_step()
        is_patient = not patience or best_step is None or self.completed - best_step < patience
        return self.completed == self.config.steps or not is_patient

    def _is_due(self, interval: int) -> bool:
        return self._has_ended() or (interval > 0 and self.completed % interval == 0)

    def _evaluated_network(self) -> nn.Module:
        return self.network if self.average is None else self.average

    def _best_step(self) -> int | None:
        return int(self.best["step"]) if self.best else None

    def _chosen_step(self) -> int | None:
        named_steps = {"last": self.completed, "best": self._best_step()}
        return named_steps.get(self.config.checkpoint, self.config.checkpoint_step)

    def _kept_steps(self) -> tuple[int | None, ...]:
        return (self._best_step(), self.config.checkpoint_step, *self.config.keep)

    @timed("training")
    def _validate(self) -> None:
        """Add the mean losses over each validation set to the log; a batch has the same seed in any process."""
        network = self._evaluated_network().eval()
        stride = self.processes.num_processes * self.part_size
        values: dict[str, float] = {}
        for set_name, dataset in self.validation.items():
            count, means = num_items(dataset), RunningMeans()
            starts = range(self.processes.process_index * self.part_size, count, stride)
            batches = [[(i, i) for i in range(start, min(start + self.part_size, count))] for start in starts]
            loader = make_loader(dataset, batches, (self.config.seed, "validation"), self.config.workers)
            for indices, batch in zip(batches, loader, strict=True):
                with torch.no_grad():
                    losses = next(self._compute_losses(network, batch, "validation", indices[0][0]))
                means.add({f"{set_name}_{name}": float(value) for name, value in losses.items()}, len(indices))
            set_values = RunningMeans.merge(self.processes.gather_objects(means.sums)).pop()
            if f"{set_name}_loss" not in set_values:
                raise FaroutError(f"no validation loss is finite at training step {self.completed}; try precision=fp32")
            values |= set_values
        self.network.train()
        self.validation_loss = values[f"{next(iter(self.validation))}_loss"]
        if not self.best or self.validation_loss < self.best["loss"]:
            self.best = {"step": self.completed, "loss": self.validation_loss}
        self.last_validated_step = self.completed
        self.log.add_entry(self.completed, values)

    def _state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        return {
            "step": self.completed,
            "config": {**asdict(self.config), "precision": self.precision, "keep": list(self.config.keep)},
            "fingerprint": self.fingerprint,
            "processes": self.processes.num_processes,
            "data_size": num_items(self.data),
            "random_state": "derived from seed, step and process",
            "best": self.best,
            "validated": self.last_validated_step,
            "scaler": self.scaler.state_dict(),
            "torch": torch.__version__,
            **self.log.state_dict(),
        }

    @timed("writing")
    def _save(self, out: Path) -> None:
        if self.processes.is_main_process:
            average = None if self.average is None else self.average.state_dict()
            folder = step_folder(out, self.completed)
            write_checkpoint(folder, self.network.state_dict(), average, self.optimizer.state_dict(), self._state())
            prune_checkpoints(out, [self.completed, *self._kept_steps()], self.config.checkpoint_every)
        # Set last, so that an interruption of the lines above saves again.
        self.last_saved_step, self.last_saved_time = self.completed, time.monotonic()

    def _save_interrupted(self) -> None:
        """Save the last completed update; the processes do not wait for each other, because some may have ended."""
        if self.out is None or self.last_saved_step == self.completed:
            return
        if not self.is_consistent:
            logger.warning("interrupted within an update: no checkpoint of step %d can be written", self.completed)
            return
        # The interrupted forward pass may have changed running statistics.
        for buffer, completed in zip(self.network.buffers(), self.buffers, strict=True):
            buffer.copy_(completed)
        self._save(self.out)

    def load(self, folder: Path) -> None:
        """Restore a checkpoint; raises StoreError if it belongs to another run or network."""
        with store.explain_load_errors(folder):
            self._restore(folder, read_state(folder))

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        differences = describe_differences(_resumable_settings(state), _resumable_settings(self._state()))
        if differences:
            raise StoreError(
                f"training cannot resume from {folder}, which differs:\n  " + "\n  ".join(differences) + "\n"
                "use the same options and data, or start again in another folder"
            )
        try:
            self.network.load_state_dict(checkpoint_weights(folder, average=False))
            if self.average is not None:
                self.average.load_state_dict(checkpoint_weights(folder, average=True))
        except RuntimeError as error:
            raise StoreError(f"{folder} contains the weights of another network: {error}") from error
        self.optimizer.load_state_dict(read_optimizer(folder))
        self.scaler.load_state_dict(state["scaler"])
        self.completed = self.last_saved_step = state["step"]
        self.last_validated_step, self.best = state["validated"], state["best"]
        self.log.load_state_dict(state)
        self.buffers = [buffer.clone() for buffer in self.network.buffers()]
        chosen_step = self._chosen_step()
        if self.out is not None and chosen_step is not None and chosen_step < self.completed:
            self.chosen_weights = checkpoint_weights(step_folder(self.out, chosen_step))


@contextmanager
def _compiled(network: nn.Module) -> Iterator[None]:
    """Inside this context the network runs compiled. It stays the same object, which a step may look at.

    Afterwards it runs as before: scoring has batches of many sizes, each of which would be compiled.
    """
    network.compile()
    try:
        yield
    finally:
        network._compiled_call_impl = None  # `Module.compile` has no opposite


def _resumable_settings(state: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must have in common with the checkpoint."""
    config = {name: value for name, value in state["config"].items() if name not in _MAY_CHANGE_ON_RESUME}
    return {**config, **{name: state[name] for name in ("fingerprint", "processes", "data_size")}}
