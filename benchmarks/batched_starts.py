"""The exact mode's seven starts in one batch, finished rows leaving it, against one start after another.

    python benchmarks/batched_starts.py MODEL [--counts 1 4 64]

Prints seconds per image, and that both give the same reconstructions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import machine, table
from torch import Tensor

from farout.detectors.reconstruction.noise_levels import Plan, make_plan
from farout.diffusion.denoiser import NetworkDenoiser
from farout.diffusion.model import DiffusionModel


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--skip", type=int, default=16)
    arguments = parser.parse_args()
    model = DiffusionModel.load(arguments.model)
    plan = make_plan(
        model.schedule, mode="exact", levels=None, skip=arguments.skip, grid="paper", steps=1, solver="ddim"
    )
    rows = [compare(model, plan, count) for count in arguments.counts]
    print(f"{len(plan.levels)} starts; {machine()}\n")
    print(table(["images", "one batch, s/image", "one after another, s/image", "ratio", "largest difference"], rows))


@torch.no_grad()
def compare(model: DiffusionModel, plan: Plan, count: int) -> list[object]:
    """Times both layouts; rows=None: every call has the size that its layout gives it."""
    x0 = torch.rand(count, 1, *model.shape, generator=torch.Generator().manual_seed(0)).flatten(0, 1) * 2 - 1
    noise = torch.randn(len(plan.levels), *model.shape, generator=torch.Generator().manual_seed(1))
    denoiser = model.denoiser()
    denoiser(x0[:1], torch.ones(1))
    together, fast = timed(lambda: batched(denoiser, plan, x0, noise))
    apart, slow = timed(lambda: sequential(denoiser, plan, x0, noise))
    error = float((together - apart).abs().max())
    return [count, f"{fast / count:.3f}", f"{slow / count:.3f}", f"{slow / fast:.2f}", f"{error:.1e}"]


def batched(denoiser: NetworkDenoiser, plan: Plan, x0: Tensor, noise: Tensor) -> Tensor:
    """All starts of all images in one batch: (images, starts, …)."""
    sigmas = plan.paths.repeat(len(x0), 1)
    x = x0[:, None] + plan.paths[None, :, 0, None, None, None] * noise[None]
    return plan.solver(denoiser, x.flatten(0, 1), sigmas).reshape(x.shape)


def sequential(denoiser: NetworkDenoiser, plan: Plan, x0: Tensor, noise: Tensor) -> Tensor:
    """Start after start, each with all images."""
    ends = []
    for path, one in zip(plan.paths, noise, strict=True):
        x = x0 + path[0] * one
        ends.append(plan.solver(denoiser, x, path.repeat(len(x0), 1)))
    return torch.stack(ends, dim=1)


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a call and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
