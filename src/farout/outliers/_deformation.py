"""Outliers made of images: noised part of the way, and denoised to something else."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from farout.diffusion import paths
from farout.diffusion.conditioning import no_null
from farout.diffusion.loop import Solver
from farout.diffusion.methods import rehearse
from farout.diffusion.model import DiffusionModel
from farout.errors import FaroutError, TrapWarning
from farout.images.preprocessing import check_against
from farout.images.sources import ImageSource
from farout.outliers._remade import rehearse_remaking, remade
from farout.outliers._starts import Draw, Plan, Start
from farout.outliers._targets import TargetKind
from farout.outliers._wording import PHOTO, Wording
from farout.outliers.base import Made, Synthesiser, Work
from farout.outliers.decoding import class_space

__all__ = ["REGIONS", "Deformation", "Denoised"]

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


class Deformation(Synthesiser):
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
        targets: what outliers are to show: words (one drawn for each image), unseen (classes of the generator that have
            no images), others (any other class), mixtures (of two classes that have images), none (nothing in
            particular), or auto: target_classes or words where they are given, else unseen where there are any, else
            mixtures, which Stable Diffusion wants to be asked for.
        target_classes: names or numbers of the classes that outliers are to show.
        words: for Stable Diffusion, what outliers are to show: a text file with one word a line, a table .csv or .yaml
            like that of class_words, or imagenet, the names of its 1000 classes.
        templates: for Stable Diffusion, prompts of classes and words; of several, one is drawn for each image.
        nearest: of the words, only this many that are nearest to the class of the image, as the text encoder has it.
        class_words: what classes are called in prompts of Stable Diffusion: a table .csv (columns class, word and,
            where wanted, suffix) or .yaml (class: word suffix), or cifar100; without it by their names.
        solver: ddim, dpm_solver_2m, unipc or ndm1.
        steps: N, steps from noise to image, of which an image goes a part.
        k_min: the fewest steps; few leave the image much as it was.
        k_max: the most; without it N - 1.
        clip: keep values within those of images at every step, for models without autoencoder.
        reject: draw an outlier anew that the classifier takes for its image's class with more than this probability.
        attempts: draws at most, with reject; of those that are all rejected the least probable one is kept.
        reconstructions: also make again, once, each image that an outlier is made of, as one of its class:
            OUT/reconstructions, a folder as `farout reconstruct` writes it, for the training of a classifier beside the
            outliers.
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
            raise FaroutError(f"reject wants a probability below 1, attempts 1 or more; got {reject} and {attempts}")

    @property
    def wanted(self) -> frozenset[str]:
        """A classifier too, where outliers can be rejected."""
        return self.needs | ({"classifier"} if self.reject is not None else set())

    # -- what a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def denoise(self, plan: Plan, start: Start, indices: Sequence[int]) -> Denoised:
        """The images of a start, outliers number `indices`; rows do not depend on each other."""

    def rehearse(self, solver: Solver, sigmas: Tensor) -> None:
        """Raises FaroutError for paths or a solver that the method cannot follow."""
        rehearse(solver, sigmas)

    # -- what is common --------------------------------------------------------------------------------------------

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """The generator; an original Stable Diffusion folder is told the classes of the images; see `Wording.load`."""
        return self.wording.load(given, source)

    def _settings(self, work: Work) -> dict[str, Any]:
        """Beside the settings, which words the list holds."""
        return {**super()._settings(work), **self.wording.settings()}

    def check(self, work: Work) -> None:
        """Refuses models without a null condition, paths, targets and classifiers that cannot be used, and images that
        cannot be read.
        """
        if not class_space(work.generator).has_null:
            raise no_null()
        plan = self._planned(work)
        self.rehearse(plan.solve, paths.pad([plan.path(k) for k in (self.k_min, self.k_max)]))
        if self.reconstructions:
            rehearse_remaking(plan)
        plan.prepare()
        for trap in check_against(work.source, work.generator.preprocessing):
            warnings.warn(trap, TrapWarning, stacklevel=3)

    def label(self, work: Work, index: int) -> int:
        """The class of the image that it is made of."""
        order = self._planned(work).order
        return int(work.labels[order[index % len(order)]])

    def remakes(self, work: Work) -> int:
        """One for each image, where they are wanted."""
        return len(self._planned(work).order) if self.reconstructions else 0

    def _planned(self, work: Work) -> Plan:
        return work.once("plan", lambda: Plan(self, work))

    @torch.no_grad()
    def make(self, work: Work, indices: Sequence[int], labels: Sequence[int]) -> Made:
        """The denoised images; those that are rejected are drawn anew, each for itself. Images are made again by the
        first draw.
        """
        plan = self._planned(work)
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
        images, keys = [each.image for each in made], [work.source.keys[each.draw.place] for each in made]
        regions = {REGIONS: [each.regions for each in made]}
        columns = self._columns(plan, indices, made)
        originals = remade(plan, start, indices) if self.reconstructions else None
        return Made(torch.stack(images), keys, columns, regions, originals)

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
            "source_hash": [plan.work.source.content_hash(draw.place) for draw in draws],
        }
        if any(draw.target.template for draw in draws):
            columns["template"] = [draw.target.template for draw in draws]
        if self.reject is None:
            return columns
        columns["source_probability"] = [each.probability for each in made]
        columns["attempt"] = [each.attempt for each in made]
        return columns
