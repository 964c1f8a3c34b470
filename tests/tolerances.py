"""What "the same result" means in the tests; the promises are in docs/reproducibility.md.

The same command on the same machine gives the same bytes, also when it was interrupted and resumed, and after saving
and loading: those tests compare bytes, and need nothing from here. In another batch, order, process or with another
number of threads a result agrees up to the rounding of float32: matrix libraries choose kernels by the shape of their
input and by the processor, and a kernel's order of summation decides the last bits. Those tests use this module.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from farout.detectors.base import Detector, Scores

SCORE_TOLERANCE = 1e-4
"""In standard deviations of the calibration scores: at least a thousand times smaller than what decides anything."""
GRAY_LEVELS = 1
"""Of 255: an image's value may fall on the other side of a rounding boundary when it is stored with 8 bits."""
SONA_SHARE = 0.6
"""Of the images that SONA makes, the share that has to agree: its regions end where a difference of two predictions
exceeds a quantile, and a value next to the quantile, which rounding puts on the other side, changes that image by more.
"""


def assert_same_scores(actual: Scores, expected: Scores, detector: Detector) -> None:
    """All indicators agree within the promised fraction of a standard deviation; images are matched by key."""
    assert sorted(actual.keys) == sorted(expected.keys)
    order = [actual.keys.index(key) for key in expected.keys]
    for name, values in expected.indicators.items():
        scale = np.std(detector.calibration_scores[name])
        difference = np.abs(actual.indicators[name][order] - values)
        assert np.array_equal(np.isnan(difference), np.isnan(values)), name
        assert np.nanmax(difference, initial=0) <= SCORE_TOLERANCE * scale, f"{name}: {np.nanmax(difference) / scale:g}"
    unequal = np.array(actual.is_ood)[order] != np.array(expected.is_ood)
    close_to_alpha = np.abs(expected.p_value - detector.alpha) <= 1.5 / (len(detector.calibration) + 1)
    assert not (unequal & ~close_to_alpha).any(), "a flag may differ only where the p-value is next to alpha"


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """float32 results of networks agree up to rounding, relative to the largest value of the tensor."""
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


def assert_same_pixels(actual: Tensor, expected: Tensor, share: float = 1.0) -> None:
    """uint8 images (B, C, H, W), of which this share differs by at most one gray level."""
    assert actual.dtype == expected.dtype == torch.uint8
    assert actual.shape == expected.shape
    differences = (actual.int() - expected.int()).abs().flatten(1).amax(1)
    assert float((differences <= GRAY_LEVELS).float().mean()) >= share, differences


def assert_same_images(actual: Path, expected: Path, share: float = 1.0) -> None:
    """Two folders hold the same PNG files; in this share of them, pixels differ by at most one gray level."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*.png"))
    assert names, f"{expected} has no images"
    assert sorted(str(path.relative_to(actual)) for path in actual.rglob("*.png")) == names
    unequal = []
    for name in names:
        one, two = (np.asarray(Image.open(folder / name)).astype(int) for folder in (actual, expected))
        assert one.shape == two.shape, name
        if np.abs(one - two).max() > GRAY_LEVELS:
            unequal.append(name)
    assert len(unequal) <= (1 - share) * len(names), unequal


def assert_same_manifests(actual: Path, expected: Path) -> None:
    """Two `manifest.csv` have the same columns, texts and integers; other numbers agree up to rounding."""
    one, two = (pd.read_csv(folder / "manifest.csv", keep_default_na=False) for folder in (actual, expected))
    assert one.columns.tolist() == two.columns.tolist()
    for name in two:
        if pd.api.types.is_float_dtype(two[name]):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-5, err_msg=name)
        else:
            assert one[name].tolist() == two[name].tolist(), name
