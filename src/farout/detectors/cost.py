"""What scoring an image costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from farout.data.batching import Batch
from farout.detectors.interface import DetectorInterface

__all__ = ["Cost", "measure_cost"]


@dataclass(frozen=True)
class Cost:
    """What one image costs: rows that the diffusion model, or without one the classifier, evaluates, and billions of
    multiply-accumulates of all networks together.
    """

    nfe: float
    gmacs: float


@torch.no_grad()
def measure_cost(detector: DetectorInterface) -> Cost:
    """Counted on one grey image."""
    images = torch.full((1, detector.preprocessing.channels, *detector.preprocessing.size), 0.5)
    probe = Batch(("probe",), images, None, (0,))
    detector.measure(probe)  # first calls measure memory and fold the backbone, which are no costs of an image
    before = detector.evaluations
    with FlopCounterMode(display=False) as counter:
        detector.measure(probe)
    return Cost(detector.evaluations - before, counter.get_total_flops() / 2e9)
