"""Images per second of detectors at batch 1 and 64, after a training of two steps: speed does not depend on weights.

Compare two checkouts by running the script with each one's interpreter, in turns, on a quiet machine:

    python benchmarks/throughput.py --methods reconstruction reconstruction-exact semantic msma --threads 1
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

from farout.core.devices import PrecisionChoice
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Detector
from farout.training.config import TrainingConfig

SETTINGS: dict[str, tuple[str, dict[str, object]]] = {"reconstruction-exact": ("reconstruction", {"mode": "exact"})}


def fitted(method: str, images: str, precision: PrecisionChoice) -> Detector:
    name, settings = SETTINGS.get(method, (method, {}))
    detector = DETECTORS[name].load()(**settings)
    training, runtime = TrainingConfig(steps=2, batch_size=8), Runtime(precision=precision, cache=False)
    return detector.fit(images, limit=40, statistics=10, alpha=0.1, training=training, runtime=runtime)


def images_per_second(detector: Detector, images: torch.Tensor, batch: int, seconds: float) -> float:
    """The best of repeated measurements: what else runs on the machine only slows one down."""
    many = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    batches = [Batch(tuple(str(i) for i in range(batch)), many, None, tuple(range(batch)))]
    detector.measure(batches[0])
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        detector.measure(batches[0])
        best = max(best, batch / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["reconstruction", "reconstruction-exact", "semantic", "msma"])
    parser.add_argument("--images", default="fashion_mnist:test")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    for method in given.methods:
        detector = fitted(method, given.images, given.precision)
        source = open_source(given.images, limit=8)
        images = torch.stack([detector.preprocessing(image) for image in source])
        for batch in given.batches:
            speed = images_per_second(detector, images, batch, given.seconds)
            print(f"{method}, batch {batch}: {speed:.2f} images/s", flush=True)


if __name__ == "__main__":
    main()
