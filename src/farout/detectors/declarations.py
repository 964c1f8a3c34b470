"""What a detection method declares about itself in class variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["HeatMaps", "Requirements"]


@dataclass(frozen=True)
class Requirements:
    """What the fit of a method requires; a network that is required and not given is trained or built.

    Args:
        diffusion: a diffusion model of `images` (`DiffusionModel`), of `features` (`FeatureDiffusion`), or None.
        class_conditional: whether the diffusion model must be conditioned on classes.
        classifier: whether a classifier is required.
        backbone: whether a feature extractor is required.
        diffusion_preset: preset of `farout train diffusion` for a diffusion model of images that is trained in the fit.
        statistics: number of statistics images.
        more_statistics: whether to measure more statistics images than that, where there are more.
    """

    diffusion: Literal["images", "features"] | None = None
    class_conditional: bool = False
    classifier: bool = False
    backbone: bool = False
    diffusion_preset: str = "tiny"
    statistics: int = 400
    more_statistics: bool = True


@dataclass(frozen=True)
class HeatMaps:
    """How the heat maps of a method are shown; one scale for all images, so that two runs can be compared.

    Args:
        unit: unit of the values, for captions.
        maximum: value from which on the color is at its strongest; the scale begins at 0.
        pictures: names of the measurements' pictures that are maps (B, 1, H, W) in the same unit.
    """

    unit: str = "standard deviations above normal images"
    maximum: float = 6.0
    pictures: frozenset[str] = frozenset()
