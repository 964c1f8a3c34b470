"""From vectors of a generator's class space to images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.classes import names_of
from farout.data.image_source import ImageSource
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.base import Condition, Conditioning
from farout.diffusion.conditioning.prompt_tokens import PromptTokens
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded
from farout.diffusion.sampling import Sampler, Spacing
from farout.synthesis.base import Made, Synthesizer, Work
from farout.synthesis.generator_check import class_places, warn_of_poor_samples

__all__ = ["PUBLISHED", "ClassPoints", "VectorSynthesizer", "class_space", "decode", "noised", "vector_scale"]

PUBLISHED: dict[str, Any] = {
    "solver": "plms",
    "steps": 50,
    "spacing": "leading",
    "guidance": 7.5,
    "prompts": Prompts(generation="A high-quality image of the {}", pieces="first"),
}
"""How NCIS and Dream-OOD decode with Stable Diffusion 1.4: a part of the presets of their papers."""


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
        raise FaroutError("all numbers of this model's class table are the same: it does not distinguish classes")
    return scale


def decode(
    sampler: Sampler,
    vectors: Tensor,
    indices: Sequence[int],
    labels: Sequence[int] | None = None,
    change: Callable[[Condition], Condition] | None = None,
) -> Tensor:
    """Images (B, C, H, W) float32 in [0, 1] of class vectors (B, D), on the CPU.

    Image i starts from the noise of (the sampler's seed, indices[i]), whatever else is in the batch; the class's own
    vector gives the image that `Sampler.images` gives of that class under that number.

    Args:
        sampler: of a class-conditional model.
        vectors: to be decoded.
        indices: numbers of the noises.
        labels: the classes that the vectors belong to, for models whose vectors stand in prompts of their classes.
        change: done to the condition that the vectors make.

    Raises FaroutError for an unconditional model, vectors of another shape or without labels that they need, and those
    that are not numbers.
    """
    conditioning = class_space(sampler.model)
    if not bool(torch.isfinite(vectors).all()):
        raise FaroutError("some class vectors to decode are not finite numbers")
    told = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
    condition = conditioning(vectors.float(), told)
    return sampler.images_under(condition if change is None else change(condition), indices)


def noised(condition: Condition, scale: float, seed: int, indices: Sequence[int]) -> Condition:
    """A condition with Gaussian noise of standard deviation `scale` on its numbers, row i from (seed, indices[i])."""

    def row(values: Tensor, name: str, index: int) -> Tensor:
        drawn = torch.randn(values.shape, generator=seeded(seed, "condition noise", name, index))
        return values + scale * drawn.to(values.device)

    return Condition(
        {
            name: torch.stack([row(values, name, index) for values, index in zip(tensor, indices, strict=True)])
            for name, tensor in condition.tensors.items()
        }
    )


@dataclass(frozen=True)
class ClassPoints:
    """Points of a class space: vectors float32 (B, D); the key of the image that each was made of, or empty; and what
    else varies by point, by name.
    """

    vectors: Tensor
    sources: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class VectorSynthesizer(Synthesizer):
    """A synthesizer that finds points of the generator's class space, each of which becomes an image of its own.

    A method implements `points`.

    Args:
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of solver steps from noise to image; default: 20 (probability_flow chooses its own).
        spacing: spacing of the steps: `grid` (even in t), `geometric` (even in log sigma) or `leading` (even in t from
            1 up, as for Stable Diffusion: 981, …, 21, 1).
        guidance: scale of classifier-free guidance; 1: none, as models without label dropout need; 2 suits small
            models, 7.5 Stable Diffusion.
        size: side of the generated images in pixels, a multiple of the network's downsampling factor (8 for Stable
            Diffusion); default: the generator's training size, which gives the best images.
        prompts: prompts of the classes for a Stable Diffusion folder; other generators know their classes.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion", "classes", "labels"})

    def __init__(
        self,
        *,
        solver: str = "dpm_solver_2m",
        steps: int | None = None,
        spacing: Spacing = "grid",
        guidance: float = 2.0,
        size: int | None = None,
        prompts: Prompts = Prompts(),  # noqa: B008
    ) -> None:
        self.prompts, self.size = prompts, size
        self._decoding: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "spacing": spacing,
            "guidance": guidance,
        }

    @abstractmethod
    def points(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> ClassPoints:
        """The points of outliers number `indices` of the classes `labels`; see `Synthesizer.make`."""

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """The generator; a Stable Diffusion folder is told the classes of the images, as `prompts` says.

        Raises FaroutError for names that do not become prompts, and for prompts that the generator has no use for.
        """
        if isinstance(given, str | Path):
            given = folders.local(given)
            if folders.wants_prompts(given):
                return DiffusionModel.load(given, class_names=names_of(source), prompts=self.prompts)
        model = super().load_diffusion(given, source)
        if model.conditioning is not None:
            _check_unused(self.prompts, model.conditioning)
        return model

    def sampler(self, work: Work) -> Sampler:
        """How points become images, built once a run; FaroutError for settings that the generator cannot follow."""
        return work.once("sampler", lambda: self._built(work.generator, work.seed, work.runtime))

    def _built(self, model: DiffusionModel, seed: int, runtime: Runtime) -> Sampler:
        if self.size is not None:
            model = model.sized(self.size)
        if self.prompts.generation is not None and isinstance(model.conditioning, PromptTokens):
            model = model.conditioned(model.conditioning.in_template(self.prompts.generation))
        precision: Any = runtime.precision  # resolved, so not `auto`
        return Sampler(model, **self._decoding, seed=seed, batch_size=runtime.batch_size, precision=precision)

    def check(self, work: Work) -> None:
        """Refuses guidance without a null condition, solvers, steps or sizes that do not go, and a classifier that
        lacks a class of the generator.
        """
        self.sampler(work)
        if work.classifier is not None:
            class_places(work.classifier, class_space(work.generator).class_names)

    def judge(self, work: Work) -> None:
        """With a classifier, warns of a generator whose own samples it recognises in fewer than 80 % of cases."""
        if work.classifier is not None:
            names = class_space(work.generator).class_names
            warn_of_poor_samples(self.sampler(work), work.classifier, names, work.folder)

    def make(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> Made:
        """The decoded points."""
        found, scale = self.points(work, indices, labels), self.prompts.context_noise
        change = partial(noised, scale=scale, seed=work.seed, indices=indices) if scale else None
        images = decode(self.sampler(work), found.vectors, self.noises(work, indices), labels, change)
        return Made(images, found.sources, found.columns)

    def shape(self, work: Work) -> tuple[int, ...]:
        """Of the asked size."""
        channels, *own = super().shape(work)
        return (channels, *(own if self.size is None else (self.size, self.size)))

    def noises(self, work: Work, indices: Sequence[int]) -> Sequence[int]:
        """The numbers of the noises that outliers start from: their own."""
        return indices


def _check_unused(prompts: Prompts, space: Conditioning) -> None:
    """Refuses settings of prompts for a generator that brings classes of its own."""
    known = {"context_noise"} | ({"generation"} if isinstance(space, PromptTokens) else set())
    unused = [f"prompts.{name}={getattr(prompts, name)!r}" for name in prompts.changed if name not in known]
    if unused:
        raise FaroutError(
            f"{', '.join(unused)} would have no effect: this generator brings its classes by {space.kind}; leave "
            "prompts at their defaults (after --preset paper: --prompts.generation None --prompts.pieces refuse), or "
            "give an original Stable Diffusion folder"
        )
