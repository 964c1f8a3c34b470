"""Outliers made of images: noised part of the way, and denoised to something else."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.core.errors import FaroutError, TrapWarning
from farout.data.image_source import ImageSource
from farout.data.indices import some_readable
from farout.data.preprocessing import check_against
from farout.diffusion import noise_levels as paths
from farout.diffusion.conditioning.base import Condition, Conditioning, no_null
from farout.diffusion.denoiser import Clamped, Denoiser, NetworkDenoiser, expand_dims
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.registry import create_solver, solver_path
from farout.synthesis.base import ReconstructedImages, SynthesisContext, Synthesizer, SyntheticImages
from farout.synthesis.class_space import class_conditioning
from farout.synthesis.editing.prompt_targets import PHOTO, Wording
from farout.synthesis.editing.targets import DrawTarget, Target, TargetKind, draw_targets
from farout.synthesis.generator_check import classifier_indices

__all__ = [
    "REGIONS",
    "Deformation",
    "Denoised",
    "Draw",
    "Judge",
    "Plan",
    "Start",
    "by_turns",
    "rehearse_remaking",
    "remade",
]


@dataclass(frozen=True)
class Draw:
    """What is drawn for one outlier, from (seed, content of its image, repeat, attempt) alone.

    place: of its image in the source; label: its class; k: steps to go; latent: noise of the autoencoder's sample, None
    without one; noise: of the start.
    """

    place: int
    label: int
    k: int
    target: Target
    latent: Tensor | None
    noise: Tensor


@dataclass(frozen=True)
class Start:
    """Noised images, about to be denoised.

    draws: one for each; clean: the images (B, …) in the network's space; x: noised; sigmas: their paths (B, steps + 1);
    own: the conditions of their classes; target: of their targets, None where nothing is put in.
    """

    draws: Sequence[Draw]
    clean: Tensor
    x: Tensor
    sigmas: Tensor
    own: Condition
    target: Condition | None


class Judge:
    """The probability that a classifier gives to the class of each outlier's image."""

    def __init__(self, classifier: Classifier, context: SynthesisContext) -> None:
        channels = classifier.preprocessing.channels
        if channels != context.image_shape[0]:
            raise FaroutError(
                f"outliers have {context.image_shape[0]} channels, the classifier that judges them {channels}"
            )
        self.classifier, self.batch_size = classifier, context.runtime.batch_size
        self.places = dict(zip(context.classes, classifier_indices(classifier, context.present_names), strict=True))

    def __call__(self, images: Tensor, labels: Sequence[int]) -> list[float]:
        """images (B, C, H, W) in [0, 1] of the classes `labels`."""
        chances = self.classifier.outputs(images, self.batch_size).logits.softmax(1).cpu()
        return [float(row[self.places[label]]) for row, label in zip(chances, labels, strict=True)]


class Plan:
    """What the outliers of one call have in common, made once.

    Args:
        method: how.
        context: of what.
    """

    def __init__(self, method: Deformation, context: SynthesisContext) -> None:
        self.method, self.context = method, context
        self.model: DiffusionModel = context.generator
        self.space: Conditioning = class_conditioning(self.model)
        self.solve: Solver = create_solver(method.solver, self.model.schedule)
        self.levels = paths.leading_levels(self.model.schedule, method.steps)

    def prepare(self) -> None:
        """Makes all that can fail: targets, order, judge."""
        for part in ("targets", "order", "judge"):
            getattr(self, part)

    @cached_property
    def order(self) -> list[int]:
        """Places of the readable images; raises UnreadableImageError where these are to be all."""
        source, labels = self.context.source, self.context.labels.tolist()
        places = some_readable(source)
        return [places[turn] for turn in by_turns([labels[place] for place in places])]

    @cached_property
    def targets(self) -> DrawTarget:
        """The source of targets."""
        method = self.method
        return draw_targets(self.model, self.context.classes, method.targets, method.target_classes, method.wording)

    @cached_property
    def judge(self) -> Judge | None:
        """Where there is a classifier."""
        return None if self.context.classifier is None else Judge(self.context.classifier, self.context)

    @property
    def limits(self) -> tuple[float, float] | None:
        """The values of images in the network's space, where it works on pixels and they are to be kept to."""
        return self.model.limits if self.method.clip else None

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network."""
        runtime = self.context.runtime
        return self.model.denoiser(runtime.batch_size, runtime.precision)  # type: ignore[arg-type]  # resolved

    def level(self, k: int) -> float:
        """The share of the schedule that K steps start from."""
        return (self.levels[k - 1] + 1) / self.model.schedule.steps

    def path(self, k: int) -> Tensor:
        """sigmas of K steps down to none, as the solver takes them."""
        return solver_path(self.method.solver, paths.falling(self.model.schedule, self.levels[:k]))

    def draw(self, index: int, attempt: int) -> Draw:
        """The draw of outlier number `index`."""
        repeat, number = divmod(index, len(self.order))
        place = self.order[number]
        label = int(self.context.labels[place])
        names = (self.context.source.identity(place), repeat, *([attempt] if attempt else []))
        generator = seeded(self.context.seed, "deformation", *names)
        k = int(torch.randint(self.method.k_min, self.method.k_max + 1, (), generator=generator))
        target = self.targets(label, generator)
        latent = None if self.model.autoencoder is None else torch.randn(self.model.latent_shape, generator=generator)
        return Draw(place, label, k, target, latent, torch.randn(self.model.shape, generator=generator))

    def start(self, draws: Sequence[Draw]) -> Start:
        """Their images, encoded and noised."""
        images = [self.model.preprocessing(self.context.source[draw.place]) for draw in draws]
        latents = [draw.latent for draw in draws if draw.latent is not None]
        x0 = self.model.encode(torch.stack(images), torch.stack(latents) if latents else None)
        sigmas = paths.pad([self.path(draw.k) for draw in draws]).to(x0.device)
        x = x0 + expand_dims(sigmas[:, 0], x0) * torch.stack([draw.noise for draw in draws]).to(x0.device)
        own = Condition.join([draw.target.own for draw in draws])
        put = [draw.target.condition for draw in draws if draw.target.condition is not None]
        return Start(draws, x0, x, sigmas, own, Condition.join(put) if put else None)


def by_turns(labels: Sequence[int]) -> list[int]:
    """Places of all labels, so that classes take turns, each in its own order; one that has run out is passed over."""
    seen: dict[int, int] = {}
    turns = []
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        turns.append((seen[label], label, place))
    return [place for _, _, place in sorted(turns)]


def rehearse_remaking(plan: Plan) -> None:
    """Raises FaroutError for a solver that cannot go the way back from the lowest and the highest level."""
    if plan.model.autoencoder is None:
        ends = (plan.method.k_min, plan.method.k_max)
        plan.solve.check(paths.pad([plan.path(_steps_back(plan, k)) for k in ends]))


@torch.no_grad()
def remade(plan: Plan, start: Start, indices: Sequence[int]) -> ReconstructedImages | None:
    """The images of a start, made again, of those outliers number `indices` that are the first of their image; None
    where none is.

    With an autoencoder: what it makes of the latents that outliers start from, at level 0. Else each is noised with the
    noise of its outlier, to its level or to the middle of the steps where that is lower, and denoised by the same
    solver under its own class, without guidance: from further up a new sample of its class would come back (see
    `farout.diffusion.image_to_image`).
    """
    rows = [row for row, index in enumerate(indices) if index < len(plan.order)]
    if not rows:
        return None
    draws = [start.draws[row] for row in rows]
    x0, levels = start.clean[rows], [0.0] * len(rows)
    if plan.model.autoencoder is None:
        x0 = _there_and_back(plan, draws, x0, start.own.rows(torch.tensor(rows, device=x0.device)))
        levels = [plan.level(_steps_back(plan, draw.k)) for draw in draws]
    hashes = [plan.context.source.content_hash(draw.place) for draw in draws]
    return ReconstructedImages(rows, plan.model.decode(x0).cpu(), {"level": levels, "source_hash": hashes})


def _steps_back(plan: Plan, k: int) -> int:
    """Of the K steps of an outlier, those from the middle down."""
    return min(k, max(1, plan.method.steps // 2))


def _there_and_back(plan: Plan, draws: Sequence[Draw], clean: Tensor, own: Condition) -> Tensor:
    sigmas = paths.pad([plan.path(_steps_back(plan, draw.k)) for draw in draws]).to(clean.device)
    noise = torch.stack([draw.noise for draw in draws]).to(clean.device)
    denoiser: Denoiser = plan.denoiser
    if plan.limits is not None:
        denoiser = Clamped(denoiser, *plan.limits)
    return plan.solve(denoiser, clean + expand_dims(sigmas[:, 0], clean) * noise, sigmas, own)


REGIONS = "regions"
"""Where pictures of what was changed where are kept within a folder of outliers."""


@dataclass(frozen=True)
class Denoised:
    """x0 (B, …) in the network's space, and pictures (C, H, W) in [0, 1] of where each was changed, where there are."""

    x0: Tensor
    regions: Sequence[Tensor | None]


@dataclass(frozen=True)
class _Outlier:
    """image: (C, H, W) in [0, 1]; probability: that it is of its image's class, where a classifier decides."""

    draw: Draw
    image: Tensor
    regions: Tensor | None
    probability: float = 0.0
    attempt: int = 0


class Deformation(Synthesizer):
    """Outliers made of images: each is noised to a level of its own, x = x0 + sigma_t noise, and denoised from there
    (SDEdit; Meng et al. 2022) to something that is not in the distribution.

    Of N steps on the levels 1, T / N + 1, 2 T / N + 1, …, an image goes K, drawn evenly from k_min to k_max. Outlier
    number i is made of image i mod M of the M readable ones, in an order in which classes take turns, with draws of its
    own each time. The manifest says of each its image (`source`), `target`, `k`, `level` (the share of the schedule
    that it was noised through) and `repeat`, and `template` where the generator is told by prompts.

    An original Stable Diffusion folder is told the images' own classes, by their names in a template, and shows words;
    its null condition is the empty prompt. Words that come twice, or are called like a class that has images (rifle and
    assault rifle), are left out, which a warning tells; a list of which none are left is refused. Prompts are encoded
    once. Images are cut to the generator's size, not squashed as published.

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

    needs: ClassVar[frozenset[str]] = frozenset({"diffusion", "classes", "labels"})

    def __init__(
        self,
        *,
        targets: TargetKind = "auto",
        target_classes: tuple[str, ...] = (),
        words: str = "",
        templates: tuple[str, ...] = (PHOTO,),
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
        self.wording = Wording(words, tuple(templates), nearest, class_words)
        self.wording.check_beside(targets, self.target_classes)
        self.k_min, self.k_max = k_min, max(1, steps - 1) if k_max is None else k_max
        self.clip, self.reject, self.attempts, self.reconstructions = clip, reject, attempts, reconstructions
        if reject is None:
            self._refuse_idle("where nothing is rejected; give reject, a probability", "attempts")
        if not 1 <= self.k_min <= self.k_max <= steps:
            raise FaroutError(
                f"images go k_min to k_max of the steps, 1 <= k_min <= k_max <= steps; got {k_min}, {self.k_max} and "
                f"{steps}"
            )
        if attempts < 1 or (reject is not None and not 0 <= reject < 1):
            raise FaroutError(f"reject must be a probability below 1, attempts 1 or more; got {reject} and {attempts}")

    @property
    def required_inputs(self) -> frozenset[str]:
        """A classifier too, where outliers can be rejected."""
        return self.needs | ({"classifier"} if self.reject is not None else set())

    # -- what a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def denoise(self, plan: Plan, start: Start, indices: Sequence[int]) -> Denoised:
        """The images of a start, outliers number `indices`; rows do not depend on each other."""

    def rehearse(self, solver: Solver, sigmas: Tensor) -> None:
        """Raises FaroutError for paths or a solver that the method cannot follow."""
        solver.check(sigmas)

    # -- what is common --------------------------------------------------------------------------------------------

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """The generator; an original Stable Diffusion folder is told the classes of the images; see `Wording.load`."""
        return self.wording.load(given, source)

    def image_settings(self, context: SynthesisContext) -> dict[str, Any]:
        """Beside the settings, which words the list holds."""
        return {**super().image_settings(context), **self.wording.settings()}

    def check(self, context: SynthesisContext) -> None:
        """Refuses models without a null condition, paths, targets and classifiers that cannot be used, and images that
        cannot be read.
        """
        if not class_conditioning(context.generator).has_null:
            raise no_null()
        plan = self._planned(context)
        self.rehearse(plan.solve, paths.pad([plan.path(k) for k in (self.k_min, self.k_max)]))
        if self.reconstructions:
            rehearse_remaking(plan)
        plan.prepare()
        for trap in check_against(context.source, context.generator.preprocessing):
            warnings.warn(trap, TrapWarning, stacklevel=3)

    def label_of(self, context: SynthesisContext, index: int) -> int:
        """The class of the image that it is made of."""
        order = self._planned(context).order
        return int(context.labels[order[index % len(order)]])

    def count_reconstructions(self, context: SynthesisContext) -> int:
        """One for each image, where they are wanted."""
        return len(self._planned(context).order) if self.reconstructions else 0

    def _planned(self, context: SynthesisContext) -> Plan:
        return context.cached("plan", lambda: Plan(self, context))

    @torch.no_grad()
    def generate(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> SyntheticImages:
        """The denoised images; those that are rejected are drawn anew, each for itself. Images are made again by the
        first draw.
        """
        plan = self._planned(context)
        start = plan.start([plan.draw(index, 0) for index in indices])
        made = self._outliers(plan, start, indices, 0)
        for attempt in range(1, self.attempts if self.reject is not None else 1):
            again = [row for row, each in enumerate(made) if each.probability > float(self.reject or 0)]
            if not again:
                break
            numbers = [indices[row] for row in again]
            fresh = plan.start([plan.draw(index, attempt) for index in numbers])
            for row, other in zip(again, self._outliers(plan, fresh, numbers, attempt), strict=True):
                made[row] = min(made[row], other, key=lambda each: each.probability)
        images, keys = [each.image for each in made], [context.source.keys[each.draw.place] for each in made]
        regions = {REGIONS: [each.regions for each in made]}
        columns = self._columns(plan, indices, made)
        originals = remade(plan, start, indices) if self.reconstructions else None
        return SyntheticImages(torch.stack(images), keys, columns, regions, originals)

    def _outliers(self, plan: Plan, start: Start, indices: Sequence[int], attempt: int) -> list[_Outlier]:
        found = self.denoise(plan, start, indices)
        images = plan.model.decode(found.x0).cpu()
        made = [_Outlier(*row, attempt=attempt) for row in zip(start.draws, images, found.regions, strict=True)]
        if plan.judge is None or self.reject is None:
            return made
        chances = plan.judge(images, [draw.label for draw in start.draws])
        return [replace(each, probability=chance) for each, chance in zip(made, chances, strict=True)]

    def _columns(self, plan: Plan, indices: Sequence[int], made: Sequence[_Outlier]) -> dict[str, Sequence[Any]]:
        draws = [each.draw for each in made]
        columns: dict[str, Sequence[Any]] = {
            "target": [draw.target.name for draw in draws],
            "k": [draw.k for draw in draws],
            "level": [plan.level(draw.k) for draw in draws],
            "repeat": [index // len(plan.order) for index in indices],
            "source_hash": [plan.context.source.content_hash(draw.place) for draw in draws],
        }
        if any(draw.target.template for draw in draws):
            columns["template"] = [draw.target.template for draw in draws]
        if self.reject is None:
            return columns
        columns["source_class_probability"] = [each.probability for each in made]
        columns["attempt"] = [each.attempt for each in made]
        return columns
