"""Time of `farout score --engine ray` against `--engine local` on the same images and the same machine.

An untrained network of 32 pixels is fast, so that the overhead of Ray is not hidden by the time of the networks; other
detectors are measured with `--detector`. Both engines run alternately, each in a process of its own. The time per image
is the difference between runs with few and with many images, so that it contains neither the start of Ray nor the
loading of the detector, which are listed as start.

    python benchmarks/ray_overhead.py --out /tmp/overhead
    python benchmarks/ray_overhead.py --out /tmp/overhead --ray-workers 2 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from million import create_source, fit_detector

from farout.scoring.folder import read_scores


def run(detector: Path, source: Path, out: Path, words: list[str]) -> float:
    """Seconds of a command that scores the images into a new folder, with one thread per worker."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "farout", "score", str(detector), str(source), "--out", str(out), *words]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of images, detector and results")
    parser.add_argument("--images", nargs=2, type=int, default=[2000, 20_000], help="few and many images")
    parser.add_argument("--detector", type=Path, help="folder of a detector; default: knn on a small untrained network")
    parser.add_argument("--images-per-part", type=int, default=256)
    parser.add_argument("--ray-workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    detector = arguments.detector or fit_detector(arguments.out, "test_resnet")
    few, many = arguments.images
    on_ray = ["--engine", "ray", "--ray-address", "local", "--ray-workers", str(arguments.ray_workers)]
    on_ray += ["--images-per-part", str(arguments.images_per_part)]
    engines = {"local": ["--no-cache"], "ray": ["--no-cache", *on_ray]}
    seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in engines for count in (few, many)}
    for _ in range(arguments.repeats):
        for count in (few, many):
            source = create_source(arguments.out, count)
            for name, words in engines.items():
                seconds[name, count].append(run(detector, source, arguments.out / f"{name}-{count}", words))
    tables = [read_scores(arguments.out / f"{name}-{many}") for name in engines]
    if tables[0].keys != tables[1].keys:
        raise SystemExit("the engines have scored other images")
    difference = np.nanmax(np.abs(tables[0].score - tables[1].score)) / np.nanstd(tables[0].score)
    print(f"{many:,} images, {arguments.ray_workers} Ray worker(s), median of {arguments.repeats} runs each")
    print(f"largest difference of scores: {difference:.1e} standard deviations")
    print("| engine | seconds | ms per image | start in seconds |")
    print("| --- | ---: | ---: | ---: |")
    for name in engines:
        short, long = (statistics.median(seconds[name, count]) for count in (few, many))
        each = (long - short) / (many - few)
        print(f"| {name} | {long:.1f} | {1000 * each:.3f} | {short - few * each:.1f} |")


if __name__ == "__main__":
    main()
