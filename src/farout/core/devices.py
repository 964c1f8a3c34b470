"""Devices, precision, and the processes that work together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from farout.core.errors import FaroutError

__all__ = [
    "Precision",
    "PrecisionChoice",
    "Team",
    "alone",
    "autocast",
    "first_process",
    "in_float64",
    "join",
    "launched",
    "resolve_device",
    "resolve_precision",
]

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""As users name it; see `resolve_precision`."""
T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long processes wait for each other; the launcher ends them all where one is gone."""
_NO_FLOAT64 = frozenset({"mps"})
"""Types of devices that cannot hold float64."""
_alone: ContextVar[bool] = ContextVar("farout_alone", default=False)


def first_process() -> bool:
    """Whether this process writes what all processes made: the only one, or the first of several."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def launched() -> int:
    """How many processes `accelerate launch` or `torchrun` has started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """What begins inside is this process's own work: `join` answers with a team of one."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def resolve_device(device: str) -> torch.device:
    """The device that "auto" (cuda, else cpu), "cpu", "cuda", "cuda:1" or "mps" names here.

    "cuda" is the current device, or under a launcher the one of this process. Raises FaroutError for a name that is
    unknown and for a device that is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    try:
        found = torch.device(device if device != "auto" else "cuda" if there["cuda"] else "cpu")
    except RuntimeError as error:
        raise FaroutError(f"there is no device named {device!r}; expected auto, cpu, cuda, cuda:1 or mps") from error
    if not there.get(found.type, False) or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        names = ", ".join(name for name, here in there.items() if here)
        raise FaroutError(f"the device {device!r} is not available; this machine has {names} (or use auto)")
    if found.type == "cuda" and found.index is None:
        local = os.environ.get("LOCAL_RANK")
        index = torch.cuda.current_device() if local is None else int(local) % torch.cuda.device_count()
        return torch.device("cuda", index)
    return found


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """fp32, bf16 or fp16; "auto" is bf16 where the device computes in it natively, else fp32.

    Raises FaroutError for another word, and for fp16 on a CPU, where it is neither fast nor stable.
    """
    if precision == "auto":
        return "bf16" if _native_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise FaroutError("precision fp16 requires a GPU, but the device is the CPU; use fp32 (or auto)")
    if precision not in get_args(Precision):
        raise FaroutError(f"the precision is {precision!r}; expected auto, fp32, bf16 or fp16")
    return precision  # type: ignore[return-value]


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # An emulated bf16 is slower than fp32, so support by the compiler is not enough.
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Inside it, networks compute in `precision`; fp32 changes nothing, so an outer block stays in force."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def in_float64(values: Tensor) -> Tensor:
    """`values` in float64: where they are, or on the CPU where their device has none (Apple's MPS)."""
    # first moved, then widened: asked for both at once, torch may widen on the side it comes from
    return (values.cpu() if values.device.type in _NO_FLOAT64 else values).double()


@dataclass(frozen=True)
class Team:
    """The processes that work together, and what they exchange."""

    device: torch.device
    count: int = 1
    index: int = 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in one message per dtype."""
        for dtype in {tensor.dtype for tensor in tensors} if self.count > 1 else ():
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            distributed.all_reduce(flat)
            parts = (flat / self.count).split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the tensors of the first one."""
        for tensor in tensors if self.count > 1 else ():
            message = tensor.detach().contiguous()
            distributed.broadcast(message, 0)
            tensor.detach().copy_(message)

    def gather(self, item: Any) -> list[Any]:
        """The items of all processes."""
        items = [item] * self.count
        if self.count > 1:
            distributed.all_gather_object(items, item)
        return items

    def part(self, items: Sequence[T]) -> list[T]:
        """Of items that all processes have, those of this one: disjoint slices."""
        return list(items[self.index :: self.count])

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which does it by itself; the others wait for it, and get the same.

        Where it raises a FaroutError or OSError there, all do.
        """
        done: tuple[Any, FaroutError | OSError | None] = (None, None)
        if self.index == 0:
            try:
                with alone():
                    done = (work(), None)
            except (FaroutError, OSError) as error:
                done = (None, error)
        value, failed = self.gather((done[0], None if done[1] is None else str(done[1])))[0]
        if failed is not None:
            raise done[1] or FaroutError(failed)
        return value


def join(name: str) -> Team:
    """Joins the processes of the launcher; alone without one.

    accelerate's Accelerator is not used: its mixed precision is fixed for the whole process by whoever builds the
    first one, and the wrapper of torch hides a network's attributes and every call but `forward` from the step.
    """
    device = resolve_device(name)
    world = launched()
    if world == 1 or _alone.get():
        return Team(device)
    is_first_call = not distributed.is_initialized()
    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    if is_first_call:
        # A process that exits with an open group may abort: C++ then destroys threads of gloo that still run.
        atexit.register(_close_process_group)
    same = state.device.type == device.type and (device.type != "cuda" or state.device.index == device.index)
    if state.num_processes != world or not same:
        raise FaroutError(
            f"the launcher started {world} processes, and accelerate set up {state.num_processes} on {state.device}, "
            f"but the requested device is {name!r} ({device}); begin before any other accelerate object, and "
            "give device=auto, cuda or cpu"
        )
    return Team(device, world, state.process_index)


def _close_process_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
