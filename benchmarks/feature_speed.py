"""Images per second of the backbone alone and of every method on its features; a fit split into its parts.

FAROUT_DATA=… python benchmarks/feature_speed.py --fit 5000 --count 512
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from common import machine, table

from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Detector, Runtime
from farout.detectors.semantic import Semantic
from farout.evaluation.evaluate import peak_memory_mib

_REPEATS = 3


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls: other work on the machine only adds."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def score_speeds(fitted: list[tuple[str, Detector]], images: ImageSource) -> str:
    """Backbone alone on prepared tensors; reading and preparing with it; and each method from image to scores."""
    first = fitted[0][1]
    backbone, count = first.features, len(images)
    assert backbone is not None
    tensors = torch.stack([first.preprocessing(image) for image in images])
    alone = best(lambda: backbone.pooled_features(tensors, 32))
    rows = [["backbone alone", f"{count / alone:.1f}", "-"]]
    for name, detector in fitted:
        detector.runtime = Runtime(cache=False).resolved()
        seconds = best(lambda detector=detector: detector.score(images))
        rows.append([name, f"{count / seconds:.1f}", f"{seconds / alone - 1:+.1%}"])
        features = torch.cat([detector.features_of(batch) for batch in detector.batches(images)])
        only = best(lambda detector=detector, features=features: _from_features(detector, features))
        rows.append([f"{name}, from features", f"{count / only:.0f}", f"{only / alone:.1%} of the backbone"])
    return table(["what", "images/s", "time over the backbone alone"], rows)


def _from_features(detector: Detector, features: torch.Tensor) -> None:
    from farout.data.batching import Batch

    for start in range(0, len(features), 64):
        some = features[start : start + 64]
        keys = tuple(map(str, range(len(some))))
        detector.rescore(detector.measure(Batch(keys, torch.empty(0), None, (), some)))


def fit_parts(source: ImageSource) -> str:
    """A fit with an empty cache, and again with a full one: the difference is extraction."""
    rows = []
    for cache in ("empty", "full"):
        started = time.perf_counter()
        Semantic().fit(source, runtime=Runtime())
        rows.append([f"semantic, {len(source)} images, cache {cache}", f"{time.perf_counter() - started:.0f} s"])
    rows.append(["peak memory of the process", f"{peak_memory_mib():.0f} MiB"])
    return table(["what", "seconds"], rows)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10:train")
    parser.add_argument("--images", default="cifar10:test")
    parser.add_argument("--fit", type=int, default=5000)
    parser.add_argument("--count", type=int, default=512)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FAROUT_CACHE"] = folder
        source = open_source(given.source, limit=given.fit)
        print(fit_parts(source), flush=True)
        names = ("semantic", *Semantic.companions)
        fitted = [(name, DETECTORS[name].load()().fit(source)) for name in names]
        print(score_speeds(fitted, open_source(given.images, limit=given.count)))


if __name__ == "__main__":
    main()
