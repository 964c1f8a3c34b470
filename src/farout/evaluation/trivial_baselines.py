"""Trivial baselines: numbers that need no network. A detector that is no better than these has learned a shortcut."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.data.batching import Batch
from farout.data.decoding import to_pil
from farout.detectors.base import Detector, Measurements
from farout.features.densities import Mahalanobis, ZScore

__all__ = ["INDICATORS", "NAME", "TrivialBaselines"]

NAME = "trivial_baselines"
"""Name of the detector in tables."""
INDICATORS = ("color_mean", "color_variance", "png_size", "laplacian_energy", "block_edge_energy")
"""Names of the five numbers."""
_LAPLACIAN = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]


class TrivialBaselines(Detector):
    """Five numbers per image, scored by |z| alone and by the Mahalanobis distance together.

    - `color_mean`, `color_variance`: mean and variance over pixels and channels.
    - `png_size`: bytes of the image as PNG, per pixel.
    - `laplacian_energy`: mean square of the 3x3 Laplacian of the gray image.
    - `block_edge_energy`: mean squared difference of neighboring pixels across the borders of 8x8 blocks, divided by
      that inside the blocks; high for JPEG images. 0 if the image is smaller than two blocks.
    """

    def __init__(self, *, score: str = "all") -> None:
        self.z: ZScore | None = None
        self.mahalanobis: Mahalanobis | None = None

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Values (B, 1, 1, 5)."""
        images = batch.images.double()
        png_sizes = [_png_size(image) for image in batch.images]
        gray = images.mean(1, keepdim=True)
        kernel = torch.tensor(_LAPLACIAN, dtype=images.dtype)[None, None]
        columns = [
            images.mean((1, 2, 3)),
            images.var((1, 2, 3), unbiased=False),
            torch.tensor(png_sizes, dtype=torch.float64),
            functional.conv2d(gray, kernel).square().mean((1, 2, 3)),
            _block_edge_energy(images),
        ]
        values = torch.stack(columns, dim=1).float()[:, None, None]
        return Measurements(batch.keys, values, (0.0,), INDICATORS)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Fit mean, standard deviation and covariance of the five numbers."""
        values = _values_of(measurements)
        self.z, self.mahalanobis = ZScore.fit(values), Mahalanobis.fit(values)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`all`: Mahalanobis distance; and |z| of each number by its name."""
        assert self.z is not None
        assert self.mahalanobis is not None
        values = _values_of(measurements)
        absolute_z = np.abs(self.z.transform(values))
        scores = {"all": self.mahalanobis.score(values)}
        scores |= {name: absolute_z[:, column] for column, name in enumerate(INDICATORS)}
        return {name: torch.from_numpy(score) for name, score in scores.items()}

    def get_state(self) -> dict[str, np.ndarray]:
        """The fitted statistics as arrays."""
        assert self.z is not None
        assert self.mahalanobis is not None
        parts = {"z": self.z.to_arrays(), "mahalanobis": self.mahalanobis.to_arrays()}
        return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _values_of(measurements: Measurements) -> np.ndarray:
    """The five numbers of each image, (B, 5), float64."""
    assert measurements.values is not None
    return np.asarray(measurements.values[:, 0, 0].double().numpy())


def _png_size(image: Tensor) -> float:
    """Bytes per pixel of an image as PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return len(buffer.getvalue()) / image[0].numel()


def _block_edge_energy(images: Tensor) -> Tensor:
    """Energy of the differences across the borders of 8x8 blocks relative to that inside, both directions, (B,)."""
    across = torch.zeros(len(images), dtype=images.dtype)
    inside = torch.zeros(len(images), dtype=images.dtype)
    for axis in (2, 3):
        differences = images.diff(dim=axis).square().transpose(2, axis)
        is_border = torch.arange(differences.shape[2]) % 8 == 7
        if is_border.any():
            across += differences[:, :, is_border].mean((1, 2, 3))
            inside += differences[:, :, ~is_border].mean((1, 2, 3))
    return across / (inside + 1e-8)
