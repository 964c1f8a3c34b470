"""Chooses the library that evaluates a detector's networks, by the number of images."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from farout.core.backends import Backend, explain_unusable_backend, use_eager
from farout.data.batching import Batch

if TYPE_CHECKING:
    from farout.detectors.interface import DetectorInterface

__all__ = ["choose_backend"]

logger = logging.getLogger(__name__)

_CANDIDATES: tuple[tuple[Backend, float, float], ...] = (
    ("openvino", 3.0, 0.5),
    ("compile", 90.0, 0.5),
    ("onnxruntime", 5.0, 0.3),
)
"""Backends from the fastest to the slowest, with rough figures for backbones: the seconds of a conversion, and the
share of torch's time that is saved. With U-Nets it is less (docs/results.md, section 24); the trial shows."""
_GMACS_PER_SECOND = 25.0
"""Billions of multiply-accumulates of small networks in torch, by one core."""
_FEWEST_IMAGES = 128
_TIMED_IMAGES, _REPETITIONS = 16, 2


def choose_backend(detector: DetectorInterface, images: int) -> None:
    """Choose the backend of a detector for this number of images, if its runtime leaves it open (`auto`).

    What is installed, the networks' multiply-accumulates and the number of images decide which backend is tried, so
    that the same command makes the same choice again. It is then timed against torch, and used only if it is faster. In
    bf16, a fitted detector keeps the backend of its calibration, because backends round differently.
    """
    if detector.runtime.backend != "auto" or images < _FEWEST_IMAGES or detector.backend != "eager":
        return
    if detector.is_fitted and detector.precision != "fp32":
        return
    if detector.parts:
        for part in detector.parts.values():
            choose_backend(part, images)
        chosen = [part.backend for part in detector.parts.values() if part.backend != "eager"]
        detector.use_backend(chosen[0] if chosen else "eager")
        return
    device = torch.device(detector.runtime.device)
    usable = [each for each in _CANDIDATES if not explain_unusable_backend(each[0], device, detector.precision)]
    if not usable:
        return
    from torch.utils.flop_counter import FlopCounterMode  # torch's compiler, which takes a second

    batch = _create_batch(detector, 1)
    with torch.no_grad(), use_eager():
        detector.run_networks(batch)  # folds batch normalizations, which is no cost of an image
        with FlopCounterMode(display=False) as counter:
            detector.run_networks(batch)
    seconds = images * counter.get_total_flops() / 2e9 / (_GMACS_PER_SECOND * torch.get_num_threads())
    candidate = next((backend for backend, cost, saved in usable if seconds * saved > 2 * cost), None)
    if candidate is None:
        return
    batch = _create_batch(detector, _TIMED_IMAGES)
    with torch.no_grad():
        before = _time(detector, batch)
        started = time.perf_counter()
        detector.use_backend(candidate)
        detector.run_networks(batch)
        ready = time.perf_counter() - started
        after = _time(detector, batch)
    figures = f"{after:.1f} ms per image against {before:.1f} with torch; ready in {ready:.1f} s"
    if after > before:
        detector.use_backend("eager")
        logger.info("backend: eager; %s is slower here (%s)", candidate, figures)
    else:
        logger.info("backend: %s (%s)", candidate, figures)


def _create_batch(detector: DetectorInterface, count: int) -> Batch:
    """A batch of random images of the size of the networks' input."""
    shape = (count, detector.preprocessing.channels, *detector.preprocessing.size)
    names = tuple(f"{index:064x}" for index in range(count))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"identities": names}
    return Batch(names, images, None, tuple(range(count)), **options)


def _time(detector: DetectorInterface, batch: Batch) -> float:
    """Milliseconds per image, the least of several calls."""
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        detector.run_networks(batch)
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds) / len(batch.keys)
