"""Graphs of torch modules in files that run without farout: ONNX, OpenVINO and torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError, MissingExtraError

__all__ = [
    "GRAPH_FILES",
    "Format",
    "GraphInput",
    "check_runtime",
    "open_graph",
    "runtime_versions",
    "silence_libraries",
    "write_graph",
]

Format = Literal["onnx", "openvino", "torch"]
GRAPH_FILES: dict[Format, str] = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
"""Name of the graph's file; ONNX writes weights of more than a gigabyte to a second file, OpenVINO all of them."""
_PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "torch": (),
}
_MAX_EMBEDDED_BYTES = 2**30
"""A file of protobuf holds less than two gigabytes."""
_MAX_SIDE, _MAX_BATCH = 2**16, 2**20


class GraphInput:
    """An input of a graph.

    Args:
        name: its name.
        example: a tensor of its type and shape, with two rows; the first axis is the batch, of any size.
        any_size: the last two axes have any size, too.
    """

    def __init__(self, name: str, example: Tensor, any_size: bool = False) -> None:
        self.name, self.example, self.any_size = name, example, any_size

    @property
    def shape(self) -> list[int | None]:
        """The shape; None where any size is allowed."""
        shape: list[int | None] = [None, *self.example.shape[1:]]
        return [*shape[:-2], None, None] if self.any_size else shape

    def describe(self) -> dict[str, Any]:
        """Type and shape, for the description of a graph."""
        return {"type": str(self.example.dtype).removeprefix("torch."), "shape": self.shape}


def check_runtime(file_format: Format) -> None:
    """Raise MissingExtraError where the libraries of a format are not installed, and FaroutError for another format."""
    if file_format not in GRAPH_FILES:
        raise FaroutError(f"there is no format {file_format!r}; expected {', '.join(GRAPH_FILES)}")
    for name in _PACKAGES[file_format]:
        try:
            __import__(name)
        except ImportError as error:
            raise MissingExtraError(
                f'the format {file_format} requires {name}: pip install "farout[{file_format}]" ({error})'
            ) from error


def runtime_versions(file_format: Format) -> dict[str, str]:
    """Versions of the libraries that write and run a format."""
    return {name: metadata.version(name) for name in ("torch", *_PACKAGES[file_format])}


def write_graph(
    module: nn.Module, inputs: Sequence[GraphInput], outputs: Sequence[str], folder: Path, file_format: Format
) -> None:
    """Trace a module and write its graph to a folder.

    Args:
        module: called with one tensor per input, in order; returns a tensor or a tuple of tensors.
        inputs: the arguments of its `forward`, with the same names.
        outputs: names of what it returns.
        folder: an existing folder.
        file_format: the format.

    Raises FaroutError where a library cannot express the module in this format.
    """
    check_runtime(file_format)
    with _convert_errors(file_format), silence_libraries():
        program = _trace(module, inputs)
        if file_format == "torch":
            torch.export.save(program, folder / GRAPH_FILES["torch"])
        elif file_format == "onnx":
            _write_onnx(program, inputs, outputs, folder)
        else:
            _write_openvino(program, inputs, outputs, folder)


@contextmanager
def _convert_errors(file_format: Format) -> Iterator[None]:
    """Convert errors of the libraries, of which there are many kinds, to one line."""
    try:
        yield
    except FaroutError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        versions = ", ".join(f"{name} {version}" for name, version in runtime_versions(file_format).items())
        raise FaroutError(f"{versions} cannot write or run this network as {file_format} ({reason:.300})") from error


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Without the messages of converters, which advise their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _trace(module: nn.Module, inputs: Sequence[GraphInput]) -> Any:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    shapes: dict[str, Any] = {}
    for each in inputs:
        axes = {0: batch}
        if each.any_size:
            last = each.example.ndim - 1
            axes[last - 1] = torch.export.Dim("height", min=1, max=_MAX_SIDE)
            axes[last] = torch.export.Dim("width", min=1, max=_MAX_SIDE)
        shapes[each.name] = axes
    with torch.no_grad():
        program = torch.export.export(
            module.eval(), tuple(each.example for each in inputs), dynamic_shapes=shapes, strict=False
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names of files on this machine
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
            # torch 2.6 otherwise fails to decompose products with a batch of any size for other formats
            return program.run_decompositions()
    return program


def _write_onnx(program: Any, inputs: Sequence[GraphInput], outputs: Sequence[str], folder: Path) -> None:
    names = [each.name for each in inputs]
    written = torch.onnx.export(program, (), dynamo=True, input_names=names, output_names=list(outputs))
    if written is None:
        raise FaroutError("torch.onnx.export has written nothing")
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    written.save(folder / GRAPH_FILES["onnx"], external_data=size > _MAX_EMBEDDED_BYTES)


def _write_openvino(program: Any, inputs: Sequence[GraphInput], outputs: Sequence[str], folder: Path) -> None:
    import openvino

    model = openvino.convert_model(program)
    model.reshape({index: [-1 if n is None else n for n in each.shape] for index, each in enumerate(inputs)})
    for port, each in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({each.name})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, folder / GRAPH_FILES["openvino"], compress_to_fp16=False)


def open_graph(folder: Path, file_format: Format, outputs: Sequence[str]) -> Callable[..., Mapping[str, np.ndarray]]:
    """The graph of a folder as a function from arrays, in the order of its inputs, to its outputs by name.

    Only for graphs that this process has written: a torch.export file may contain a pickle. This and the function raise
    FaroutError where a library cannot run the graph.
    """
    with _convert_errors(file_format):
        graph = _load_graph(folder / GRAPH_FILES[file_format], file_format, outputs)

    def run(*arrays: np.ndarray) -> Mapping[str, np.ndarray]:
        with _convert_errors(file_format):
            return graph(*arrays)

    return run


def _load_graph(path: Path, file_format: Format, outputs: Sequence[str]) -> Callable[..., Mapping[str, np.ndarray]]:
    if file_format == "torch":
        module: Any = torch.export.load(path).module()

        def run_torch(*arrays: np.ndarray) -> Mapping[str, np.ndarray]:
            with torch.no_grad():
                found = module(*map(torch.from_numpy, arrays))
            values = (found,) if isinstance(found, Tensor) else found
            return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

        return run_torch
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda *arrays: dict(zip(outputs, session.run(list(outputs), dict(zip(names, arrays)))))
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run_openvino(*arrays: np.ndarray) -> Mapping[str, np.ndarray]:
        found = compiled(list(arrays))
        return {name: np.array(found[name]) for name in outputs}

    return run_openvino
