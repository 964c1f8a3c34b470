"""The class of a detector's diffusion model, imported only when a detector has one: `farout.diffusion.model` imports
diffusers, `farout.features.feature_diffusion` scikit-learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from farout.diffusion.model import DiffusionModel
    from farout.features.feature_diffusion import FeatureDiffusion

__all__ = ["diffusion_class"]


def diffusion_class(data: Literal["images", "features"]) -> type[DiffusionModel] | type[FeatureDiffusion]:
    """Returns the class of diffusion models of images or of features."""
    if data == "features":
        from farout.features.feature_diffusion import FeatureDiffusion

        return FeatureDiffusion
    from farout.diffusion.model import DiffusionModel

    return DiffusionModel
