"""A class vector with Gaussian noise, decoded: the control that a method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from farout.core.errors import FaroutError
from farout.diffusion.noise import seeded
from farout.synthesis.base import Work
from farout.synthesis.class_space import ClassPoints, VectorSynthesizer, class_space, vector_scale

__all__ = ["ClassNoise"]


class ClassNoise(VectorSynthesizer):
    """Synthetic outliers from class embeddings with Gaussian noise.

    The image of v = e_y + scale s n, where e_y is the vector of class y, s the standard deviation of all entries of the
    class table, n standard normal noise of (seed, number of the outlier). Of the images only the classes matter. The
    manifest's `distance` is ||v - e_y||.

    Args:
        scale: standard deviation of the noise, relative to that of the class embeddings; 0 gives images of the classes.
    """

    def __init__(self, *, scale: float = 1.0, **decoding: Any) -> None:
        super().__init__(**decoding)
        if scale < 0:
            raise FaroutError(f"scale must be 0 or more, got {scale}")
        self.scale = scale

    @classmethod
    def tiny(cls, resources: Any) -> ClassNoise:
        """Three steps."""
        return cls(steps=3)

    def points(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> ClassPoints:
        """Class vectors with noise."""
        space = class_space(work.generator)
        draws = [torch.randn(space.dim, generator=seeded(work.seed, "class noise", index)) for index in indices]
        offsets = self.scale * vector_scale(space) * torch.stack(draws)
        distances = [float(offset.norm()) for offset in offsets]
        vectors = space.vectors().cpu()[list(labels)] + offsets
        return ClassPoints(vectors, [""] * len(indices), {"distance": distances})
