"""What the benchmarks share: seeded parts of a source, what is compared and how it is written, the machine in words."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import detection_metrics

__all__ = ["VARIANTS", "auroc_cell", "compared", "decided", "fresh_images", "interval", "known", "machine", "table"]

VARIANTS = ("rot90", "rot180", "blur", "contrast", "noise", "patch")
"""How training images are changed to be out-of-distribution, where defaults are chosen."""
Pair = tuple[np.ndarray, np.ndarray]
"""Scores of in-distribution and of out-of-distribution images."""


def fresh_images(spec: str, model: DiffusionModel, count: int, seed: int) -> ImageSource:
    """A seeded choice of `count` images of a source that the model has not been trained on, in source order."""
    source = open_source(spec)
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = [int(i) for i in order[: 20 * count] if source.content_hash(int(i)) not in model.trained_on]
    return source.subset(sorted(chosen[:count]))


def known(out: Path, **where: object) -> bool:
    """Whether the file has rows with these values."""
    if not out.is_file():
        return False
    done = pd.read_csv(out)
    return bool(np.logical_and.reduce([done[name] == value for name, value in where.items()]).any())


def compared(pair: Pair, first: Pair, second: Pair, groups: Pair | None = None) -> dict[str, Any]:
    """Metrics of a pair, and the AUROC of the first less that of the second, paired."""
    found, gap = detection_metrics(*pair, groups=groups), paired_difference(first, second, groups=groups)
    return {
        **{"auroc": found.auroc, "low": found.auroc_low, "high": found.auroc_high, "fpr95": found.fpr95},
        **{"n_id": found.n_id, "n_ood": found.n_ood},
        **{"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high},
    }


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


def interval(value: float, low: float, high: float, form: str = ".3f") -> str:
    """A figure with its interval."""
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


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
