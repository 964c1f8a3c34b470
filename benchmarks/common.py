"""What the benchmarks share: markdown tables, seeded parts of a source, the machine in words."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from farout.diffusion.model import DiffusionModel
from farout.images.sources import ImageSource, open_source

__all__ = ["auroc_cell", "decided", "fresh_images", "machine", "table"]


def fresh_images(spec: str, model: DiffusionModel, count: int, seed: int) -> ImageSource:
    """A seeded choice of `count` images of a source that the model has not been trained on, in source order."""
    source = open_source(spec)
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = [int(i) for i in order[: 20 * count] if source.content_hash(int(i)) not in model.trained_on]
    return source.subset(sorted(chosen[:count]))


def machine() -> str:
    """CPU, threads and the instruction set that torch's kernels are limited to."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), platform.processor()
    )
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
    return f"{name}, {torch.get_num_threads()} threads, {limit}, torch {torch.__version__}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def auroc_cell(rows: pd.DataFrame) -> str:
    """Of several runs: the mean, their range, the outermost ends of their intervals, and `decided`."""
    spread = f"{rows['auroc'].min():.3f}-{rows['auroc'].max():.3f}, " if len(rows) > 1 else ""
    return f"{rows['auroc'].mean():.3f} ({spread}{rows['low'].min():.3f} to {rows['high'].max():.3f}){decided(rows)}"


def decided(rows: pd.DataFrame) -> str:
    """In how many runs the paired interval of the default's lead excludes zero: + ahead, - behind."""
    ahead, behind = int((rows["difference_low"] > 0).sum()), int((rows["difference_high"] < 0).sum())
    return "".join([f" +{ahead}" if ahead else "", f" -{behind}" if behind else ""])


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
