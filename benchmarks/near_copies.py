"""Near-copies: how many images of real sets are taken for near-copies, and what near-copies do to false alarms.

    FAROUT_DATA=… python benchmarks/near_copies.py sets fashion_mnist:train cifar10:train …
    FAROUT_DATA=… PYTHONPATH=tests python benchmarks/near_copies.py false_alarms tiny_imagenet:train

`false_alarms` fits detectors with default settings on 5 near-copies of each of 50 random images, and scores one version
of 60 other images, for each way to copy in `tests/copied_scenes.py`, with and without `--groups none`.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import numpy as np
import torch

from farout.data.sources import open_source
from farout.data.splits import group_images
from farout.detectors import DETECTORS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sets", "false_alarms"])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--kinds", nargs="+", default=["noise", "jpeg", "brightness", "mirrored", "mixed", "pan"])
    parser.add_argument("--fits", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    for name in arguments.sources:
        if arguments.what == "sets":
            print_set(name)
        else:
            print_false_alarms(name, arguments.kinds, arguments.fits)


def print_set(name: str) -> None:
    source = open_source(name)
    source.content_hashes(thumbnails=True)
    started = time.process_time()
    grouped = group_images(source)
    seconds = time.process_time() - started
    equal = len(grouped.hashes) - len(set(grouped.hashes.values()))
    largest = max(map(len, grouped.groups))
    counts = f"{len(source)} images, {equal} equal, {grouped.copies} copies, largest group {largest}"
    print(f"{name}: {counts}, {seconds:.0f} s", flush=True)


def print_false_alarms(name: str, kinds: list[str], fits: int) -> None:
    from copied_scenes import copy_scenes  # of the tests

    source = open_source(name, limit=110, seed=1)
    pool = [np.ascontiguousarray(image.expand(3, -1, -1).numpy().transpose(1, 2, 0)) for image in source]
    for kind in kinds:
        images = copy_scenes(pool, kind, 5)
        for method in ("knn", "mahalanobis", "pca"):
            rates: dict[str, list[float]] = {"none": [], "near_copies": []}
            rng = np.random.default_rng(0)
            for seed in range(fits):
                order = rng.permutation(len(pool))
                fitted = torch.stack([images[scene * 5 + number] for scene in order[:50] for number in range(5)])
                new = torch.stack([images[scene * 5] for scene in order[50:]])
                for groups, values in rates.items():
                    detector = DETECTORS[method].load()()
                    detector.fit(fitted, seed=seed, groups=groups)
                    values.append(float(detector.score(new).is_ood.mean()))
            text = ", ".join(f"groups {groups} {np.mean(values):.3f}" for groups, values in rates.items())
            print(f"{name} {kind} {method}: {text} ({fits} fits)", flush=True)


if __name__ == "__main__":
    main()
