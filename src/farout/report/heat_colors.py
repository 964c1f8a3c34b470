"""The colours of maps: their unit and scale, which a detector declares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from farout.detectors.base import Detector

__all__ = ["MapScale", "colorize"]


@dataclass(frozen=True)
class MapScale:
    """unit: what a map's numbers are in; brightest: from where on the colour is at its strongest, it begins at 0. One
    scale for all images of a method: pictures of two runs can be compared.
    """

    unit: str = Detector.map_unit
    brightest: float = Detector.map_brightest

    @classmethod
    def of(cls, detector: Detector) -> MapScale:
        """What the detector declares as `map_unit` and `map_brightest`."""
        return cls(detector.map_unit, detector.map_brightest)

    def share(self, values: Tensor) -> Tensor:
        """0 (dark) to 1 (brightest), float32, shape of `values`; what is not a number is brightest."""
        # a value that cannot be computed is never that of a good image
        return (values.float().nan_to_num(nan=self.brightest) / self.brightest).clamp(0, 1)


def colorize(values: np.ndarray, colormap: str) -> np.ndarray:
    """Values in [0, 1], shape (H, W), as colors (H, W, 3) of one of matplotlib's color maps."""
    from matplotlib import colormaps

    return np.asarray(colormaps[colormap](values)[..., :3])
