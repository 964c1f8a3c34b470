"""Trivial controls: numbers that need no model. A detector that does not beat them has found a shortcut."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farout.data.batching import Batch
from farout.data.decoding import to_pil
from farout.detectors.base import Detector, Measurements
from farout.features.densities import Mahalanobis, ZScore

__all__ = ["CONTROLS", "TRIVIAL", "TrivialControls"]

TRIVIAL = "trivial_controls"
"""The name under which they are rated, all together."""
CONTROLS = ("colour_mean", "colour_variance", "png_size", "laplacian_energy", "block_edge_energy")
"""The indicators of each alone."""


class TrivialControls(Detector):
    """Five numbers per image, each scored by |z| over the statistics images, and all together by Mahalanobis distance.

    colour_mean and colour_variance: over pixels and channels; png_size: bytes of the image as PNG per pixel;
    laplacian_energy: mean square of the 3x3 Laplacian; block_edge_energy: mean squared step across the lines of an 8x8
    grid over that elsewhere, which tells JPEG coding.
    """

    def __init__(self, *, score: str = "all") -> None:
        self.z: ZScore | None = None
        self.mahalanobis: Mahalanobis | None = None

    @classmethod
    def tiny(cls, resources: Any) -> TrivialControls:
        """The controls themselves."""
        return cls()

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        """Values (B, 1, 1, controls)."""
        images = batch.images.double()
        columns = [
            images.mean((1, 2, 3)),
            images.var((1, 2, 3), unbiased=False),
            torch.tensor([_png_size(image) for image in batch.images], dtype=torch.float64),
            _laplacian(images),
            _block_edges(images),
        ]
        values = torch.stack(columns, dim=1).float()[:, None, None]
        return Measurements(batch.keys, values, (0.0,), CONTROLS)

    def fit_statistics(self, measurements: Measurements) -> None:
        """Mean, deviation and covariance of the five numbers."""
        values = _table(measurements)
        self.z, self.mahalanobis = ZScore.fit(values), Mahalanobis.fit(values)

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        """`all`, and |z| of each control by its name."""
        assert self.z is not None
        assert self.mahalanobis is not None
        values = _table(measurements)
        alone = np.abs(self.z.transform(values))
        scores = {"all": self.mahalanobis.score(values), **{n: alone[:, i] for i, n in enumerate(CONTROLS)}}
        return {name: torch.from_numpy(score) for name, score in scores.items()}

    def state(self) -> dict[str, np.ndarray]:
        """The fitted statistics as arrays."""
        assert self.z is not None
        assert self.mahalanobis is not None
        parts = {"z": self.z.to_arrays(), "mahalanobis": self.mahalanobis.to_arrays()}
        return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _table(measurements: Measurements) -> np.ndarray:
    assert measurements.values is not None
    return measurements.values[:, 0, 0].double().numpy()


def _png_size(image: Tensor) -> float:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return len(buffer.getvalue()) / image[0].numel()


def _laplacian(images: Tensor) -> Tensor:
    grey = images.mean(1, keepdim=True)
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=images.dtype).reshape(1, 1, 3, 3)
    return functional.conv2d(grey, kernel).square().mean((1, 2, 3))


def _block_edges(images: Tensor) -> Tensor:
    """Both directions together; 0 where the image is smaller than two blocks."""
    on, off = torch.zeros(len(images), dtype=images.dtype), torch.zeros(len(images), dtype=images.dtype)
    for axis in (2, 3):
        steps = images.diff(dim=axis).square().transpose(2, axis)
        lines = torch.arange(steps.shape[2]) % 8 == 7
        if lines.any():
            on, off = on + steps[:, :, lines].mean((1, 2, 3)), off + steps[:, :, ~lines].mean((1, 2, 3))
    return on / (off + 1e-8)
