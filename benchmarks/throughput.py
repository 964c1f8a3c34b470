"""Images per second of detectors, after a fit with two training steps: speed does not depend on the weights.

To compare two versions, run the script with each one's interpreter, alternating, on a quiet machine:

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

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {"reconstruction-exact": ("reconstruction", {"mode": "exact"})}
"""Methods with other than default settings."""


def fit_detector(method: str, images: str, precision: PrecisionChoice) -> Detector:
    name, settings = VARIANTS.get(method, (method, {}))
    detector: Detector = DETECTORS[name].load()(**settings)
    training, runtime = TrainingConfig(steps=2, batch_size=8), Runtime(precision=precision, cache=False)
    return detector.fit(images, limit=40, statistics=10, alpha=0.1, training=training, runtime=runtime)


def measure_speed(detector: Detector, images: torch.Tensor, batch_size: int, seconds: float) -> float:
    """The highest speed of repeated measurements: other work on the machine only slows them down."""
    repeated = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size]
    batch = Batch(tuple(str(i) for i in range(batch_size)), repeated, None, tuple(range(batch_size)))
    detector.measure(batch)
    highest, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        detector.measure(batch)
        highest = max(highest, batch_size / (time.perf_counter() - started))
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["reconstruction", "reconstruction-exact", "semantic", "msma"])
    parser.add_argument("--images", default="fashion_mnist:test")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for method in arguments.methods:
        detector = fit_detector(method, arguments.images, arguments.precision)
        source = open_source(arguments.images, limit=8)
        images = torch.stack([detector.preprocessing(image) for image in source])
        for batch_size in arguments.batch_sizes:
            speed = measure_speed(detector, images, batch_size, arguments.seconds)
            print(f"{method}, batch size {batch_size}: {speed:.2f} images/s", flush=True)


if __name__ == "__main__":
    main()
