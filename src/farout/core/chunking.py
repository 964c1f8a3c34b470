"""Splitting network calls by memory, and work lists into blocks with fixed boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError

__all__ = ["BatchSize", "blocks_containing", "call_in_chunks", "check_batch_size"]

BatchSize = int | Literal["auto"]
"""The most rows of one network call; `auto`: what a memory budget holds."""

_CACHE_BUDGET = 8 * 2**20
"""Bytes of the largest activation of one call that still fit a processor's caches: larger calls are slower per row."""
_CPU_BUDGET = 64 * 2**20
"""Bytes of the largest activation up to which a call on a CPU has at least `_CPU_ROWS` rows: tiny calls are slow."""
_CPU_ROWS = 4
_ACCELERATOR_SHARE = 64
"""On an accelerator the largest activation of a call takes at most this fraction (1/64) of the device's memory."""
_MOST_ROWS = 4096

# Largest activation of one row, in values, by network and shape of its inputs. The memory of a network is not known
# from its configuration (timm, diffusers and the user's own modules), so it is measured once, on one row.
_row_values: WeakKeyDictionary[nn.Module, dict[tuple[torch.Size, ...], int]] = WeakKeyDictionary()


def check_batch_size(batch_size: BatchSize) -> BatchSize:
    """The batch size as given; raises FaroutError unless it is `auto` or an integer of at least 1."""
    if batch_size != "auto" and batch_size < 1:
        raise FaroutError(f"batch_size is {batch_size}; expected auto, or at least 1")
    return batch_size


def call_in_chunks(
    network: nn.Module, call: Callable[..., Tensor], *inputs: Tensor, batch_size: BatchSize = "auto"
) -> Tensor:
    """`call(*inputs)` in as few calls as memory allows, of nearly equal size; the results are concatenated.

    The split depends on the shapes, the network and the device only, never on free memory or earlier calls, so that
    the same command gives the same bytes again. Results of one row in another batch agree up to rounding: matrix
    libraries choose their kernels by shape.

    Args:
        network: the module that `call` runs; it decides the memory of a row.
        call: tensors (B, …) -> tensor (B, …), row by row.
        inputs: tensors (B, …) of the same length.
        batch_size: the most rows of one call; `auto`: by memory.
    """
    count = len(inputs[0])
    if count <= 1:
        return call(*inputs)
    size = _auto_rows(network, call, inputs) if batch_size == "auto" else batch_size
    chunks = -(-count // size)
    if chunks == 1:
        return call(*inputs)
    return torch.cat([call(*parts) for parts in zip(*(tensor.tensor_split(chunks) for tensor in inputs), strict=True)])


def _auto_rows(network: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    known = _row_values.setdefault(network, {})
    shapes = tuple(tensor.shape[1:] for tensor in inputs)
    if shapes not in known:
        known[shapes] = _largest_activation(network, call, inputs)
    row_bytes = 4 * known[shapes]
    device = next((parameter.device for parameter in network.parameters()), inputs[0].device)
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // _ACCELERATOR_SHARE
        return max(1, min(budget // row_bytes, _MOST_ROWS))
    fitting = max(_CACHE_BUDGET // row_bytes, min(_CPU_ROWS, _CPU_BUDGET // row_bytes))
    return max(1, min(fitting, _MOST_ROWS))


def _largest_activation(network: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Values of the largest tensor that a module of the network returns for one row."""
    largest = max(tensor[:1].numel() for tensor in inputs)

    def note(_module: nn.Module, _args: object, output: object) -> None:
        nonlocal largest
        for value in output if isinstance(output, list | tuple) else (output,):
            if isinstance(value, Tensor):
                largest = max(largest, value.numel())

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.no_grad():
            call(*(tensor[:1] for tensor in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return largest


def blocks_containing(missing: Iterable[int], size: int, count: int) -> list[range]:
    """The blocks [0, size), [size, 2 size), … of `range(count)` that contain a missing index.

    Work that is resumed computes a block as a whole, also where part of it is done: a result then comes from the same
    batch, and has the same bytes, as in a run without interruption.
    """
    starts = sorted({index - index % size for index in missing})
    return [range(start, min(start + size, count)) for start in starts]
