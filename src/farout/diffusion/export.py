"""Exports the denoiser of a diffusion model as one graph, and compares the graph with it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farout.core import store
from farout.core.errors import FaroutError
from farout.core.exported_folder import KIND, Export, write_export
from farout.core.graph_files import Format, GraphInput, check_runtime, open_graph
from farout.core.names import find_path
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.exported_denoiser import ExportedDenoiser
from farout.diffusion.model import DiffusionModel

__all__ = ["export_denoiser"]

_TOLERANCE = 1e-3
"""Largest difference of x0, in standard deviations of x."""
_LEVELS = 16


def export_denoiser(model: DiffusionModel | str | Path, out: str | Path, *, format: Format = "onnx") -> Export:
    """Write the denoiser of a diffusion model as one graph: x, sigma and classes in, x0 out.

    The graph contains the conversion of sigma, the network, the formation of x0, and the conditions of the classes. It
    contains neither a solver nor an autoencoder. It is run at sixteen noise levels, and nothing is written where x0
    differs by more than 1e-3 standard deviations of x.

    Args:
        model: a diffusion model, which is moved to the CPU, or its folder.
        out: a new folder, or that of an export, which is replaced.
        format: `onnx`, `openvino` or `torch`.

    Raises FaroutError where a library cannot express the network, and where x0 differs.
    """
    check_runtime(format)
    store.check_replaceable(out, KIND)
    loaded = DiffusionModel.load(find_path(model)) if isinstance(model, str | Path) else model
    loaded = loaded.to("cpu")
    module = ExportedDenoiser(loaded).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = [
        GraphInput("x", torch.randn(2, *loaded.shape, generator=generator)),
        GraphInput("sigma", torch.tensor([1.0, 2.0])),
    ]
    if module.has_classes:
        inputs.append(GraphInput("classes", torch.tensor([0, 0])))
    return write_export(
        module,
        inputs,
        {"x0": f"float32 (B, {', '.join(map(str, loaded.shape))})"},
        Path(out),
        format,
        about=_describe(loaded, module),
        compare=lambda folder: _compare(folder, format, loaded, module),
        card=_card(loaded, module, format),
    )


def _compare(folder: Path, file_format: Format, model: DiffusionModel, module: ExportedDenoiser) -> dict[str, Any]:
    """The parity report; raises FaroutError where x0 differs."""
    run = open_graph(folder, file_format, ["x0"])
    generator = torch.Generator().manual_seed(1)
    levels = torch.linspace(0, model.schedule.num_levels - 1, _LEVELS, dtype=torch.float64)
    sigma = model.schedule.sigma_of(levels).float()  # levels of the schedule, and between them
    low, high = model.x0_range or (-1.0, 1.0)
    x0 = low + (high - low) * torch.rand(_LEVELS, *model.shape, generator=generator)
    x = x0 + expand_dims(sigma, x0) * torch.randn(x0.shape, generator=generator)
    arrays, condition = [x.numpy(), sigma.numpy()], None
    if model.conditioning is not None:
        classes = torch.arange(_LEVELS) % model.conditioning.num_classes
        arrays.append(classes.numpy())
        condition = model.conditioning(classes)
    with torch.no_grad():
        expected = model.denoiser()(x, sigma, condition).numpy()
        if module.null_class is not None:  # rows without a class
            assert model.conditioning is not None
            null = model.denoiser()(x, sigma, model.conditioning.null_condition(_LEVELS)).numpy()
    found = run(*arrays)["x0"]
    unit = x.flatten(1).std(1).numpy().reshape(-1, 1, 1, 1)
    differences = np.abs(found - expected) / unit
    if module.null_class is not None:
        without = run(*arrays[:2], np.full(_LEVELS, module.null_class))["x0"]
        differences = np.maximum(differences, np.abs(without - null) / unit)
    alone = run(*(array[:1] for array in arrays))["x0"]
    report: dict[str, Any] = {
        "rows": _LEVELS,
        "compared_on": "random images with noise of levels from 0 to the last one",
        "max_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "batch_difference": float(np.abs((alone - found[:1]) / unit[:1]).max()),
        "unit": "standard deviations of x",
        "tolerance": _TOLERANCE,
        "processor": platform.machine(),
    }
    if not max(report["max_difference"], report["batch_difference"]) <= _TOLERANCE:
        raise FaroutError(
            f"the graph's x0 differs from the denoiser's by up to {report['max_difference']:.3g} standard deviations "
            f"of x, expected at most {_TOLERANCE:g}; nothing was written"
        )
    return report


def _describe(model: DiffusionModel, module: ExportedDenoiser) -> dict[str, Any]:
    """What the graph contains, for `config.json`."""
    names = () if model.conditioning is None else model.conditioning.class_names
    outside = ["noise", "the solver, which calls the graph once per step", "guidance", "clamping of x0"]
    if model.autoencoder is not None:
        outside.append("the autoencoder: x and x0 are latents")
    return {
        "content": "denoiser",
        "model_hash": model.content_hash,
        "x": {
            "space": "pixels" if model.autoencoder is None else "latents",
            "x0_range": model.x0_range,
            "data_range": list(model.data_range),
            "b_scale": model.b_scale,
            "image_size": list(model.preprocessing.size),
        },
        "sigma": {
            "meaning": "x = x0 + sigma noise; sigma = sqrt((1 - abar) / abar)",
            "smallest": float(model.schedule.sigma[0]),
            "largest": float(model.schedule.sigma[-1]),
        },
        "classes": list(names),
        "null_class": module.null_class,
        "in_the_graph": ["sigma to the network's time", "scaling of x", "conditions of the classes", "network", "x0"],
        "not_in_the_graph": outside,
    }


def _card(model: DiffusionModel, module: ExportedDenoiser, file_format: Format) -> str:
    """The model card."""
    names = ["x", "sigma", "classes"][: 3 if module.has_classes else 2]
    shown = ", ".join(f'"{name}": {name}' for name in names)
    run = {
        "onnx": [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            f'x0 = session.run(["x0"], {{{shown}}})[0]',
        ],
        "openvino": [
            "import openvino",
            'graph = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
            f'x0 = graph([{", ".join(names)}])["x0"]',
        ],
        "torch": [
            "import torch",
            "# a pickle may be part of this file: load your own exports only",
            'graph = torch.export.load("model.pt2").module()',
            f"x0 = graph({', '.join(f'torch.from_numpy({name})' for name in names)}).numpy()",
        ],
    }[file_format]
    shape = ", ".join(map(str, model.shape))
    arrays = [
        "noise = np.random.default_rng(0).standard_normal",
        f"sigma = np.array([{float(model.schedule.sigma[-1]):.4g}], dtype=np.float32)",
        f"x = sigma[:, None, None, None] * noise((1, {shape})).astype(np.float32)",
    ]
    if module.has_classes:
        arrays.append("classes = np.array([0])  # int64; see `classes` and `null_class` in config.json")
    lines = [
        "# The denoiser of a farout diffusion model as a graph",
        "",
        "x = x0 + sigma noise in, the expected x0 out. `config.json` describes inputs and outputs, and what is not "
        "part of the graph; `parity.json` how x0 was compared with the denoiser's.",
        "",
        "```python",
        "import numpy as np",
        run[0],
        "",
        *arrays,
        *run[1:],
        "```",
        "",
    ]
    return "\n".join(lines)
