"""How cost grows with the number of images: fits, scores, and everything that a fit or an evaluation does in addition.

    python benchmarks/cost_scale.py fit                # detectors on arrays of features: fits, and scores
    python benchmarks/cost_scale.py parts              # near-copies, metrics, monitoring
    python benchmarks/cost_scale.py commands --out DIR # `farout fit` on files of `benchmarks/million.py`

Every measurement has a process of its own: CPU seconds, and the highest resident memory. `exponent` is the slope of
log seconds over log images between the two largest numbers of images: 1 is linear; above 1.15 it is marked with `!`.
`farout score` by the number of images is measured by `benchmarks/million.py --images 100 10000 100000`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

METHODS = ("mahalanobis", "knn", "pca", "gmm", "autoencoder", "semantic")
SCORED = 1000


def draw_features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Ten clusters in 40 dimensions, and noise in all of them, float32."""
    shared, generator = np.random.default_rng(0), np.random.default_rng(seed)
    centers, basis = shared.normal(size=(10, 40)).astype(np.float32), shared.normal(size=(40, width)).astype(np.float32)
    inside = generator.standard_normal((count, 40), dtype=np.float32) + centers[generator.integers(0, 10, count)]
    return inside @ basis + generator.standard_normal((count, width), dtype=np.float32)


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_fit(method: str, count: int, width: int) -> dict[str, float]:
    """Seconds of a fit to features, and milliseconds per image of scores with it."""
    from farout.detectors import DETECTORS

    features, scored = draw_features(count, width), draw_features(SCORED, width, seed=1)
    detector = DETECTORS[method].load()()
    seconds = cpu_seconds(lambda: detector.fit_features(features))
    return {"seconds": seconds, "ms per image": 1000 * cpu_seconds(lambda: detector.score_features(scored)) / SCORED}


def measure_near_copies(count: int) -> float:
    """Noise around smooth random pictures, of which one in five has a near-copy."""
    from farout.data.near_copies import find_near_copies
    from farout.data.thumbnails import COLOR_SIDE, SIDE

    generator = np.random.default_rng(0)
    coarse = generator.normal(128, 50, (count, 8, 8)).repeat(4, axis=1).repeat(4, axis=2)
    coarse[: count // 5] = coarse[-(count // 5) :]
    pixels = (coarse + generator.normal(0, 3, (count, SIDE, SIDE))).clip(0, 255).astype(np.uint8).reshape(count, -1)
    color = np.full((count, 2 * COLOR_SIDE**2), 128, np.uint8)
    thumbnails = np.concatenate([pixels, color], axis=1)[generator.permutation(count)]
    return cpu_seconds(lambda: find_near_copies(thumbnails))


def measure_metrics(count: int) -> float:
    """All metrics with their intervals, of as many normal as OOD scores."""
    from farout.evaluation.metrics import detection_metrics

    generator = np.random.default_rng(0)
    normal, other = generator.normal(size=(2, count)) + np.array([[0], [1]])
    return cpu_seconds(lambda: detection_metrics(normal, other))


def measure_p_values(count: int) -> float:
    """p-values and the selection at a false discovery rate, with a fifth as many calibration scores."""
    from farout.detectors.calibration import benjamini_hochberg, compute_p_values

    scores = np.random.default_rng(0).normal(size=count)
    return cpu_seconds(lambda: benjamini_hochberg(compute_p_values(scores, scores[: count // 5]), 0.1))


def measure_monitoring(method: str, count: int) -> float:
    """A stream of which every image is selected: the number of discoveries is that of the images."""
    from farout.evaluation.monitoring import Monitor

    monitor = Monitor(1000, fdr=0.1, fdr_method=method)  # type: ignore[arg-type]
    return cpu_seconds(lambda: monitor.update(np.full(count, 1 / 1001)))


PARTS: dict[str, Callable[[int], float]] = {
    "search for near-copies": measure_near_copies,
    "metrics with intervals": measure_metrics,
    "p-values and selection": measure_p_values,
    "monitoring, lond": lambda count: measure_monitoring("lond", count),
    "monitoring, lord++": lambda count: measure_monitoring("lord++", count),
}


def measure_commands(folder: Path, counts: list[int], methods: list[str]) -> None:
    """`farout fit` on images: reading, hashes, near-copies, split, features of a small network, statistics."""
    from million import create_source, run

    for method in methods:
        rows = {}
        for count in counts:
            out = folder / f"fit-{method}-{count}"
            shutil.rmtree(out, ignore_errors=True)
            words = ["fit", method, str(create_source(folder, count)), "--out", str(out), "--no-cache"]
            words += ["--backbone", "test_resnet", "--weights", "random", "--size", "32", "--device", "cpu"]
            _, cpu, memory = run(*words)
            rows[count] = {"seconds": cpu, "MiB": memory}
        print_row(f"farout fit {method}", rows)


def print_row(name: str, rows: dict[int, dict[str, float]]) -> None:
    exponent = slope({count: row["seconds"] for count, row in rows.items()})
    cells = [*(f"{row['seconds']:.2f}" for row in rows.values()), f"{exponent:.2f}{'!' * (exponent > 1.15)}"]
    cells.append(" / ".join(f"{row['MiB']:.0f}" for row in rows.values()))
    cells.append(" / ".join(f"{row['ms per image']:.3f}" for row in rows.values() if "ms per image" in row))
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def slope(seconds: dict[int, float]) -> float:
    (few, short), (many, long) = sorted(seconds.items())[-2:]
    return math.log(max(long, 1e-9) / max(short, 1e-9)) / math.log(many / few)


def measure_here(name: str, count: int, width: int) -> None:
    """Print one measurement of this process as JSON."""
    result = measure_fit(name, count, width) if name in METHODS else {"seconds": PARTS[name](count)}
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print(json.dumps({**result, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["fit", "parts", "commands", "one"], help="`one` is started by the others")
    parser.add_argument("--images", nargs="+", type=int, default=[1000, 10_000, 50_000])
    parser.add_argument("--width", type=int, default=1280, help="number of features")
    parser.add_argument("--names", nargs="+", help="only these methods or parts")
    parser.add_argument("--out", type=Path, help="commands: folder of images and detectors")
    arguments = parser.parse_args()
    names = arguments.names or list(PARTS if arguments.action == "parts" else METHODS)
    if arguments.action == "one":
        measure_here(names[0], arguments.images[0], arguments.width)
        return
    heads = [*(f"{count:,} images, s" for count in arguments.images), "exponent", "MiB", "ms per scored image"]
    print(f"| what | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 1)}|", flush=True)
    if arguments.action == "commands":
        if arguments.out is None:
            parser.error("commands requires --out")
        measure_commands(arguments.out, arguments.images, names)
        return
    for name in names:
        rows = {}
        for count in arguments.images:
            words = ["one", "--names", name, "--images", str(count), "--width", str(arguments.width)]
            answer = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            rows[count] = json.loads(answer.stdout.splitlines()[-1])
        print_row(name, rows)


if __name__ == "__main__":
    main()
