"""`farout demo`."""

from __future__ import annotations

from collections.abc import Iterator

from farout.benchmark.demo import demo as run_demo
from farout.cli.commands.evaluate import print_metrics
from farout.evaluation.results import Evaluation

__all__ = ["demo", "print_tables"]


def demo(
    *, out: str = "farout-demo", steps: int = 100, limit: int = 100, images: int | None = None, seed: int = 0
) -> Iterator[Evaluation]:
    """Fit and evaluate two detectors on the built-in sample, in a few minutes.

    Args:
        out: folder of the demo's models and results.
        steps: number of training steps of the diffusion model.
        limit: number of images scored per set.
        images: number of sample images to fit the detector on; default: 1,000.
        seed: seed of all samples, weights and noise.
    """
    return run_demo(out, steps=steps, limit=limit, images=images, seed=seed)


def print_tables(evaluations: Iterator[Evaluation]) -> None:
    """Prints each evaluation when it is finished."""
    for evaluation in evaluations:
        print_metrics(evaluation)
