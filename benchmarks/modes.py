"""Exact, fast and one-shot reconstruction on the same weights and images: AUROC, evaluations, speed, memory.

    FAROUT_DATA=… python benchmarks/modes.py MODEL [--count 100] [--id SPEC] [--ood SPEC ...]

MODEL is a folder made by `farout train diffusion fashion_mnist:train`. Statistics come from training images that the
model has not seen; each test set is a seeded choice of `--count` images.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import fresh_images, interval, machine, table

from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.base import Runtime
from farout.detectors.reconstruction import Reconstruction
from farout.diffusion.model import DiffusionModel
from farout.evaluation.evaluate import peak_memory_mib
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import detection_metrics

SCORES = ("mean_z", "mean_z_mse", "mean_z_perceptual", "two_sided", "mahalanobis", "mixture")
MODES = ("exact", "fast", "oneshot")
Scored = dict[str, dict[str, dict[str, np.ndarray]]]
Groups = tuple[np.ndarray, np.ndarray] | None


def main() -> None:
    """Prints the table of areas, that of paired differences, and that of costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--id", default="fashion_mnist:test")
    parser.add_argument("--train", default="fashion_mnist:train")
    parser.add_argument(
        "--ood", nargs="+", default=["mnist:test", "fashion_mnist:test@vflip", "fashion_mnist:test@hflip"]
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--statistics", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    arguments = parser.parse_args()
    model = DiffusionModel.load(arguments.model)
    sets = {
        spec: open_source(spec, limit=arguments.count, seed=arguments.seed) for spec in [arguments.id, *arguments.ood]
    }
    statistics = fresh_images(arguments.train, model, arguments.statistics, arguments.seed)
    scores, costs = {}, []
    for mode in arguments.modes:
        detector = prepared(mode, model, statistics, arguments.seed)
        scores[mode] = {spec: run(detector, source) for spec, source in sets.items()}
        costs.append(cost(mode, detector, sets[arguments.id]))
    print(
        f"n = {arguments.count} a set, {arguments.statistics} statistics images, seed {arguments.seed}; {machine()}\n"
    )
    groups = {spec: shared(sets[arguments.id], sets[spec]) for spec in arguments.ood}
    print(areas(scores, arguments.id, groups), "\n")
    print(differences(scores, arguments.id, groups), "\n")
    print(
        table(["mode", "evaluations", "GMACs", "images/s at batch 1", "at batch 64", "peak MiB of the process"], costs)
    )


def prepared(mode: str, model: DiffusionModel, statistics: ImageSource, seed: int) -> Reconstruction:
    """A detector of one mode with its statistics."""
    detector = Reconstruction.from_preset(mode)
    detector.preprocessing, detector.seed = model.preprocessing, seed
    detector.use(model, Runtime(batch_size=64))
    detector.fit_statistics(detector.measure_all(statistics, f"{mode}: statistics"))
    return detector


def run(detector: Reconstruction, source: ImageSource) -> dict[str, np.ndarray]:
    """Every score of every image."""
    return {
        name: value.numpy()
        for name, value in detector.compute_scores(detector.measure_all(source, source.name)).items()
    }


def shared(inside: ImageSource, outside: ImageSource) -> Groups:
    """Ids of the source images where variants of one stand on both sides."""
    ids = tuple(np.array([str(name) for name in side.content_hashes()]) for side in (inside, outside))
    return (ids[0], ids[1]) if set(ids[0]) & set(ids[1]) else None


def areas(scores: Scored, inside: str, outside: dict[str, Groups]) -> str:
    """AUROC with its interval by mode and score; images that share a source are resampled together."""
    rows = []
    for mode, sets in scores.items():
        for score in SCORES:
            found = [
                detection_metrics(sets[inside][score], sets[spec][score], groups=outside[spec]) for spec in outside
            ]
            rows.append([mode, score, *[interval(m.auroc, m.auroc_low, m.auroc_high) for m in found]])
    return table(["mode", "score", *outside], rows)


def differences(scores: Scored, inside: str, outside: dict[str, Groups]) -> str:
    """AUROC of the other modes' scores less that of exact with the paper's score, paired."""
    if "exact" not in scores:
        return "exact was not run: no differences"
    rows = []
    for mode, score in (("fast", "mean_z"), ("oneshot", "mean_z"), ("oneshot", "mahalanobis")):
        if mode not in scores:
            continue
        line: list[object] = [f"{mode}, {score}"]
        for spec in outside:
            sides = [(scores[m][inside][s], scores[m][spec][s]) for m, s in ((mode, score), ("exact", "mean_z"))]
            found = paired_difference(*sides, groups=outside[spec])
            line.append(interval(found.value, found.low, found.high, "+.3f"))
        rows.append(line)
    return table(["less exact, mean_z", *outside], rows)


def cost(mode: str, detector: Reconstruction, source: ImageSource) -> list[object]:
    """Evaluations, GMACs and images/s; exact is timed on fewer images."""
    few = {"exact": (2, 64)}.get(mode, (10, 64))
    speeds = [f"{speed(detector, source, images, batch):.2f}" for images, batch in ((few[0], 1), (few[1], 64))]
    counted = detector.cost()
    return [mode, int(counted.nfe), f"{counted.gmacs:.2f}", *speeds, f"{peak_memory_mib():.0f}"]


def speed(detector: Reconstruction, source: ImageSource, images: int, batch: int) -> float:
    """Images per second, perceptual distance included, decoding and start-up not."""
    detector.runtime = Runtime(batch_size=batch).resolved()
    some = source.subset(range(min(images, len(source))))
    detector.measure_all(some.subset(range(1)), "warming up")
    started = time.perf_counter()
    detector.measure_all(some, f"{detector.config['mode']} at batch {batch}")
    return len(some) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
