"""Images noised part of the way and denoised under another class: the baseline of sona (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import ClampedDenoiser, Denoiser, GuidedDenoiser
from farout.synthesis.editing.base import EditedBatch, EditingContext, EditingSynthesizer, NoisedBatch

__all__ = ["SDEdit"]


class SDEdit(EditingSynthesizer):
    """Synthetic outliers by image-to-image towards another class, without SONA's regions.

    Meng, He, Song, Song, Wu, Zhu and Ermon, "SDEdit: guided image synthesis and editing with stochastic differential
    equations", ICLR 2022. Images, targets, levels and noise are those of `sona` with the same seed; each image is then
    denoised under its target with classifier-free guidance (Ho & Salimans 2022). With targets `none`, it is denoised
    without a condition.

    Args:
        guidance: scale of classifier-free guidance towards the target; 1: none; 2 suits small models, 7.5 Stable
            Diffusion.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"steps": 50, "guidance": 7.5}}

    test_arguments: ClassVar[Mapping[str, Any]] = {"steps": 6, "targets": "mixtures"}

    def __init__(self, *, guidance: float = 2.0, **editing: Any) -> None:
        super().__init__(**editing)
        if guidance < 0:
            raise FaroutError(f"guidance must be 0 or more, got {guidance}")
        if self.targets == "none":
            self._check_unused("with targets other than none", "guidance")
        self.guidance = guidance

    def denoise(self, editing: EditingContext, batch: NoisedBatch, indices: Sequence[int]) -> EditedBatch:
        """Denoise under the target."""
        denoiser: Denoiser = editing.denoiser
        if batch.target_condition is not None:
            denoiser = GuidedDenoiser(denoiser, self.guidance, editing.conditioning.null_condition)
        if editing.clip_range is not None:
            denoiser = ClampedDenoiser(denoiser, *editing.clip_range)
        x0 = editing.solver(denoiser, batch.x, batch.sigmas, batch.target_condition)
        return EditedBatch(x0, [None] * len(indices))
