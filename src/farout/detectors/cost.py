"""What scoring an image costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farout.core.backends import use_eager
from farout.data.batching import Batch
from farout.detectors.interface import DetectorInterface

__all__ = ["Cost", "measure_cost"]


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    nfe: rows that the diffusion model, or without one the classifier, evaluates; gmacs: billions of
    multiply-accumulates of all networks.
    """

    nfe: float
    gmacs: float


@torch.no_grad()
def measure_cost(detector: DetectorInterface, batch: Batch | None = None) -> Cost:
    """Count the cost on a batch of one image; default: a gray image."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    if batch is None:
        image = torch.full((1, detector.preprocessing.channels, *detector.preprocessing.size), 0.5)
        batch = Batch(("gray",), image, None, (0,))
    # The first call also measures memory and folds the backbone's batch norms, which is no cost of an image.
    with use_eager():
        detector.measure(batch)
    evaluations = detector.evaluations
    with use_eager(), FlopCounterMode(display=False) as counter:
        detector.measure(batch)
    return Cost(detector.evaluations - evaluations, counter.get_total_flops() / 2e9)
