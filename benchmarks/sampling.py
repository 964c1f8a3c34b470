"""Numerical methods against each other: distance of generated images to test images, by evaluations an image.

    FAROUT_DATA=… python benchmarks/sampling.py MODEL --reference "fashion_mnist:test@classes=0,2-7,9" --count 256

MODEL is class-conditional; the same start noise and labels for every method. Distances on the built-in backbone
(FD-lite0, KD-lite0), which are not FID and KID. Fewer images than features: FD is biased upwards, for all alike.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from common import machine, table

from farout.core.errors import FaroutError
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import Sampler
from farout.diffusion.solvers.registry import SOLVERS, is_adaptive
from farout.evaluation.fid import set_distance


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", default="fashion_mnist:test")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--clamp", action=argparse.BooleanOptionalAction, default=True, help="as in farout sample")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = DiffusionModel.load(given.model)
    print(f"n = {given.count} and {2 * given.count}, guidance {given.guidance:g}; {machine()}\n")
    rows = []
    for name in SOLVERS:
        for steps in [None] if is_adaptive(name) else given.steps:
            rows += one(model, name, steps, given)
    print(table(["method", "steps", "evaluations an image", "FD-lite0", "KD-lite0", "images/s"], rows))


def one(model: DiffusionModel, name: str, steps: int | None, given: argparse.Namespace) -> list[list[object]]:
    """The row of one method; none, and why, where it wants more steps."""
    try:
        sampler = Sampler(model, name, steps, guidance=given.guidance, clamp=given.clamp)
    except FaroutError as error:
        print(name, steps, error, flush=True)
        return []
    counting = _Counting(model)
    started, parts = time.perf_counter(), []
    classes = model.conditioning.num_classes if model.conditioning is not None else None
    for start in range(0, given.count, 64):
        indices = range(start, min(start + 64, given.count))
        parts.append(sampler.images(indices, None if classes is None else [i % classes for i in indices]))
    speed = given.count / (time.perf_counter() - started)
    evaluations = counting.stop() / given.count
    found = set_distance(torch.cat(parts), given.reference, limit=2 * given.count)
    cells = [f"{evaluations:.1f}", f"{found.frechet:.2f}", f"{found.kernel:.4f}", f"{speed:.2f}"]
    print(name, steps, *cells, flush=True)
    return [[name, steps or "own", *cells]]


class _Counting:
    """Rows that the network of a model sees, padding included."""

    def __init__(self, model: DiffusionModel) -> None:
        self.rows = 0
        self.handle = model.network.register_forward_pre_hook(self._count)

    def _count(self, network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.rows += len(inputs[0])

    def stop(self) -> int:
        """Removes the hook; the count."""
        self.handle.remove()
        return self.rows


if __name__ == "__main__":
    main()
