"""From vectors of a generator's class space to images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.diffusion.conditioning import Conditioning
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import Sampler, Spacing
from farout.errors import FaroutError
from farout.outliers._recognised import check_knows, warn_of_poor_samples
from farout.outliers.base import Made, Synthesiser, Work

__all__ = ["ClassPoints", "VectorSynthesiser", "class_space", "decode", "vector_scale"]


def class_space(model: DiffusionModel) -> Conditioning:
    """The conditioning of a class-conditional model; raises FaroutError for an unconditional one."""
    if model.conditioning is None:
        raise FaroutError(
            "this diffusion model is unconditional and has no class vectors; train one with `farout train diffusion "
            "SOURCE --preset classes`"
        )
    return model.conditioning


def vector_scale(conditioning: Conditioning) -> float:
    """Standard deviation of all entries of the class table: the unit of distances in it, whatever the generator.

    Raises FaroutError for a table whose entries are all the same.
    """
    scale = float(conditioning.vectors().std(correction=0))
    if not scale > 0:
        raise FaroutError("all numbers of this model's class table are the same: it tells no classes apart")
    return scale


def decode(sampler: Sampler, vectors: Tensor, indices: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) float32 in [0, 1] of class vectors (B, D), on the CPU.

    Image i starts from the noise of (the sampler's seed, indices[i]), whatever else is in the batch; the class's own
    vector gives the image that `Sampler.images` gives of that class under that number.

    Raises FaroutError for an unconditional model, vectors of another shape, and those that are not numbers.
    """
    conditioning = class_space(sampler.model)
    if not bool(torch.isfinite(vectors).all()):
        raise FaroutError("some class vectors to decode are not finite numbers")
    return sampler.images_under(conditioning(vectors.float()), indices)


@dataclass(frozen=True)
class ClassPoints:
    """Points of a class space: vectors float32 (B, D); the key of the image that each was made of, or empty; and what
    else varies by point, by name.
    """

    vectors: Tensor
    sources: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class VectorSynthesiser(Synthesiser):
    """A synthesiser that finds points of the generator's class space, each of which becomes an image of its own.

    A method implements `points`.

    Args:
        solver: ddim, heun, dpm_solver_2m, unipc, plms, pndm2, pndm4, ndm1, ndm4 or probability_flow.
        steps: steps from noise to image; without it 20, or as many as probability_flow finds.
        spacing: where the steps lie: grid (evenly in t) or geometric (evenly in log sigma).
        guidance: weight of the class: 1 is conditional, all that a model without label dropout can do. 2 suits small
            models, Stable Diffusion is used with 7.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion", "classes", "labels"})

    def __init__(
        self,
        *,
        solver: str = "dpm_solver_2m",
        steps: int | None = None,
        spacing: Spacing = "grid",
        guidance: float = 2.0,
    ) -> None:
        self._decoding: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "spacing": spacing,
            "guidance": guidance,
        }

    @abstractmethod
    def points(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> ClassPoints:
        """The points of outliers number `indices` of the classes `labels`; see `Synthesiser.make`."""

    def sampler(self, work: Work) -> Sampler:
        """How points become images, built once a run; FaroutError for settings that the generator cannot follow."""
        if "sampler" not in work.built:
            runtime = work.runtime
            work.built["sampler"] = Sampler(
                work.generator,
                **self._decoding,
                seed=work.seed,
                rows=int(runtime.rows),
                precision=runtime.precision,  # type: ignore[arg-type]  # resolved, so not `auto`
            )
        return work.built["sampler"]

    def check(self, work: Work) -> None:
        """Refuses guidance without a null condition, solvers or steps that do not go, and a classifier that lacks a
        class of the generator.
        """
        self.sampler(work)
        if work.classifier is not None:
            check_knows(work.classifier, class_space(work.generator).class_names)

    def judge(self, work: Work) -> None:
        """With a classifier, warns of a generator whose own samples it recognises in fewer than 80 % of cases."""
        if work.classifier is not None:
            names = class_space(work.generator).class_names
            warn_of_poor_samples(self.sampler(work), work.classifier, names, work.folder)

    def make(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> Made:
        """The decoded points."""
        found = self.points(work, indices, labels)
        return Made(decode(self.sampler(work), found.vectors, self.noises(indices)), found.sources, found.columns)

    def noises(self, indices: Sequence[int]) -> Sequence[int]:
        """The numbers of the noises that outliers start from: their own."""
        return indices
