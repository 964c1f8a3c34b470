"""Images of the classes with another class in place of their own, in their own surroundings (Yoon et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.solvers.base import Solver
from farout.synthesis.editing.base import Deformation, Denoised, Plan, Start
from farout.synthesis.editing.sona_guidance import BRANCHES, Regions, SonaConfig, SonaGuide

__all__ = ["SONA"]

_SHOWN = 4
"""Steps whose regions a picture shows."""


class SONA(Deformation):
    """Synthetic outliers that keep an image's background and show another class in it.

    SONA, semantic outlier generation via nuisance awareness (Yoon et al., AAAI 2025, arXiv 2408.14841). An image is
    noised part of the way and denoised by the unconditional prediction and three terms, each in a region of its own
    (see `sona_guidance`): what its class says least of is kept, what its class says most of is taken out, and what the
    target says most of is put in.

    Images that go no more steps than the shortest warm-up are not guided at all, as published: with the defaults one in
    five. `--k-min` leaves them out. There is no ordinary guidance on top.

    Args:
        guidance: constants of the guidance.
        pictures: number of outliers whose edited regions are saved as OUT/regions/NUMBER.png: four steps side by side;
            red: class removed, green: target added, blue: kept.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "steps": 50,
            "guidance": SonaConfig(nuisance_warmup=20, class_warmup=10, target_warmup=10),
        }
    }

    def __init__(
        self,
        *,
        guidance: SonaConfig = SonaConfig(),  # noqa: B008
        pictures: int = 8,
        **deformation: Any,
    ) -> None:
        super().__init__(**deformation)
        if pictures < 0:
            raise FaroutError(f"pictures must be 0 or more, got {pictures}")
        self.guidance, self.pictures = guidance, pictures

    @classmethod
    def tiny(cls, resources: Any) -> SONA:
        """Six steps."""
        return cls(steps=6, targets="mixtures")

    def rehearse(self, solver: Solver, sigmas: Tensor) -> None:
        """Refuses solvers that evaluate more than once a step."""
        solver.check(sigmas, guided=True)

    def denoise(self, plan: Plan, start: Start, indices: Sequence[int]) -> Denoised:
        """Under the guidance."""
        config = self.guidance.for_steps(self.steps)
        first = int(min(config.warm_ups))
        views = [
            _View(first, draw.k) if index < self.pictures else None
            for index, draw in zip(indices, start.draws, strict=True)
        ]

        def watch(rows: Tensor, steps: Tensor, found: Regions) -> None:
            for place, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
                view = views[row]
                if view is not None:
                    view.add(step, found, place)

        guide = SonaGuide(config, plan.limits, watch if any(views) else None)
        branches = (plan.space.null(len(start.x)), start.own, start.target)
        conditions = {name: given for name, given in zip(BRANCHES, branches, strict=True) if given is not None}
        x0 = plan.solve(plan.denoiser, start.x, start.sigmas, conditions, guide=guide)
        return Denoised(x0, [view.picture() if view is not None else None for view in views])


class _View:
    """The regions of one image at a few of its steps, from the first that is guided to the last."""

    def __init__(self, first: int, steps: int) -> None:
        last = steps - 1
        self.steps = (
            {first + round(n * (last - first) / (_SHOWN - 1)) for n in range(_SHOWN)} if last >= first else set()
        )
        self.seen: list[Tensor] = []

    def add(self, step: int, found: Regions, row: int) -> None:
        """Remembers (3, H, W) in [0, 1], the shares of the channels in which each region is."""
        if step in self.steps:
            masks = (found.own[row], found.target[row], found.nuisance[row])
            self.seen.append(torch.stack([mask.float().mean(0) for mask in masks]).cpu())

    def picture(self) -> Tensor | None:
        """Side by side; None for an image that is not guided."""
        return torch.cat(self.seen, dim=2) if self.seen else None
