"""Synthesizers that edit images: noise each image part of the way, and denoise it towards something else."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core.devices import Precision
from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.data.batching import PreparedImages
from farout.data.image_source import ImageSource
from farout.data.indices import require_readable_indices
from farout.data.preprocessing import find_mismatches
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition, missing_null_condition
from farout.diffusion.denoiser import ClampedDenoiser, Denoiser, NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded_generator
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.registry import create_solver, solver_path
from farout.synthesis.base import ReconstructedImages, SynthesisContext, Synthesizer, SyntheticImages
from farout.synthesis.class_space import class_conditioning
from farout.synthesis.declarations import SynthesisRequirements
from farout.synthesis.editing.prompt_config import PAPER_TEMPLATE, PromptConfig
from farout.synthesis.editing.targets import Target, TargetKind, TargetSampler
from farout.synthesis.generator_check import classifier_indices

__all__ = [
    "REGIONS",
    "EditPlan",
    "EditedBatch",
    "EditingContext",
    "EditingSynthesizer",
    "NoisedBatch",
    "interleave_classes",
]

REGIONS = "regions"
"""Sub-folder of a folder of outliers for images of the edited regions."""


@dataclass(frozen=True)
class EditPlan:
    """The random choices for one outlier; they depend on (seed, content of the source image, repeat, attempt) only.

    Attributes:
        index: index of the source image in the source.
        label: class of the source image.
        k: number K of solver steps from the noised image to the outlier.
        target: what the outlier is to show.
        latent_noise: noise of the autoencoder's latent sample; None without an autoencoder.
        noise: noise that is added to the image.
    """

    index: int
    label: int
    k: int
    target: Target
    latent_noise: Tensor | None
    noise: Tensor


@dataclass(frozen=True)
class NoisedBatch:
    """Noised images, ready to be denoised.

    Attributes:
        plans: one for each image.
        x0: the images (B, …) in the network's space.
        x: x0 + sigma noise, (B, …).
        sigmas: paths of noise levels (B, steps + 1), one per image.
        class_condition: conditions of the images' classes.
        target_condition: conditions of the targets; None without targets.
    """

    plans: Sequence[EditPlan]
    x0: Tensor
    x: Tensor
    sigmas: Tensor
    class_condition: Condition
    target_condition: Condition | None


@dataclass(frozen=True)
class EditedBatch:
    """Denoised images.

    Attributes:
        x0: (B, …) in the network's space.
        region_images: images (C, H, W) in [0, 1] of the regions in which each image was edited; None: no image.
    """

    x0: Tensor
    region_images: Sequence[Tensor | None]


@dataclass(frozen=True)
class _Attempt:
    """An outlier that may be rejected: its image (C, H, W) in [0, 1], and the probability of its source class."""

    plan: EditPlan
    image: Tensor
    region_image: Tensor | None
    number: int
    source_class_probability: float = 0.0


class EditingContext:
    """Objects that all batches of one call of `synthesize` share, each built once.

    Args:
        method: the synthesizer.
        context: its inputs.
    """

    def __init__(self, method: EditingSynthesizer, context: SynthesisContext) -> None:
        self.method, self.context = method, context
        self.model: DiffusionModel = context.generator
        self.conditioning = class_conditioning(self.model)
        self.solver: Solver = create_solver(method.solver, self.model.schedule)
        # the paper's grid: 1, T / N + 1, 2 T / N + 1, …
        self.levels = noise_levels.leading_levels(self.model.schedule, method.steps)

    @cached_property
    def source_order(self) -> list[int]:
        """Indices of the readable images, with alternating classes: outlier i is edited from image i mod M."""
        labels, readable = self.context.labels.tolist(), require_readable_indices(self.context.source)
        return [readable[position] for position in interleave_classes([labels[index] for index in readable])]

    @cached_property
    def target_sampler(self) -> TargetSampler:
        """Draws the targets."""
        method = self.method
        return TargetSampler(self.model, self.context.classes, method.targets, method.target_classes, method.prompts)

    @cached_property
    def class_indices(self) -> dict[int, int]:
        """The classifier's index of each class that has images; raises FaroutError if it cannot classify outliers."""
        classifier = cast("Classifier", self.context.classifier)
        channels = classifier.preprocessing.channels
        if channels != self.context.image_shape[0]:
            raise FaroutError(
                f"outliers have {self.context.image_shape[0]} channels, the classifier that judges them {channels}"
            )
        indices = classifier_indices(classifier, self.context.present_names)
        return dict(zip(self.context.classes, indices, strict=True))

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser."""
        runtime = self.context.runtime
        # the runtime is resolved, so its precision is not `auto`
        return self.model.denoiser(runtime.batch_size, cast("Precision", runtime.precision))

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """The pixel range in the network's space that x0 is clamped to; None for latents or without `clip`."""
        return self.model.x0_range if self.method.clip else None

    def level_of(self, k: int) -> float:
        """The noise level at the start of K steps, as a share of the schedule."""
        return (self.levels[k - 1] + 1) / self.model.schedule.num_levels

    def sigma_path(self, k: int) -> Tensor:
        """The sigmas of K steps down to 0, as the solver expects them."""
        return solver_path(self.method.solver, noise_levels.falling_path(self.model.schedule, self.levels[:k]))

    def draw_plan(self, index: int, attempt: int) -> EditPlan:
        """Draw the plan of outlier `index`."""
        repeat, position = divmod(index, len(self.source_order))
        source_index = self.source_order[position]
        label = int(self.context.labels[source_index])
        names = (self.context.source.identity(source_index), repeat, *([attempt] if attempt else []))
        generator = seeded_generator(self.context.seed, "deformation", *names)
        k = int(torch.randint(self.method.k_min, self.method.k_max + 1, (), generator=generator))
        target = self.target_sampler(label, generator)
        has_latents = self.model.autoencoder is not None
        latent_noise = torch.randn(self.model.latent_shape, generator=generator) if has_latents else None
        noise = torch.randn(self.model.shape, generator=generator)
        return EditPlan(source_index, label, k, target, latent_noise, noise)

    def add_noise(self, plans: Sequence[EditPlan]) -> NoisedBatch:
        """Load, encode and noise the source images: x = x0 + sigma_K noise."""
        prepared = PreparedImages(self.context.source, self.model.preprocessing)
        images = [prepared[plan.index] for plan in plans]
        latent_noise = [plan.latent_noise for plan in plans if plan.latent_noise is not None]
        x0 = self.model.encode(torch.stack(images), torch.stack(latent_noise) if latent_noise else None)
        sigmas = noise_levels.pad_paths([self.sigma_path(plan.k) for plan in plans]).to(x0.device)
        x = x0 + expand_dims(sigmas[:, 0], x0) * torch.stack([plan.noise for plan in plans]).to(x0.device)
        class_condition = Condition.join([plan.target.class_condition for plan in plans])
        targets = [plan.target.condition for plan in plans if plan.target.condition is not None]
        return NoisedBatch(plans, x0, x, sigmas, class_condition, Condition.join(targets) if targets else None)

    # -- reconstructions -------------------------------------------------------------------------------------------

    def reconstruction_steps(self, k: int) -> int:
        """Steps of the reconstruction of an image whose outlier takes K steps: at most half of all steps.

        From higher levels a new sample of the class would result (see `farout.diffusion.image_to_image`).
        """
        return min(k, max(1, self.method.steps // 2))

    @torch.no_grad()
    def reconstruct(self, batch: NoisedBatch, indices: Sequence[int]) -> ReconstructedImages | None:
        """Reconstruct the source images of those outliers that are the first of their image; None if there are none.

        With an autoencoder: decode the latents that the outliers start from (level 0). Otherwise each image is noised
        with the noise of its outlier and denoised by the same solver under its own class, without guidance.
        """
        rows = [row for row, index in enumerate(indices) if index < len(self.source_order)]
        if not rows:
            return None
        plans, x0, levels = [batch.plans[row] for row in rows], batch.x0[rows], [0.0] * len(rows)
        if self.model.autoencoder is None:
            counts = [self.reconstruction_steps(plan.k) for plan in plans]
            levels = [self.level_of(count) for count in counts]
            sigmas = noise_levels.pad_paths([self.sigma_path(count) for count in counts]).to(x0.device)
            noise = torch.stack([plan.noise for plan in plans]).to(x0.device)
            denoiser: Denoiser = self.denoiser
            if self.clip_range is not None:
                denoiser = ClampedDenoiser(denoiser, *self.clip_range)
            condition = batch.class_condition.rows(torch.tensor(rows, device=x0.device))
            x0 = self.solver(denoiser, x0 + expand_dims(sigmas[:, 0], x0) * noise, sigmas, condition)
        hashes = [self.context.source.content_hash(plan.index) for plan in plans]
        return ReconstructedImages(rows, self.model.decode(x0).cpu(), {"level": levels, "source_hash": hashes})


def interleave_classes(labels: Sequence[int]) -> list[int]:
    """Indices of all labels, ordered so that the classes alternate, each in its own order, until it has no more."""
    counts: dict[int, int] = {}
    ranks = []
    for index, label in enumerate(labels):
        ranks.append((counts.get(label, 0), label, index))
        counts[label] = counts.get(label, 0) + 1
    return [index for _, _, index in sorted(ranks)]


class EditingSynthesizer(Synthesizer):
    """Outliers edited from images: each image is noised to a random level, x = x0 + sigma_t noise, and denoised from
    there (SDEdit; Meng et al. 2022) towards something that is not in-distribution.

    Of N steps at the levels 1, T / N + 1, 2 T / N + 1, …, an image takes K, drawn uniformly from k_min to k_max.
    Outlier i is edited from image i mod M of the M readable images, in an order in which classes alternate, with new
    random choices each time. The manifest has, for each outlier, its source image (`source`), `target`, `k`, `level`
    (the noise level as a share of the schedule), `repeat`, and `template` for a generator with prompts.

    An original Stable Diffusion folder gets prompts of the images' own classes, from their names and a template, and
    can be given words as targets; its null condition is the empty prompt. Words that are repeated, or match the name of
    a class with images (rifle and assault rifle), are removed, which a warning reports; a list of which no word is left
    is an error. Each prompt is encoded once. Images are cropped to the generator's size, which keeps
    the aspect ratio (the published code does not).

    A method implements `denoise`.

    Args:
        targets: what outliers show: `words`, `unseen` (classes of the generator without images), `others` (any other
            class), `mixtures` (of two other classes), `none` (denoise without target) or `auto` (`target_classes` or
            `words` if given, else `unseen` if any, else `mixtures`, but not for Stable Diffusion).
        target_classes: names or numbers of the generator's classes that outliers show.
        words: words that outliers show, for Stable Diffusion: a text file with one word per line, a .csv or .yaml file
            like `class_words`, or `imagenet` (the names of its 1000 classes).
        templates: prompt templates for classes and words, for Stable Diffusion; one of several is drawn for each image.
        nearest: use only this many `words` nearest to the image's class in the text encoder; default: all.
        class_words: words for classes in prompts, for Stable Diffusion: a .csv file (columns class, word and optionally
            suffix), a .yaml file (class: word suffix), or `cifar100`; default: their names.
        solver: one of `ddim`, `dpm_solver_2m`, `unipc` or `ndm1`.
        steps: number N of steps from noise to image; each image is noised to step K and denoised from there.
        k_min: smallest K; small values hardly change the image.
        k_max: largest K; default: N - 1.
        clip: clamp the estimate to the valid pixel range at every step (not for latents).
        reject: generate an outlier again if the classifier gives its image's class more than this probability; default:
            never.
        attempts: maximum number of attempts with `reject`; if all are rejected, the least probable is kept.
        reconstructions: also reconstruct each source image once under its own class, to OUT/reconstructions, for the
            training of a classifier with these outliers.
    """

    requirements = SynthesisRequirements(diffusion=True, class_conditional=True)

    def __init__(
        self,
        *,
        targets: TargetKind = "auto",
        target_classes: tuple[str, ...] = (),
        words: str = "",
        templates: tuple[str, ...] = (PAPER_TEMPLATE,),
        nearest: int | None = None,
        class_words: dict[str, str] | str | None = None,
        solver: str = "ddim",
        steps: int = 20,
        k_min: int = 1,
        k_max: int | None = None,
        clip: bool = True,
        reject: float | None = None,
        attempts: int = 4,
        reconstructions: bool = False,
    ) -> None:
        self.targets, self.target_classes, self.solver, self.steps = targets, tuple(target_classes), solver, steps
        self.prompts = PromptConfig(words, tuple(templates), nearest, class_words)
        self.prompts.check_targets(targets, self.target_classes)
        self.k_min, self.k_max = k_min, max(1, steps - 1) if k_max is None else k_max
        self.clip, self.reject, self.attempts, self.reconstructions = clip, reject, attempts, reconstructions
        if reject is None:
            self._check_unused("with reject", "attempts")
        else:
            self.requirements = replace(self.requirements, classifier=True)
        if not 1 <= self.k_min <= self.k_max <= steps:
            raise FaroutError(
                f"images take k_min to k_max of the steps, 1 <= k_min <= k_max <= steps; got {k_min}, {self.k_max} and "
                f"{steps}"
            )
        if attempts < 1 or (reject is not None and not 0 <= reject < 1):
            raise FaroutError(f"reject must be a probability below 1, attempts 1 or more; got {reject} and {attempts}")

    # -- what a method implements --------------------------------------------------------------------------------

    @abstractmethod
    def denoise(self, editing: EditingContext, batch: NoisedBatch, indices: Sequence[int]) -> EditedBatch:
        """Denoise a batch, the outliers `indices`; rows do not depend on each other."""

    def check_solver(self, solver: Solver, sigmas: Tensor) -> None:
        """Raise FaroutError for a solver or for paths (B, steps + 1) that the method cannot follow."""
        solver.check(sigmas)

    # -- what all methods share ----------------------------------------------------------------------------------

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """Load the generator; an original Stable Diffusion folder gets a prompt for each class of the images."""
        return self.prompts.load_diffusion(given, source)

    def image_settings(self, context: SynthesisContext) -> dict[str, Any]:
        """The settings, and a hash of the word list."""
        return {**super().image_settings(context), **self.prompts.image_settings()}

    def check(self, context: SynthesisContext) -> None:
        """Raise FaroutError for models without a null condition, for solvers, targets and classifiers that cannot be
        used, and for unreadable images.
        """
        if not class_conditioning(context.generator).has_null:
            raise missing_null_condition()
        editing = self._editing_context(context)
        extremes = (self.k_min, self.k_max)
        self.check_solver(editing.solver, noise_levels.pad_paths([editing.sigma_path(k) for k in extremes]))
        if self.reconstructions and context.generator.autoencoder is None:
            steps = [editing.reconstruction_steps(k) for k in extremes]
            editing.solver.check(noise_levels.pad_paths([editing.sigma_path(k) for k in steps]))
        # building these raises the errors of targets, images and classifier
        _ = editing.target_sampler, editing.source_order
        if context.classifier is not None:
            _ = editing.class_indices
        for message in find_mismatches(context.source, context.generator.preprocessing):
            warnings.warn(message, MisleadingResultWarning, stacklevel=3)

    def label_of(self, context: SynthesisContext, index: int) -> int:
        """The class of the source image."""
        order = self._editing_context(context).source_order
        return int(context.labels[order[index % len(order)]])

    def num_reconstructions(self, context: SynthesisContext) -> int:
        """One reconstruction for each image, if requested."""
        return len(self._editing_context(context).source_order) if self.reconstructions else 0

    def _editing_context(self, context: SynthesisContext) -> EditingContext:
        return context.cached("editing", lambda: EditingContext(self, context))

    @torch.no_grad()
    def generate(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> SyntheticImages:
        """Noise and denoise the source images; rejected outliers are drawn again, each independently of the others.

        Reconstructions use the first draw.
        """
        editing = self._editing_context(context)
        batch = editing.add_noise([editing.draw_plan(index, 0) for index in indices])
        best = self._edit(editing, batch, indices, 0)
        max_probability = 1.0 if self.reject is None else self.reject
        for attempt in range(1, self.attempts):
            rejected = [row for row, outlier in enumerate(best) if outlier.source_class_probability > max_probability]
            if not rejected:
                break
            rejected_indices = [indices[row] for row in rejected]
            new_batch = editing.add_noise([editing.draw_plan(index, attempt) for index in rejected_indices])
            new_outliers = self._edit(editing, new_batch, rejected_indices, attempt)
            for row, outlier in zip(rejected, new_outliers, strict=True):
                best[row] = min(best[row], outlier, key=lambda each: each.source_class_probability)

        plans = [outlier.plan for outlier in best]
        columns: dict[str, Sequence[Any]] = {
            "target": [plan.target.name for plan in plans],
            "k": [plan.k for plan in plans],
            "level": [editing.level_of(plan.k) for plan in plans],
            "repeat": [index // len(editing.source_order) for index in indices],
            "source_hash": [context.source.content_hash(plan.index) for plan in plans],
        }
        if any(plan.target.template for plan in plans):
            columns["template"] = [plan.target.template for plan in plans]
        if self.reject is not None:
            columns["source_class_probability"] = [outlier.source_class_probability for outlier in best]
            columns["attempt"] = [outlier.number for outlier in best]
        return SyntheticImages(
            torch.stack([outlier.image for outlier in best]),
            [context.source.keys[plan.index] for plan in plans],
            columns,
            {REGIONS: [outlier.region_image for outlier in best]},
            editing.reconstruct(batch, indices) if self.reconstructions else None,
        )

    def _edit(
        self, editing: EditingContext, batch: NoisedBatch, indices: Sequence[int], attempt: int
    ) -> list[_Attempt]:
        """Denoise and decode a batch; with `reject`, also classify the outliers."""
        edited = self.denoise(editing, batch, indices)
        images = editing.model.decode(edited.x0).cpu()
        outliers = [
            _Attempt(plan, image, region_image, attempt)
            for plan, image, region_image in zip(batch.plans, images, edited.region_images, strict=True)
        ]
        classifier = editing.context.classifier
        if classifier is None or self.reject is None:
            return outliers
        probabilities = classifier.outputs(images, editing.context.runtime.batch_size).logits.softmax(1).cpu()
        return [
            replace(outlier, source_class_probability=float(row[editing.class_indices[outlier.plan.label]]))
            for outlier, row in zip(outliers, probabilities, strict=True)
        ]
