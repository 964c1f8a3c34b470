"""Score norms (msma) and paths to noise (diffpath) beside the one-shot reconstruction, on the same weights and images.

    FAROUT_DATA=… python benchmarks/rivals.py compare MODEL [--train SPEC --id SPEC --ood SPEC …] [--count 100]
    FAROUT_DATA=… python benchmarks/rivals.py choose MODEL [--train SPEC] [--count 60]

MODEL is a folder made by `farout train diffusion`. `compare` rates every score on test sets, a seeded choice of
`--count` images each; `choose`, what the defaults are chosen by, reads training images only: as they are
(in-distribution) and changed (out-of-distribution). The model has not been trained on any of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from common import VARIANTS, fresh_images, interval, machine, table

from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Detector, Measurements, Runtime
from farout.detectors.diffpath import DiffPath
from farout.detectors.msma import MSMA
from farout.detectors.reconstruction import Reconstruction
from farout.diffusion.model import DiffusionModel
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import auroc, detection_metrics

RANGES = ((0.005, 1.0), (0.01, 1.0), (0.01, 10.0), (0.05, 5.0), (0.05, 80.0), (0.2, 20.0), (0.005, 80.0))
"""Lowest and highest sigma for pixels in [0, 1]."""
ANCHOR = ("reconstruction, oneshot", "mahalanobis")
Scores = dict[str, np.ndarray]


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "choose"])
    parser.add_argument("model")
    parser.add_argument("--train", default="fashion_mnist:train@classes=0,2,3,4,5,6,7,9")
    parser.add_argument("--id", default="fashion_mnist:test@classes=0,2,3,4,5,6,7,9")
    parser.add_argument("--ood", nargs="+", default=["fashion_mnist:test@classes=1,8", "mnist:test"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--statistics", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = DiffusionModel.load(arguments.model)
    counts = f"n = {arguments.count} a set, {arguments.statistics} statistics images, seed {arguments.seed}"
    print(f"{counts}; {machine()}\n")
    print(compare(arguments, model) if arguments.what == "compare" else choose(arguments, model))


def ready(detector: Detector, model: DiffusionModel, seed: int) -> Detector:
    """With networks, without statistics."""
    detector.preprocessing, detector.seed = model.preprocessing, seed
    detector.use(model, Runtime(batch_size=64))
    return detector


def rivals() -> Iterator[tuple[str, Detector]]:
    """What is compared, the anchor first."""
    yield ANCHOR[0], Reconstruction.from_preset("oneshot")
    yield "msma", MSMA()
    yield "diffpath", DiffPath()


def compare(arguments: argparse.Namespace, model: DiffusionModel) -> str:
    """AUROC of every score with its interval, and its difference to the anchor's, paired."""
    names = [arguments.id, *arguments.ood]
    sets = {spec: open_source(spec, limit=arguments.count, seed=arguments.seed) for spec in names}
    statistics = fresh_images(arguments.train, model, arguments.statistics, arguments.seed)
    anchor: dict[str, np.ndarray] = {}
    rows = []
    for name, detector in rivals():
        ready(detector, model, arguments.seed)
        detector.fit_statistics(detector.measure_all(statistics, f"{name}: statistics"))
        scored, speed = scores(detector, sets)
        anchor = anchor or {spec: scored[spec][ANCHOR[1]] for spec in names}
        price = [f"{detector.cost().nfe:.0f}", f"{speed:.1f}"]
        for score in scored[arguments.id]:
            if score.startswith("mean_z_"):
                continue
            found = {spec: found_by[score] for spec, found_by in scored.items()}
            own = " (own)" if score == detector.score_name else ""
            rows.append([f"{name}: {score}{own}", *price, *cells(found, anchor, arguments.id)])
    titles = [title for spec in arguments.ood for title in (spec, f"less {', '.join(ANCHOR)}")]
    return table(["score", "evaluations", "images per CPU second", *titles], rows)


def scores(detector: Detector, sets: dict[str, ImageSource]) -> tuple[dict[str, Scores], float]:
    """Every score of every image by set, and images per second of CPU time, which a busy machine changes little."""
    started = time.process_time()
    measured = {spec: detector.measure_all(source, spec) for spec, source in sets.items()}
    speed = sum(map(len, sets.values())) / (time.process_time() - started)
    found = {
        spec: {name: value.numpy() for name, value in detector.compute_scores(each).items()}
        for spec, each in measured.items()
    }
    return found, speed


def cells(found: Scores, anchor: Scores, inside: str) -> list[str]:
    """For every set outside: the AUROC and its difference to the anchor's, with intervals."""
    line = []
    for spec in found:
        if spec == inside:
            continue
        area = detection_metrics(found[inside], found[spec])
        less = paired_difference((found[inside], found[spec]), (anchor[inside], anchor[spec]))
        line.append(interval(area.auroc, area.auroc_low, area.auroc_high))
        line.append(interval(less.value, less.low, less.high, "+.3f"))
    return line


def choose(arguments: argparse.Namespace, model: DiffusionModel) -> str:
    """AUROC of every score of every setting against changed training images."""
    count, seed = arguments.count, arguments.seed
    sets = {
        "statistics": fresh_images(arguments.train, model, arguments.statistics, seed + 1),
        "inside": fresh_images(arguments.train, model, 2 * count, seed + 2),
        **{variant: fresh_images(changed(arguments.train, variant), model, count, seed + 3) for variant in VARIANTS},
    }
    rows = []
    whole = ready(MSMA(count=16, lowest=1e-9, highest=1e9), model, seed)
    measured = {name: whole.measure_all(source, f"msma: {name}") for name, source in sets.items()}
    for low, high in RANGES:
        chosen = {name: between(each, model, low, high) for name, each in measured.items()}
        rows += judge(f"msma, {low:g} to {high:g}", whole, chosen)
    for name, clamp in (("no clamp", False), ("clamp", True)):
        detector = ready(DiffPath(clamp=clamp), model, seed)
        rows += judge(
            f"diffpath, {name}", detector, {key: detector.measure_all(some, key) for key, some in sets.items()}
        )
    return table(["setting", "score", *VARIANTS, "mean"], rows)


def changed(spec: str, variant: str) -> str:
    """The same source in a variant."""
    name, _, modifiers = spec.partition("@")
    return f"{name}@{','.join(part for part in (variant, modifiers) if part)}"


def between(measured: Measurements, model: DiffusionModel, low: float, high: float) -> Measurements:
    """The measurements of the levels whose sigma, for pixels in [0, 1], lies between two."""
    assert measured.values is not None
    ends = model.x0_range or (0.0, 1.0)
    sigmas = model.schedule.sigma_of(torch.tensor(measured.levels)) / (ends[1] - ends[0])
    kept = ((sigmas >= low) & (sigmas <= high)).nonzero().squeeze(1)
    levels = tuple(measured.levels[int(row)] for row in kept)
    return Measurements(measured.keys, measured.values[:, kept], levels, measured.metrics)


def judge(name: str, detector: Detector, measured: dict[str, Measurements]) -> list[list[object]]:
    """A row for every score, fitted to the statistics images."""
    detector.fit_statistics(measured["statistics"])
    found = {key: detector.compute_scores(each) for key, each in measured.items()}
    rows: list[list[object]] = []
    for score in found["inside"]:
        areas = [auroc(found["inside"][score].numpy(), found[variant][score].numpy()) for variant in VARIANTS]
        rows.append([name, score, *areas, float(np.mean(areas))])
    return rows


if __name__ == "__main__":
    main()
