"""The folder of an exported graph: the graph, its description, and how it was compared with the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from farout.core import store
from farout.core.graph_files import GRAPH_FILES, Format, GraphInput, runtime_versions, write_graph
from farout.core.names import expand_path

__all__ = ["KIND", "Export", "write_export"]

KIND = "exported graph"


@dataclass(frozen=True)
class Export:
    """An exported graph.

    Attributes:
        folder: its folder.
        file: the graph's file.
        parity: the content of `parity.json`.
    """

    folder: Path
    file: Path
    parity: Mapping[str, Any]


def write_export(
    module: nn.Module,
    inputs: Sequence[GraphInput],
    outputs: Mapping[str, str],
    folder: Path,
    file_format: Format,
    *,
    about: Mapping[str, Any],
    compare: Callable[[Path], dict[str, Any]],
    card: str,
) -> Export:
    """Write a graph and compare it with what it was made from; the folder is complete, or does not exist.

    Args:
        module: computes the outputs from the inputs.
        inputs: inputs of the graph.
        outputs: type and shape of each output by name.
        folder: a new folder, or that of an export, which is replaced.
        file_format: format of the graph.
        about: further content of `config.json`.
        compare: runs the graph of a folder and returns the report of the comparison; raises FaroutError if it differs.
        card: text of `README.md`.
    """
    folder = expand_path(folder)
    store.check_replaceable(folder, KIND)
    with store.atomic_folder(folder, KIND) as temporary:
        write_graph(module, inputs, list(outputs), temporary, file_format)
        parity = compare(temporary)
        content = {
            "graph": {
                "format": file_format,
                "file": GRAPH_FILES[file_format],
                "versions": runtime_versions(file_format),
                "inputs": {each.name: each.describe() for each in inputs},
                "outputs": dict(outputs),
                "precision": "float32 networks; statistics and scores in float64 where the runtime has it",
            },
            **about,
        }
        store.write_config(temporary, KIND, content)
        store.write_json(temporary / "parity.json", parity)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Export(folder, folder / GRAPH_FILES[file_format], parity)
