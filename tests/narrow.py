"""A pretend device that computes as the CPU does but knows no float64, as Apple's; torch takes it for `meta`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from farout.core import devices, runtime

HERE = "meta"
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class _There(Tensor):
    """A tensor on the device, whose numbers `inner` holds on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> _There:
        if inner.dtype == torch.float64:
            raise TypeError("the device has no float64")
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: _There = Tensor._make_wrapper_subclass(cls, inner.shape, device=HERE, **how)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Present(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Brings numbers of the program to the device, which torch does out of a dispatcher's sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there = tree_any(lambda x: isinstance(x, _There), (args, kwargs))
    if there:
        _check(func, args, kwargs)
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, _There) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = "cpu"
    found = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        return args[0]
    lands = there if device is None else torch.device(device).type == HERE
    return tree_map(lambda x: _There(x) if isinstance(x, Tensor) else x, found) if lands else found


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """What such a device refuses: tensors of the CPU beside its own, and to widen what it gives away."""
    if kwargs.get("dtype") == torch.float64:
        raise TypeError(f"{func} wants float64, which the device has not")
    apart = tree_any(lambda x: isinstance(x, Tensor) and not isinstance(x, _There) and x.ndim > 0, (args, kwargs))
    if apart and func not in _MOVES and not (func in _INDEXING and isinstance(args[0], _There)):
        raise RuntimeError(f"{func} was given tensors of the device and of the CPU")


@contextmanager
def narrow_device() -> Iterator[str]:
    """Inside it the device is there, under the name that it gives."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH), _Present(), _Literals():
        patch.setattr(devices, "_DEVICES_WITHOUT_FLOAT64", {HERE})
        patch.setattr(runtime, "resolve_device", torch.device)
        yield HERE
