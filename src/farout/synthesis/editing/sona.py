"""Images in which the class is replaced by another one and the background is kept (SONA; Yoon et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.solvers.base import Solver
from farout.synthesis.editing.base import EditedBatch, EditingContext, EditingSynthesizer, NoisedBatch
from farout.synthesis.editing.sona_guidance import Regions, SonaConfig, SonaGuide

__all__ = ["SONA"]

_STEPS_SHOWN = 4
"""Number of steps whose regions are shown side by side in a region image."""


class SONA(EditingSynthesizer):
    """Synthetic outliers that keep an image's background and show another class in it.

    SONA, semantic outlier generation via nuisance awareness (Yoon et al., AAAI 2025, arXiv 2408.14841). An image is
    noised part of the way and denoised by the unconditional prediction plus three guidance terms, each in a region of
    its own (see `sona_guidance`): keep the region that the class influences least, remove the class where its influence
    is largest, and add the target where its influence is largest.

    Images whose number of steps does not exceed the shortest warm-up are not guided at all, as published: with the
    defaults one in five. `--k-min` excludes them. There is no additional classifier-free guidance.

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

    test_arguments: ClassVar[Mapping[str, Any]] = {"steps": 6, "targets": "mixtures"}

    def __init__(
        self,
        *,
        guidance: SonaConfig = SonaConfig(),  # noqa: B008
        pictures: int = 8,
        **editing: Any,
    ) -> None:
        super().__init__(**editing)
        if pictures < 0:
            raise FaroutError(f"pictures must be 0 or more, got {pictures}")
        self.guidance, self.pictures = guidance, pictures

    def check_solver(self, solver: Solver, sigmas: Tensor) -> None:
        """Raise FaroutError for solvers that evaluate the network more than once per step."""
        solver.check(sigmas, guided=True)

    def denoise(self, editing: EditingContext, batch: NoisedBatch, indices: Sequence[int]) -> EditedBatch:
        """Denoise with SONA's guidance."""
        config = self.guidance.for_steps(self.steps)
        recorders = [
            _RegionRecorder(int(min(config.warmups)), plan.k) if index < self.pictures else None
            for index, plan in zip(indices, batch.plans, strict=True)
        ]

        def record(rows: Tensor, steps: Tensor, regions: Regions) -> None:
            for position, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
                recorder = recorders[row]
                if recorder is not None:
                    recorder.add(step, regions, position)

        guide = SonaGuide(config, editing.clip_range, record if any(recorders) else None)
        conditions = {"null": editing.conditioning.null_condition(len(batch.x)), "class": batch.class_condition}
        if batch.target_condition is not None:
            conditions["target"] = batch.target_condition
        x0 = editing.solver(editing.denoiser, batch.x, batch.sigmas, conditions, guide=guide)
        return EditedBatch(x0, [recorder.image() if recorder is not None else None for recorder in recorders])


class _RegionRecorder:
    """Records the regions of one image at a few evenly spaced steps, from the first guided step to the last one."""

    def __init__(self, first: int, steps: int) -> None:
        last = steps - 1
        self.steps: set[int] = set()
        if last >= first:
            self.steps = {first + round(n * (last - first) / (_STEPS_SHOWN - 1)) for n in range(_STEPS_SHOWN)}
        self.images: list[Tensor] = []

    def add(self, step: int, regions: Regions, row: int) -> None:
        """Record (3, H, W) in [0, 1]: the share of channels in which each pixel belongs to each region."""
        if step in self.steps:
            masks = (regions.class_mask[row], regions.target_mask[row], regions.nuisance_mask[row])
            self.images.append(torch.stack([mask.float().mean(0) for mask in masks]).cpu())

    def image(self) -> Tensor | None:
        """The recorded steps side by side; None for an image that is not guided."""
        return torch.cat(self.images, dim=2) if self.images else None
