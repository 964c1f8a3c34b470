"""Colors of anomaly maps."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["colorize", "normalize_map"]


def normalize_map(values: Tensor, maximum: float) -> Tensor:
    """Scale values from [0, maximum] to [0, 1], float32; NaN becomes 1, because it is never normal."""
    return (values.float().nan_to_num(nan=maximum) / maximum).clamp(0, 1)


def colorize(values: np.ndarray, colormap: str) -> np.ndarray:
    """Values in [0, 1], shape (H, W), as colors (H, W, 3) of one of matplotlib's color maps."""
    from matplotlib import colormaps  # takes long to import, and few commands draw

    return np.asarray(colormaps[colormap](values)[..., :3])
