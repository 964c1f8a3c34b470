"""Comparison of a network with the header of its weights file, before memory for the network is allocated.

A configuration decides the size of a network. If it does not belong to the weights, building the network first could
take minutes and all memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from farout.core.errors import FaroutError, StoreError
from farout.core.files import open_regular_file
from farout.core.names import is_utf8

__all__ = ["check_network", "describe_differences", "limit_parameters", "read_shapes"]


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file by name, from its header.

    Raises StoreError for a file that is missing, cut short or damaged.
    """
    try:
        with open_regular_file(path) as content:
            if not is_utf8(path):  # safetensors opens only paths in UTF-8
                return {name: tuple(tensor.shape) for name, tensor in load(content.read()).items()}
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read as safetensors ({error})") from error


@torch.random.fork_rng(devices=[])
def check_network(build: Callable[[], nn.Module], weights: Path, name: str, *, largest: int | None = None) -> None:
    """Raise StoreError unless the network that `build` returns has the tensors of a safetensors file.

    The network is built without memory for its weights.

    Args:
        build: builds the network.
        weights: the file.
        name: of the network, for messages.
        largest: number of parameters above which building is given up; None: as many as there are in the file.
    """
    found = read_shapes(weights)
    try:
        most = largest or sum(map(math.prod, found.values()))
        with limit_parameters(most, name, weights), torch.device("meta"), _SkipInitialization():
            expected = {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
    except StoreError:
        raise
    except (FaroutError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return  # a constructor that computes with values; an error of the configuration is raised again by the caller
    problems = describe_differences(found, expected)
    if problems:
        raise StoreError(f"{weights} does not contain the weights of {name}: {'; '.join(problems)}")


class _SkipInitialization(TorchFunctionMode):
    """Leaves out the random initialization of tensors, which changes nothing on the device "meta".

    There, torch computes `normal_` in Python, and imports its compiler for that.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def describe_differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """How shapes by name differ from the expected ones, as text."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [key for key in expected if key in found and tuple(found[key]) != tuple(expected[key])]
    return [
        *([f"{len(missing)} tensors are missing, first {missing[0]}"] if missing else []),
        *([f"{len(unexpected)} are unexpected, first {unexpected[0]}"] if unexpected else []),
        *(f"{key} has shape {tuple(found[key])}, expected {tuple(expected[key])}" for key in wrong[:1]),
    ]


@contextmanager
def limit_parameters(largest: int, name: str, weights: Path) -> Iterator[None]:
    """Give up building a network in this context when it has more than `largest` parameters.

    Layers register their parameters before they initialize them, so a layer that is too large never fills memory.

    Raises StoreError.
    """
    thread, count = threading.get_ident(), 0

    def count_parameter(_: nn.Module, __: str, parameter: Any) -> None:
        nonlocal count
        if parameter is None or threading.get_ident() != thread:
            return
        count += parameter.numel()
        if count > largest:
            raise StoreError(
                f"{name} has more than the {largest:,} parameters that its weights {weights} allow; the configuration "
                "and the weights do not belong together"
            )

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        yield
    finally:
        handle.remove()
