"""Which levels and which score the one-shot default takes: judged on dev sources only.

    FAROUT_DATA=… python benchmarks/choose_default.py MODEL [--count 200]

MODEL is a folder made by `farout train diffusion fashion_mnist:train`. In-distribution: training images that the model
has not seen. Out-of-distribution: other such images, rotated, blurred, with less contrast, noisy, with a pasted patch.
No test image and no test set is read.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import VARIANTS, fresh_images, machine, table

from farout.detectors.base import Measurements, Runtime
from farout.detectors.reconstruction import Reconstruction
from farout.detectors.reconstruction.comparison import METRICS
from farout.detectors.reconstruction.indicators import Scorer
from farout.diffusion.model import DiffusionModel
from farout.evaluation.metrics import auroc

LEVELS = (10, 20, 40, 80, 120, 160, 200, 300, 400, 500)
LEVEL_SETS = {
    "all ten": LEVELS,
    "20,80,200,400": (20, 80, 200, 400),
    "10,40,120,300": (10, 40, 120, 300),
    "40,120,200,300": (40, 120, 200, 300),
    "80,160,300,500": (80, 160, 300, 500),
    "20,80,160,300": (20, 80, 160, 300),
    "20,40,80,160,300,400": (20, 40, 80, 160, 300, 400),
}
METRIC_SETS = {
    "mse+perceptual": ("mse", "perceptual"),
    "+eps+norm": ("mse", "perceptual", "eps_error", "score_norm"),
    "all five": METRICS,
    "no perceptual": ("mse", "ssim", "eps_error", "score_norm"),
}


def main() -> None:
    """Prints two tables: level sets, and metric sets, each by score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--statistics", type=int, default=400)
    arguments = parser.parse_args()
    model = DiffusionModel.load(arguments.model)
    detector = Reconstruction(levels=LEVELS, draws=2)
    detector.preprocessing = model.preprocessing
    detector.use(model, Runtime())

    def measure(variant: str, seed: int, count: int) -> Measurements:
        spec = f"fashion_mnist:train@{variant}" if variant else "fashion_mnist:train"
        return detector.measure_all(fresh_images(spec, model, count, seed), variant or "plain")

    statistics = measure("", 1, arguments.statistics)
    inside = measure("", 2, arguments.count)
    outside = {variant: measure(variant, 3, arguments.count) for variant in VARIANTS}
    print(f"n = {arguments.count} a set, {arguments.statistics} statistics images; {machine()}\n")
    for title, sets in (("levels", LEVEL_SETS), ("metrics", METRIC_SETS)):
        rows = []
        for name, chosen in sets.items():
            levels = chosen if title == "levels" else LEVEL_SETS["20,80,200,400"]
            metrics = METRIC_SETS["+eps+norm"] if title == "levels" else chosen
            for score, areas in judge(levels, metrics, statistics, inside, outside).items():
                rows.append([name, score, *areas.values(), float(np.mean(list(areas.values())))])
        print(table([title, "score", *VARIANTS, "mean"], rows), "\n")


def judge(
    levels: tuple[int, ...],
    metrics: tuple[str, ...],
    statistics: Measurements,
    inside: Measurements,
    outside: dict[str, Measurements],
) -> dict[str, dict[str, float]]:
    """AUROC of every score against every variant, from measurements restricted to `levels`."""
    scorer = Scorer(tuple(m for m in metrics if m in ("mse", "perceptual")) or metrics[:1], metrics, 0, 1000, 1)
    scorer.fit(at(statistics, levels), 0)
    own = scorer(at(inside, levels))
    others = {variant: scorer(at(measured, levels)) for variant, measured in outside.items()}
    return {
        score: {variant: auroc(own[score].numpy(), found[score].numpy()) for variant, found in others.items()}
        for score in ("mean_z", "two_sided", "mahalanobis", "mixture")
    }


def at(measured: Measurements, levels: tuple[int, ...]) -> Measurements:
    """The measurements of some levels."""
    assert measured.values is not None
    rows = torch.tensor([measured.levels.index(float(t)) for t in levels])
    return Measurements(measured.keys, measured.values[:, rows], tuple(map(float, levels)), measured.metrics)


if __name__ == "__main__":
    main()
