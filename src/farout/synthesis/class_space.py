"""The class-embedding space of a generator: decoding vectors of it to images, and the synthesizers that work in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.data.classes import present_class_names
from farout.data.image_source import ImageSource
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.base import Condition, Conditioning
from farout.diffusion.conditioning.prompt_tokens import PromptTokens
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded_generator
from farout.diffusion.sampling import Sampler, Spacing
from farout.synthesis.base import SynthesisContext, Synthesizer, SyntheticImages
from farout.synthesis.declarations import SynthesisRequirements
from farout.synthesis.generator_check import classifier_indices, warn_about_poor_samples

__all__ = [
    "PAPER_DECODING",
    "ClassVectors",
    "VectorSynthesizer",
    "add_condition_noise",
    "class_conditioning",
    "class_table_std",
    "decode_vectors",
]

PAPER_DECODING: dict[str, Any] = {
    "solver": "plms",
    "steps": 50,
    "spacing": "leading",
    "guidance": 7.5,
    "prompts": Prompts(generation="A high-quality image of the {}", split_words="first_token"),
}
"""How NCIS and Dream-OOD decode with Stable Diffusion 1.4; part of the presets of both papers."""


def class_conditioning(model: DiffusionModel) -> Conditioning:
    """The conditioning of a class-conditional model; raises FaroutError for an unconditional one."""
    if model.conditioning is None:
        raise FaroutError(
            "this diffusion model is unconditional and has no class vectors; train one with `farout train diffusion "
            "SOURCE --preset classes`"
        )
    return model.conditioning


def class_table_std(conditioning: Conditioning) -> float:
    """Standard deviation of all entries of the class table: a unit of distance that suits any generator.

    Raises FaroutError for a table whose entries are all equal.
    """
    std = float(conditioning.class_vectors().std(correction=0))
    if not std > 0:
        raise FaroutError("all numbers of this model's class table are the same: it does not distinguish classes")
    return std


def decode_vectors(
    sampler: Sampler,
    vectors: Tensor,
    indices: Sequence[int],
    labels: Sequence[int] | None = None,
    transform: Callable[[Condition], Condition] | None = None,
) -> Tensor:
    """Decode class vectors (B, D) to images (B, C, H, W) float32 in [0, 1], on the CPU.

    Image i starts from the noise of (the sampler's seed, indices[i]), whatever else is in the batch. A class's own
    vector gives the image that `Sampler.sample_images` gives for that class and index.

    Args:
        sampler: samples of a class-conditional model.
        vectors: the class vectors.
        indices: indices of the noise.
        labels: classes of the vectors, for models whose class vector is one token in the prompt of its class.
        transform: applied to the condition that the vectors give.

    Raises FaroutError for an unconditional model, vectors of another shape or without the labels they need, and
    vectors that are not finite.
    """
    conditioning = class_conditioning(sampler.model)
    if not bool(torch.isfinite(vectors).all()):
        raise FaroutError("some class vectors to decode are not finite numbers")
    label_tensor = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
    condition = conditioning(vectors.float(), label_tensor)
    return sampler.sample_with_condition(condition if transform is None else transform(condition), indices)


def add_condition_noise(condition: Condition, scale: float, seed: int, indices: Sequence[int]) -> Condition:
    """Add Gaussian noise of standard deviation `scale` to a condition; row i depends on (seed, indices[i])."""
    noisy = {}
    for name, tensor in condition.tensors.items():
        generators = [seeded_generator(seed, "condition noise", name, index) for index in indices]
        noise = torch.stack([torch.randn(tensor.shape[1:], generator=generator) for generator in generators])
        noisy[name] = tensor + scale * noise.to(tensor.device)
    return Condition(noisy)


@dataclass(frozen=True)
class ClassVectors:
    """Vectors of a class-embedding space.

    Attributes:
        vectors: float32 (B, D).
        columns: additional manifest columns, one value per vector.
    """

    vectors: Tensor
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class VectorSynthesizer(Synthesizer):
    """A synthesizer that finds vectors in the generator's class-embedding space and decodes each to an image.

    A method implements `find_vectors`.

    Args:
        solver: one of `ddim`, `heun`, `dpm_solver_2m`, `unipc`, `plms`, `pndm2`, `pndm4`, `ndm1`, `ndm4` or
            `probability_flow`.
        steps: number of solver steps from noise to image; default: 20 (probability_flow chooses its own).
        spacing: spacing of the steps: `even` (even in t), `geometric` (even in log sigma) or `leading` (even in t from
            1 up, as for Stable Diffusion: 981, …, 21, 1).
        guidance: scale of classifier-free guidance; 1: none, as models without label dropout need; 2 suits small
            models, 7.5 Stable Diffusion.
        size: side of the generated images in pixels, a multiple of the network's downsampling factor (8 for Stable
            Diffusion); default: the generator's training size, which gives the best images.
        prompts: prompts of the classes for a Stable Diffusion folder; other generators know their classes.
    """

    requirements = SynthesisRequirements(diffusion=True, class_conditional=True)

    def __init__(
        self,
        *,
        solver: str = "dpm_solver_2m",
        steps: int | None = None,
        spacing: Spacing = "even",
        guidance: float = 2.0,
        size: int | None = None,
        prompts: Prompts = Prompts(),  # noqa: B008
    ) -> None:
        self.prompts, self.size = prompts, size
        self._sampler_settings: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "spacing": spacing,
            "guidance": guidance,
        }

    @abstractmethod
    def find_vectors(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> ClassVectors:
        """The class vectors of the outliers `indices` of the classes `labels`; see `Synthesizer.generate`."""

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """Load the generator; a Stable Diffusion folder gets a prompt for each class of the images.

        Raises FaroutError for class names that do not become prompts, and for prompts that the generator cannot use.
        """
        if isinstance(given, str | Path):
            given = folders.local_folder(given)
            if folders.requires_class_names(given):
                return DiffusionModel.load(given, class_names=present_class_names(source), prompts=self.prompts)
        model = super().load_diffusion(given, source)
        if model.conditioning is not None:
            usable = {"context_noise"}
            if isinstance(model.conditioning, PromptTokens):
                usable.add("generation")
            unused = [
                f"prompts.{name}={getattr(self.prompts, name)!r}" for name in self.prompts.changed if name not in usable
            ]
            if unused:
                raise FaroutError(
                    f"{', '.join(unused)} would have no effect: this generator has its own classes "
                    f"({model.conditioning.kind}); leave prompts at their defaults (after --preset paper: "
                    "--prompts.generation None --prompts.split-words raise), or give an original Stable Diffusion "
                    "folder"
                )
        return model

    def sampler(self, context: SynthesisContext) -> Sampler:
        """The sampler that decodes the vectors; raises FaroutError for settings that the generator cannot follow."""

        def build() -> Sampler:
            model = context.generator
            if self.size is not None:
                model = model.with_image_size(self.size)
            if self.prompts.generation is not None and isinstance(model.conditioning, PromptTokens):
                model = model.with_conditioning(model.conditioning.with_template(self.prompts.generation))
            precision: Any = context.runtime.precision  # resolved, so not `auto`
            return Sampler(
                model,
                **self._sampler_settings,
                seed=context.seed,
                batch_size=context.runtime.batch_size,
                precision=precision,
            )

        return context.cached("sampler", build)

    def check(self, context: SynthesisContext) -> None:
        """Raise FaroutError for guidance without a null condition, for solvers, steps or sizes that the generator
        cannot follow, and for a classifier that lacks a class of the generator.
        """
        self.sampler(context)
        if context.classifier is not None:
            classifier_indices(context.classifier, class_conditioning(context.generator).class_names)

    def warn_about_generator(self, context: SynthesisContext) -> None:
        """Warn if the given classifier recognizes fewer than 80 % of the generator's own samples."""
        if context.classifier is not None:
            names = class_conditioning(context.generator).class_names
            warn_about_poor_samples(self.sampler(context), context.classifier, names, context.folder)

    def generate(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> SyntheticImages:
        """Find the vectors and decode them."""
        found, noise_scale = self.find_vectors(context, indices, labels), self.prompts.context_noise
        transform = (
            partial(add_condition_noise, scale=noise_scale, seed=context.seed, indices=indices) if noise_scale else None
        )
        noise_indices = self.noise_indices(context, indices)
        images = decode_vectors(self.sampler(context), found.vectors, noise_indices, labels, transform)
        return SyntheticImages(images, [""] * len(indices), found.columns)

    def image_shape(self, context: SynthesisContext) -> tuple[int, ...]:
        """(C, H, W), with the requested size."""
        channels, *size = super().image_shape(context)
        return (channels, *(size if self.size is None else (self.size, self.size)))

    def noise_indices(self, context: SynthesisContext, indices: Sequence[int]) -> Sequence[int]:
        """The indices of the initial noise of the outliers `indices`; by default their own."""
        return indices
