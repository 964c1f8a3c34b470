"""Colors of anomaly maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from farout.detectors.base import Detector
from farout.detectors.declarations import HeatMaps

__all__ = ["MapScale", "colorize"]


@dataclass(frozen=True)
class MapScale:
    """Unit and color scale of a method's maps; the same for all images, so that maps of two runs can be compared.

    Attributes:
        unit: what the numbers of a map are.
        brightest: value from which on the color is brightest; the scale begins at 0.
    """

    unit: str = HeatMaps.unit
    brightest: float = HeatMaps.maximum

    @classmethod
    def of(cls, detector: Detector) -> MapScale:
        """The scale that the detector declares as `heat_maps`."""
        return cls() if detector.heat_maps is None else cls(detector.heat_maps.unit, detector.heat_maps.maximum)

    def normalize(self, values: Tensor) -> Tensor:
        """Values scaled to [0, 1], float32; NaN becomes 1, because a value that cannot be computed is never normal."""
        return (values.float().nan_to_num(nan=self.brightest) / self.brightest).clamp(0, 1)


def colorize(values: np.ndarray, colormap: str) -> np.ndarray:
    """Values in [0, 1], shape (H, W), as colors (H, W, 3) of one of matplotlib's color maps."""
    from matplotlib import colormaps

    return np.asarray(colormaps[colormap](values)[..., :3])
