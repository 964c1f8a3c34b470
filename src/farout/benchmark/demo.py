"""The demo: a small benchmark on the built-in sample, with a diffusion model that is part of the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from farout.benchmark.benchmark_plan import plan_benchmark
from farout.benchmark.job_graph import FinishedJob
from farout.benchmark.runner import BenchmarkReport, run_benchmark
from farout.benchmark.specification import BenchmarkSpec, DetectorSpec, NetworkSpec
from farout.data.catalog import SAMPLE
from farout.detectors import DETECTORS
from farout.diffusion.config import PRESETS, DiffusionConfig
from farout.evaluation.scored_datasets import METHOD_SCORE
from farout.training.config import TrainingConfig

__all__ = [
    "BASELINES",
    "DIFFUSION",
    "ID",
    "OOD",
    "SAMPLE_MODEL",
    "SAMPLE_STEPS",
    "TRAIN",
    "demo",
    "demo_benchmark",
    "summarize_demo",
]

TRAIN, ID = "sample_fashion:train", "sample_fashion:test"
OOD = {"digits": "sample_digits:test", "upside down": "sample_fashion:test@vflip"}
"""The out-of-distribution sources by what the demo calls them: other objects, and the same ones in another position."""
SAMPLE_MODEL = SAMPLE / "diffusion"
"""A trained diffusion model of `TRAIN`: the preset `tiny` with the network `mini`; its README contains the command."""
SAMPLE_IMAGES, SAMPLE_STEPS = 4000, 700
"""Number of images that it was given, some of which were held out, and of its training steps."""
DIFFUSION = ("semantic", "reconstruction")
BASELINES = ("mahalanobis", "pca", "knn")
"""Baselines on the backbone of `semantic`, with their defaults, like all methods here."""


def demo_benchmark(
    *, limit: int = 100, images: int = 1000, seed: int = 0, train: bool = False, steps: int | None = None
) -> BenchmarkSpec:
    """The benchmark that the demo runs; see `demo`."""
    training = TrainingConfig(**PRESETS["tiny"]["training"])
    generator = NetworkSpec(
        "diffusion",
        folder=None if train else str(SAMPLE_MODEL),
        limit=SAMPLE_IMAGES,
        model=DiffusionConfig(**{**PRESETS["tiny"]["model"], "network": "mini"}),
        training=replace(training, steps=SAMPLE_STEPS if steps is None else steps),
    )
    on_images = {name for name in DIFFUSION if DETECTORS[name].load().requirements.diffusion == "images"}
    return BenchmarkSpec(
        name="demo",
        about="clothes (FashionMNIST) against handwritten digits (MNIST), and against clothes that are upside down",
        train=TRAIN,
        id=ID,
        ood={name: (source,) for name, source in OOD.items()},
        limit=limit,
        train_limit=images,
        seeds=(seed,),
        random_weights_baselines=False,  # `farout bench` has them; here they would take half of the time
        networks={"generator": generator},
        detectors={
            name: DetectorSpec(name, diffusion="generator", statistics=max(2, images // 10))
            if name in on_images
            else DetectorSpec(name)
            for name in (*DIFFUSION, *BASELINES)
        },
    )


def demo(out: str | Path, **settings: Any) -> Iterator[FinishedJob | BenchmarkReport]:
    """Fit and evaluate detectors on the built-in sample: two of diffusion, and baselines.

    Args:
        out: a folder; the results of an earlier demo with other settings are replaced, an interrupted one continues.
        **settings: `limit`: number of images scored of each set; `images`: number of images to fit the detectors on;
            `seed`; `train`: train the diffusion model of images instead of using that of the package, for `steps`
            steps (None: `SAMPLE_STEPS`).

    Yields:
        Each finished job, and the tables at the end.
    """
    yield from run_benchmark(plan_benchmark(demo_benchmark(**settings), out), redo=True)


def summarize_demo(report: BenchmarkReport) -> pd.DataFrame:
    """A row for each method, by decreasing mean: whether it uses diffusion, its AUROC on each set with the largest half
    width of their 95 % intervals, their mean, the false-alarm rate and the number of images per second.
    """
    own = report.metrics[report.metrics["indicator"] == METHOD_SCORE]
    rows = []
    for name, part in own.groupby("detector", sort=False):
        aurocs = {short: float(part.loc[part["ood_group"] == short, "auroc"].iloc[0]) for short in OOD}
        rows.append(
            {
                "detector": name,
                "uses_diffusion": name in DIFFUSION,
                **aurocs,
                "mean": sum(aurocs.values()) / len(aurocs),
                "half_width": float((part["auroc_high"] - part["auroc_low"]).max() / 2),
                "false_alarms": float(part["false_alarm"].iloc[0]),
                "images_per_s": float(part["images_per_s"].iloc[0]),
            }
        )
    return pd.DataFrame(rows).sort_values("mean", ascending=False, kind="stable", ignore_index=True)
