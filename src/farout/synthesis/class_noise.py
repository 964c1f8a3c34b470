"""Images of class embeddings with Gaussian noise: the baseline of every synthesizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from farout.core.errors import FaroutError
from farout.diffusion.noise import seeded_generator
from farout.synthesis.base import SynthesisContext
from farout.synthesis.class_space import ClassVectors, VectorSynthesizer, class_conditioning, class_table_std

__all__ = ["ClassNoise"]


class ClassNoise(VectorSynthesizer):
    """Synthetic outliers from class embeddings with Gaussian noise.

    Decodes v = e_y + scale s n, where e_y is the embedding of class y, s the standard deviation of all entries of the
    class table, and n standard normal noise that depends on (seed, index of the outlier). Only the classes of the
    images are used. The manifest's `distance` is ||v - e_y||.

    Args:
        scale: standard deviation of the noise, relative to that of the class embeddings; 0 gives images of the classes.
    """

    test_arguments: ClassVar[Mapping[str, Any]] = {"steps": 3}

    def __init__(self, *, scale: float = 1.0, **decoding: Any) -> None:
        super().__init__(**decoding)
        if scale < 0:
            raise FaroutError(f"scale must be 0 or more, got {scale}")
        self.scale = scale

    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """Class embeddings with noise."""
        conditioning = class_conditioning(context.generator)
        noise = torch.stack(
            [
                torch.randn(conditioning.dim, generator=seeded_generator(context.seed, "class noise", index))
                for index in indices
            ]
        )
        offsets = self.scale * class_table_std(conditioning) * noise
        vectors = conditioning.class_vectors().cpu()[list(labels)] + offsets
        return ClassVectors(vectors, {"distance": offsets.norm(dim=1).tolist()})
