"""The libraries that evaluate networks: torch itself, torch.compile, OpenVINO and ONNX Runtime.

A network is converted when it is first called, for one shape of its inputs and any number of rows, and the result is
compared with torch's. A network that cannot be converted runs in torch, and the log says why.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from farout.core.devices import Precision, autocast
from farout.core.errors import FaroutError, MissingExtraError
from farout.core.graph_files import silence_libraries

__all__ = [
    "Backend",
    "BackendChoice",
    "NetworkRunner",
    "check_backend",
    "explain_unusable_backend",
    "use_eager",
]

logger = logging.getLogger(__name__)

Backend = Literal["eager", "compile", "openvino", "onnxruntime"]
BackendChoice = Literal["auto", "eager", "compile", "openvino", "onnxruntime"]
"""A backend as users name it; see `farout.core.runtime.Runtime`."""

_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "openvino": ("openvino", ("openvino",)),
    "onnxruntime": ("onnx", ("onnx", "onnxruntime")),
}
"""Extra of farout and packages of each backend that torch does not include."""
_TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.05}
"""Largest difference of a converted network's outputs, as a share of their largest absolute value.

Larger differences are not due to rounding: a converter that does not know an operation's behavior may give wrong values
silently.
"""
_FEWEST_FIXED_ROWS, _MAX_COMPILED = 3, 6
"""OpenVINO compiles a network for each number of rows above the first, until it has compiled it that many times."""
_is_eager: ContextVar[bool] = ContextVar("farout_is_eager", default=False)


@contextmanager
def use_eager() -> Iterator[None]:
    """Inside this context all networks run in torch: hooks and counters of torch see no other library's operations."""
    token = _is_eager.set(True)
    try:
        yield
    finally:
        _is_eager.reset(token)


def explain_unusable_backend(backend: Backend, device: torch.device, precision: Precision) -> str:
    """Why a backend cannot be used on this machine; empty if it can."""
    if backend == "eager":
        return ""
    if backend == "compile":
        return "" if device.type != "cpu" or _find_compiler() else "torch.compile on a CPU requires a C++ compiler"
    extra, packages = _EXTRAS[backend]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        return f'it requires {" and ".join(missing)}: pip install "farout[{extra}]"'
    if device.type != "cpu":
        return f"it runs networks on the CPU only, and the device is {device}"
    if precision == "fp32":
        return ""
    if backend == "onnxruntime":
        return f"it computes in fp32 only, and the precision is {precision}"
    return "" if precision == "bf16" and _openvino_has_bf16() else f"it does not compute in {precision} here"


def check_backend(backend: str, device: torch.device, precision: Precision) -> Backend:
    """The backend; raises FaroutError for a name that does not exist, and for one that cannot be used here."""
    if backend not in get_args(Backend):
        raise FaroutError(f"the backend is {backend!r}; expected {', '.join(get_args(BackendChoice))}")
    known: Any = backend
    reason = explain_unusable_backend(known, device, precision)
    if reason:
        kind = MissingExtraError if "pip install" in reason else FaroutError
        raise kind(f"the backend {backend} cannot be used: {reason}; or use backend auto or eager")
    checked: Backend = known
    return checked


def _find_compiler() -> str | None:
    """The C++ compiler that torch.compile would use."""
    names = [os.environ.get("CXX", ""), "cl" if sys.platform == "win32" else "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _openvino_has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 natively, with the instructions that the environment allows."""
    # its kernels read the same variable as torch's, and version 2026.4 crashes in bf16 when they are restricted
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    if limit not in ("ALL", "DEFAULT") and not limit.endswith(("BF16", "AMX", "FP16")):
        return False
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class NetworkRunner:
    """Calls a module in evaluation mode by a backend, with conversions made at the first call and kept.

    Args:
        module: tensors (B, ...) -> a float32 tensor (B, ...), row by row, with any B.
        name: what the log calls the network.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._converted: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}

    def __call__(self, *inputs: Tensor, backend: Backend = "eager", precision: Precision = "fp32") -> Tensor:
        """The module's output; by torch if gradients are recorded, or the module cannot be converted."""
        if backend == "eager" or _is_eager.get() or torch.is_grad_enabled():
            return self._run_eager(inputs, precision)
        # a network whose weights have changed is converted again
        weights = sum(_version_of(each) for each in (*self.module.parameters(), *self.module.buffers()))
        shapes = tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in inputs)
        key = (backend, precision, torch.get_num_threads(), weights, shapes)
        if key not in self._converted:
            for stale in [each for each in self._converted if each[3] != weights]:
                del self._converted[stale]
            self._converted[key] = self._convert(inputs, backend, precision)
        converted = self._converted[key]
        return self._run_eager(inputs, precision) if converted is None else converted(*inputs)

    def _run_eager(self, inputs: Sequence[Tensor], precision: Precision) -> Tensor:
        with autocast(inputs[0].device, precision):
            output: Tensor = self.module(*inputs)
        return output

    def _convert(
        self, inputs: Sequence[Tensor], backend: Backend, precision: Precision
    ) -> Callable[..., Tensor] | None:
        """The converted module; None, with a line in the log, if that fails or changes its outputs."""
        started = time.perf_counter()
        try:
            reason = explain_unusable_backend(backend, inputs[0].device, precision)
            if not reason:
                with silence_libraries():
                    converted = _CONVERTERS[backend](self.module.eval(), [_take_rows(x, 2) for x in inputs], precision)
                    reason = self._find_difference(converted, inputs, precision)
        except Exception as error:  # noqa: BLE001  # converters raise errors of any kind for what they do not support
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if reason:
            logger.warning("backend: %s cannot run the %s (%.300s); torch runs it", backend, self.name, reason)
            return None
        logger.info("backend: %s runs the %s (ready in %.1f s)", backend, self.name, time.perf_counter() - started)
        return converted

    def _find_difference(self, converted: Callable[..., Tensor], inputs: Sequence[Tensor], precision: Precision) -> str:
        """Describe how the outputs for one and for three rows differ from torch's; empty if only by rounding."""
        for count in (3, 1):
            rows = [_take_rows(tensor, count) for tensor in inputs]
            expected, found = self._run_eager(rows, precision), converted(*rows)
            if found.shape != expected.shape:
                return f"its output has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
            if not difference <= _TOLERANCES[precision]:
                return f"its outputs differ by {difference:.2g} of the largest value"
        return ""


def _version_of(tensor: Tensor) -> int:
    """A number that increases when the tensor is changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _take_rows(tensor: Tensor, count: int) -> Tensor:
    """`count` rows of a tensor, repeated if it has fewer."""
    repeated = tensor[torch.arange(count, device=tensor.device) % len(tensor)]
    return repeated.contiguous()


def _compile(module: nn.Module, examples: Sequence[Tensor], precision: Precision) -> Callable[..., Tensor]:
    compiled = torch.compile(module)

    def run(*inputs: Tensor) -> Tensor:
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # otherwise each number of rows is compiled
        with autocast(inputs[0].device, precision):
            output: Tensor = compiled(*inputs)
        return output

    return run


def _convert_to_openvino(module: nn.Module, examples: Sequence[Tensor], precision: Precision) -> Callable[..., Tensor]:
    import openvino

    # tracing takes a second; torch.export and its conversion take ten
    traced = torch.jit.trace(module, tuple(examples), check_trace=False, strict=False)
    graph = openvino.convert_model(traced, example_input=tuple(examples))
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    core, compiled = openvino.Core(), dict[int, Any]()

    def compile_for(rows: int) -> Any:
        graph.reshape({index: [rows, *tensor.shape[1:]] for index, tensor in enumerate(examples)})
        return core.compile_model(graph, "CPU", settings)

    def run(*inputs: Tensor) -> Tensor:
        # group normalization is only fused, twice as fast, for a fixed number of rows
        rows = len(inputs[0])
        if rows not in compiled:
            rows = rows if rows > _FEWEST_FIXED_ROWS and len(compiled) < _MAX_COMPILED else -1
        if rows not in compiled:
            compiled[rows] = compile_for(rows)
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        # its own output is overwritten by the next call
        return torch.from_numpy(compiled[rows](arrays, share_inputs=True, share_outputs=False)[0])

    return run


def _convert_to_onnxruntime(
    module: nn.Module, examples: Sequence[Tensor], precision: Precision
) -> Callable[..., Tensor]:
    import onnxruntime

    names = [f"input{index}" for index in range(len(examples))]
    with tempfile.TemporaryDirectory(prefix="farout-onnx-") as folder:
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(
            module,
            tuple(examples),
            path,
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "output"]},
            dynamo=False,  # tracing takes a second, dynamo ten
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    accepted = {each.name for each in session.get_inputs()}

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in zip(names, inputs, strict=True)}
        found = session.run(["output"], {name: array for name, array in arrays.items() if name in accepted})
        return torch.from_numpy(found[0])

    return run


_CONVERTERS: dict[str, Callable[[nn.Module, Sequence[Tensor], Precision], Callable[..., Tensor]]] = {
    "compile": _compile,
    "openvino": _convert_to_openvino,
    "onnxruntime": _convert_to_onnxruntime,
}
