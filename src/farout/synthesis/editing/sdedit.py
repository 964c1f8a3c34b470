"""Images noised part of the way and denoised under another class: the control of sona (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import Clamped, Denoiser, Guided
from farout.synthesis.editing.base import Deformation, Denoised, Plan, Start

__all__ = ["SDEdit"]


class SDEdit(Deformation):
    """Synthetic outliers by image-to-image towards another class, without SONA's regions.

    Meng, He, Song, Song, Wu, Zhu and Ermon, "SDEdit: guided image synthesis and editing with stochastic differential
    equations", ICLR 2022. Images, targets, levels and noise are those of `sona` under the same seed; from there each is
    denoised under its target with ordinary guidance (Ho & Salimans 2022). Targets none: without condition.

    Args:
        guidance: scale of classifier-free guidance towards the target; 1: none; 2 suits small models, 7.5 Stable
            Diffusion.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"steps": 50, "guidance": 7.5}}

    def __init__(self, *, guidance: float = 2.0, **deformation: Any) -> None:
        super().__init__(**deformation)
        if guidance < 0:
            raise FaroutError(f"guidance must be 0 or more, got {guidance}")
        if self.targets == "none":
            self._refuse_idle("without a target; give other targets than none", "guidance")
        self.guidance = guidance

    @classmethod
    def tiny(cls, resources: Any) -> SDEdit:
        """Six steps."""
        return cls(steps=6, targets="mixtures")

    def denoise(self, plan: Plan, start: Start, indices: Sequence[int]) -> Denoised:
        """Under the target."""
        denoiser: Denoiser = plan.denoiser
        if start.target is not None:
            denoiser = Guided(denoiser, self.guidance, plan.space.null)
        if plan.limits is not None:
            denoiser = Clamped(denoiser, *plan.limits)
        x0 = plan.solve(denoiser, start.x, start.sigmas, start.target)
        return Denoised(x0, [None] * len(indices))
