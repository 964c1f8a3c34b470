"""Functions that split network calls by memory, and lists of work into blocks with fixed boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from farout.core.backends import use_eager
from farout.core.errors import FaroutError

__all__ = ["BatchSize", "blocks_containing", "call_in_chunks", "check_batch_size"]

BatchSize = int | Literal["auto"]
"""Maximum number of rows of one network call; `auto`: as many as a memory budget allows."""

# All budgets are for the largest activation of one call, the largest tensor that a module of the network returns.
_CACHE_BUDGET = 8 * 2**20  # bytes that fit the caches of a processor: larger calls are slower per row
_CPU_BUDGET = 64 * 2**20  # bytes up to which a call on a CPU has at least `_MIN_CPU_ROWS`: very small calls are slow
_MIN_CPU_ROWS = 4
_ACCELERATOR_SHARE = 64  # on an accelerator, 1 / 64 of the device's memory
_MAX_ROWS = 4096
_MAX_BATCH_SIZE = 1_000_000

# Values in the largest activation of one row, by network and input shapes. The memory that a network needs does not
# follow from its configuration (timm, diffusers and the user's own modules), so it is measured once, on one row.
_largest_activations: WeakKeyDictionary[nn.Module, dict[tuple[torch.Size, ...], int]] = WeakKeyDictionary()


def check_batch_size(batch_size: BatchSize) -> BatchSize:
    """The batch size as given. Raises FaroutError unless it is `auto` or an integer from 1 to a million."""
    if batch_size != "auto" and not 1 <= batch_size <= _MAX_BATCH_SIZE:
        raise FaroutError(f"batch_size is {batch_size}; expected auto, or at least 1 and at most {_MAX_BATCH_SIZE:,}")
    return batch_size


def call_in_chunks(
    network: nn.Module, function: Callable[..., Tensor], *inputs: Tensor, batch_size: BatchSize = "auto"
) -> Tensor:
    """`function(*inputs)` in as few calls as memory allows, of nearly equal size; the results are concatenated.

    The split depends only on the shapes, the network and the device, never on free memory or earlier calls, so that
    the same command gives the same bytes again. A row's result in another batch is equal up to rounding, because matrix
    libraries choose their kernels by shape.

    Args:
        network: the module that `function` runs; it determines the memory of a row.
        function: tensors (B, …) -> tensor (B, …), row by row.
        inputs: tensors (B, …) of the same length.
        batch_size: maximum number of rows of one call; `auto`: by memory.
    """
    count = len(inputs[0])
    if count <= 1:
        return function(*inputs)
    chunks = -(-count // (_rows_that_fit(network, function, inputs) if batch_size == "auto" else batch_size))
    if chunks == 1:
        return function(*inputs)
    parts = zip(*(tensor.tensor_split(chunks) for tensor in inputs), strict=True)
    return torch.cat([function(*part) for part in parts])


def _rows_that_fit(network: nn.Module, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    measured = _largest_activations.setdefault(network, {})
    shapes = tuple(tensor.shape[1:] for tensor in inputs)
    if shapes not in measured:
        measured[shapes] = _measure_largest_activation(network, function, inputs)
    row_bytes = 4 * measured[shapes]
    device = next((parameter.device for parameter in network.parameters()), inputs[0].device)
    if device.type == "cuda":
        rows = torch.cuda.get_device_properties(device).total_memory // _ACCELERATOR_SHARE // row_bytes
    else:
        rows = max(_CACHE_BUDGET // row_bytes, min(_MIN_CPU_ROWS, _CPU_BUDGET // row_bytes))
    return int(max(1, min(rows, _MAX_ROWS)))


def _measure_largest_activation(network: nn.Module, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Number of values of the largest tensor that a module of the network returns for one row."""
    largest = max(tensor[:1].numel() for tensor in inputs)

    def record(_module: nn.Module, _args: object, output: object) -> None:
        nonlocal largest
        for value in output if isinstance(output, list | tuple) else (output,):
            if isinstance(value, Tensor):
                largest = max(largest, value.numel())

    handles = [module.register_forward_hook(record) for module in network.modules()]
    try:
        with torch.no_grad(), use_eager():
            function(*(tensor[:1] for tensor in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return largest


def blocks_containing(missing: Iterable[int], size: int, count: int) -> list[range]:
    """The blocks [0, size), [size, 2 size), … of `range(count)` that contain a missing index.

    Resumed work computes complete blocks, even if part of a block is finished: a result then comes from the same batch,
    and has the same bytes, as in a run without interruption.
    """
    starts = sorted({index - index % size for index in missing})
    return [range(start, min(start + size, count)) for start in starts]
