"""Devices, precision, and groups of processes that work together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, distributed

from farout.core.errors import FaroutError

__all__ = [
    "Precision",
    "PrecisionChoice",
    "ProcessGroup",
    "autocast",
    "in_float64",
    "is_main_process",
    "join_processes",
    "num_processes",
    "resolve_device",
    "resolve_precision",
    "single_process",
]

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""A precision as users name it; see `resolve_precision`."""
T = TypeVar("T")

# Processes wait for each other without a limit of their own: the launcher ends all of them when one fails.
_TIMEOUT = timedelta(days=7)
_DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})
_is_single_process: ContextVar[bool] = ContextVar("farout_is_single_process", default=False)


def num_processes() -> int:
    """The number of processes that `accelerate launch` or `torchrun` started; 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal():
        raise FaroutError(f"WORLD_SIZE, a variable of launchers, is {given!r}; expected a number of processes")
    return int(given)


def is_main_process() -> bool:
    """Whether this process writes the results: it is the only one, or the first of several."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def single_process() -> Iterator[None]:
    """Inside this context, `join_processes` returns a group of this process only."""
    token = _is_single_process.set(True)
    try:
        yield
    finally:
        _is_single_process.reset(token)


def resolve_device(device: str) -> torch.device:
    """The device with a name: "auto" (CUDA if present, else CPU), "cpu", "cuda", "cuda:1" or "mps".

    "cuda" is the current device, or under a launcher the device of this process.

    Raises:
        FaroutError: for an unknown name, and for a device that this machine does not have.
    """
    is_available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    try:
        resolved = torch.device(device if device != "auto" else "cuda" if is_available["cuda"] else "cpu")
    except RuntimeError as error:
        raise FaroutError(f"there is no device named {device!r}; expected auto, cpu, cuda, cuda:1 or mps") from error
    is_missing_gpu = resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()
    if not is_available.get(resolved.type, False) or is_missing_gpu:
        names = ", ".join(name for name, available in is_available.items() if available)
        raise FaroutError(f"the device {device!r} is not available; this machine has {names} (or use auto)")
    if resolved.type == "cuda" and resolved.index is None:
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is None:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    return resolved


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """fp32, bf16 or fp16; "auto" is bf16 if the device computes in it natively, else fp32.

    Raises:
        FaroutError: for an unknown precision, and for fp16 on a CPU, where it is neither fast nor stable.
    """
    if precision == "auto":
        return "bf16" if _has_native_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise FaroutError("precision fp16 requires a GPU, but the device is the CPU; use fp32 (or auto)")
    if precision not in get_args(Precision):
        raise FaroutError(f"the precision is {precision!r}; expected auto, fp32, bf16 or fp16")
    return cast("Precision", precision)


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # An emulated bf16 is slower than fp32, so support by the compiler is not enough.
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """A context in which networks compute in `precision`; fp32 changes nothing, so an outer context stays in force."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def in_float64(values: Tensor) -> Tensor:
    """`values` in float64, on their device, or on the CPU if their device does not support it (Apple's MPS)."""
    # The move comes first: in one call, torch may convert on the device that does not support float64.
    return (values.cpu() if values.device.type in _DEVICES_WITHOUT_FLOAT64 else values).double()


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one command, and what they exchange; by default this process only.

    The names are those of accelerate, which does the communication. Its functions act on all processes of the
    launcher, so a group of one process does not call them, and does not take the time to import accelerate.
    """

    device: torch.device
    num_processes: int = 1
    process_index: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process, which writes files."""
        return self.process_index == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.num_processes == 1:
            return
        from accelerate.utils import reduce

        # One message for all gradients is much faster than one message per parameter.
        means = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
        for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of the main process."""
        if self.num_processes == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            # Backends send contiguous memory only, and weights may be channels-last.
            tensor.detach().copy_(broadcast(tensor.detach().contiguous()))

    def gather_objects(self, item: T) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.num_processes == 1:
            return [item]
        from accelerate.utils import gather_object

        return cast("list[T]", gather_object([item]))

    def split_between_processes(self, items: Sequence[T]) -> list[T]:
        """This process's share of items that all processes have.

        accelerate's function of this name gives contiguous parts, and in older versions the last item to every
        process that has none. With every n-th item, all processes work near the front of the list, so that an
        interrupted run has completed its first items.
        """
        return list(items[self.process_index :: self.num_processes])

    def wait_for_everyone(self) -> None:
        """Block until all processes have reached this point."""
        if self.num_processes > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def run_on_main_process(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process while the others wait, and return its result in all of them.

        Raises:
            FaroutError, OSError: raised by `function`; in the other processes a FaroutError with the same message.
        """
        result: T | None = None
        error: FaroutError | OSError | None = None
        if self.is_main_process:
            try:
                with single_process():
                    result = function()
            except (FaroutError, OSError) as raised:
                error = raised
        if self.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            message = None if error is None else str(error)
            result, message = broadcast_object_list([result, message])
            if message is not None and not self.is_main_process:
                raise FaroutError(message)
        if error is not None:
            raise error
        return cast("T", result)


def join_processes(device: str) -> ProcessGroup:
    """Connect the processes that a launcher started; without a launcher, the group is this process.

    accelerate's `Accelerator` is not used: the first one built fixes the mixed precision of the whole process, and it
    wraps the network in `DistributedDataParallel`, which hides the network's attributes and all methods but `forward`
    from the training step.

    Raises:
        FaroutError: if accelerate was set up before with another device or number of processes.
    """
    resolved = resolve_device(device)
    if num_processes() == 1 or _is_single_process.get():
        return ProcessGroup(resolved)
    from accelerate import PartialState

    is_first_call = not distributed.is_initialized()
    state = PartialState(cpu=resolved.type == "cpu", timeout=_TIMEOUT)
    if is_first_call:
        # A process that exits with an open group may abort: C++ then destroys threads of gloo that still run.
        atexit.register(_close_process_group)
    is_same_device = state.device.type == resolved.type and (
        resolved.type != "cuda" or state.device.index == resolved.index
    )
    if state.num_processes != num_processes() or not is_same_device:
        raise FaroutError(
            f"the launcher started {num_processes()} processes, and accelerate set up {state.num_processes} on "
            f"{state.device}, but the requested device is {device!r} ({resolved}); begin before any other accelerate "
            "object, and give device=auto, cuda or cpu"
        )
    return ProcessGroup(resolved, state.num_processes, state.process_index)


def _close_process_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
