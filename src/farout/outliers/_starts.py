"""Where outliers made of images start: which image, how much noise, which target; all drawn for each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.diffusion import paths
from farout.diffusion.conditioning import Condition, Conditioning
from farout.diffusion.denoiser import NetworkDenoiser, spread
from farout.diffusion.loop import Solver
from farout.diffusion.methods import solver_by_name, solver_path
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded
from farout.errors import FaroutError
from farout.images.places import some_readable
from farout.outliers._recognised import class_places
from farout.outliers._targets import DrawTarget, Target, draw_targets
from farout.outliers.base import Work
from farout.outliers.decoding import class_space

if TYPE_CHECKING:
    from farout.outliers._deformation import Deformation

__all__ = ["Draw", "Judge", "Plan", "Start", "by_turns"]


@dataclass(frozen=True)
class Draw:
    """What is drawn for one outlier, from (seed, key of its image, repeat, attempt) alone.

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

    def __init__(self, classifier: Classifier, work: Work) -> None:
        channels = classifier.preprocessing.channels
        if channels != work.shape[0]:
            raise FaroutError(f"outliers have {work.shape[0]} channels, the classifier that judges them {channels}")
        self.classifier, self.batch_size = classifier, work.runtime.batch_size
        self.places = dict(zip(work.classes, class_places(classifier, work.present), strict=True))

    def __call__(self, images: Tensor, labels: Sequence[int]) -> list[float]:
        """images (B, C, H, W) in [0, 1] of the classes `labels`."""
        chances = self.classifier.outputs(images, self.batch_size).logits.softmax(1).cpu()
        return [float(row[self.places[label]]) for row, label in zip(chances, labels, strict=True)]


class Plan:
    """What the outliers of one call have in common, made once.

    Args:
        method: how.
        work: of what.
    """

    def __init__(self, method: Deformation, work: Work) -> None:
        self.method, self.work = method, work
        self.model: DiffusionModel = work.generator
        self.space: Conditioning = class_space(self.model)
        self.solve: Solver = solver_by_name(method.solver, self.model.schedule)
        self.levels = paths.leading_levels(self.model.schedule, method.steps)

    def prepare(self) -> None:
        """Makes all that can fail: targets, order, judge."""
        for part in ("targets", "order", "judge"):
            getattr(self, part)

    @cached_property
    def order(self) -> list[int]:
        """Places of the readable images; raises UnreadableImageError where these are to be all."""
        source, labels = self.work.source, self.work.labels.tolist()
        places = some_readable(source)
        return [places[turn] for turn in by_turns([labels[place] for place in places])]

    @cached_property
    def targets(self) -> DrawTarget:
        """The source of targets."""
        method = self.method
        return draw_targets(self.model, self.work.classes, method.targets, method.target_classes, method.wording)

    @cached_property
    def judge(self) -> Judge | None:
        """Where there is a classifier."""
        return None if self.work.classifier is None else Judge(self.work.classifier, self.work)

    @property
    def limits(self) -> tuple[float, float] | None:
        """The values of images in the network's space, where it works on pixels and they are to be kept to."""
        return self.model.limits if self.method.clip else None

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network."""
        runtime = self.work.runtime
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
        label = int(self.work.labels[place])
        names = (self.work.source.keys[place], repeat, *([attempt] if attempt else []))
        generator = seeded(self.work.seed, "deformation", *names)
        k = int(torch.randint(self.method.k_min, self.method.k_max + 1, (), generator=generator))
        target = self.targets(label, generator)
        latent = None if self.model.autoencoder is None else torch.randn(self.model.latent_shape, generator=generator)
        return Draw(place, label, k, target, latent, torch.randn(self.model.shape, generator=generator))

    def start(self, draws: Sequence[Draw]) -> Start:
        """Their images, encoded and noised."""
        images = [self.model.preprocessing(self.work.source[draw.place]) for draw in draws]
        latents = [draw.latent for draw in draws if draw.latent is not None]
        x0 = self.model.encode(torch.stack(images), torch.stack(latents) if latents else None)
        sigmas = paths.pad([self.path(draw.k) for draw in draws]).to(x0.device)
        x = x0 + spread(sigmas[:, 0], x0) * torch.stack([draw.noise for draw in draws]).to(x0.device)
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
