"""What the guidance of SONA asks of the network: the published layout of four rows a step against this library's.

    FAROUT_DATA=… python benchmarks/sona_rows.py networks/ --repeats 1

With the paper's constants, from every start K = 1 to 49 of 50 steps, on images of FashionMNIST and the first split's
diffusion model (see denoising.py). The published layout asks for the unconditional prediction, twice for the class and
once for the target in every step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import machine, table
from torch import Tensor

from farout.data.sources import open_source
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded_generator
from farout.diffusion.solvers.ddim import DDIM
from farout.synthesis.class_space import class_conditioning
from farout.synthesis.editing.sona_guidance import BRANCHES, SonaConfig, SonaGuide

STEPS = 50


class Published:
    """The same guidance, which asks for all branches in every step: it is no sparing guide."""

    def __init__(self, guide: SonaGuide) -> None:
        self.guide = guide

    def __call__(self, predictions: Mapping[str, Tensor], sigma: Tensor, state: Any) -> Any:
        return self.guide(predictions, sigma, state)


def conditions(model: DiffusionModel, labels: Tensor, twice: bool) -> dict[str, Condition]:
    """Of each image nothing, its class and the next class; the class `twice`, as published."""
    space = class_conditioning(model)
    targets = (labels + 1) % len(space.class_names)
    found = dict(zip(BRANCHES, (space.null_condition(len(labels)), space(labels), space(targets)), strict=True))
    return {**found, "again": found["class"]} if twice else found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, help="folder of denoising.py's networks")
    parser.add_argument("--repeats", type=int, default=1, help="images of every start")
    given = parser.parse_args()
    model = DiffusionModel.load(given.networks / "split-0" / "diffusion")
    levels = noise_levels.leading_levels(model.schedule, STEPS)
    starts = list(range(1, STEPS)) * given.repeats
    source = open_source("fashion_mnist:test", limit=len(starts))
    labels = torch.arange(len(starts)) % len(class_conditioning(model).class_names)
    x0 = model.encode(torch.stack([model.preprocessing(source[place]) for place in range(len(starts))]))
    noise = torch.stack(
        [torch.randn(model.shape, generator=seeded_generator(0, "rows", place)) for place in range(len(starts))]
    )
    sigmas = noise_levels.pad_paths([noise_levels.falling_path(model.schedule, levels[:k]) for k in starts])
    x = x0 + sigmas[:, 0, None, None, None] * noise
    exact, early = (SonaConfig(skip=skip).for_steps(STEPS) for skip in ("exact", "early"))
    layouts: dict[str, Any] = {
        "published, 4 rows a step": Published(SonaGuide(exact, model.x0_range)),
        "exact (default)": SonaGuide(exact, model.x0_range),
        "early": SonaGuide(early, model.x0_range),
    }
    first: Tensor | None = None
    asked: list[float] = []
    lines = []
    for name, guide in layouts.items():
        denoiser = model.denoiser(32, "fp32")
        started = time.process_time()
        with torch.no_grad():
            out = DDIM()(denoiser, x, sigmas, conditions(model, labels, twice=first is None), guide=guide)
        seconds = time.process_time() - started
        first = out if first is None else first
        asked.append(denoiser.evaluations / len(starts))
        apart = (out - first).abs()
        cost = [f"{asked[-1]:.1f}", f"{asked[-1] / asked[0]:.3f}", f"{len(starts) / seconds:.2f}"]
        lines.append([name, *cost, f"{apart.max():.1e}", f"{apart.mean():.1e}"])
    print(f"{len(starts)} images; {machine()}\n")
    print(table(["layout", "rows an image", "of the published", "images/CPU s", "largest difference", "mean"], lines))


if __name__ == "__main__":
    main()
