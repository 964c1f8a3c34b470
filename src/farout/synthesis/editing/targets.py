"""What outliers are to show in place of their image's class: classes of the generator, mixtures, words, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from farout.core.errors import FaroutError, TrapWarning
from farout.diffusion.conditioning.base import Condition, Conditioning
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.interpolation import slerp
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import choose_classes
from farout.synthesis.class_space import class_conditioning
from farout.synthesis.editing.prompt_targets import Phrases, Wording
from farout.synthesis.editing.word_screening import screened

__all__ = ["DrawTarget", "Target", "TargetKind", "draw_targets"]

TargetKind = Literal["auto", "words", "unseen", "others", "mixtures", "none"]


@dataclass(frozen=True)
class Target:
    """What an outlier is to show.

    name: for the manifest; condition: of one row, None: nothing is put in; own: that of its image's class beside it;
    template: of the prompts of both, empty where the generator is not told by prompts.
    """

    name: str
    condition: Condition | None
    own: Condition
    template: str = ""


DrawTarget = Callable[[int, torch.Generator], Target]
"""The target of an image of a class, drawn from a generator."""

_Of = Callable[[int], Condition]
"""The condition of one row of a class by number; numbers beyond the classes are those of words."""
_Choose = Callable[[int, torch.Generator, _Of], tuple[str, Condition | None]]
"""Name and condition of the target of an image of a class."""


class _Table:
    """The condition of each class that the generator tells by number, computed once."""

    template = ""

    def __init__(self, conditioning: Conditioning, device: torch.device) -> None:
        self.of: _Of = cache(lambda label: conditioning(torch.tensor([label], device=device)))


class _Targets:
    """Targets chosen by `choose`; where there are several templates, one is drawn first, for class and target alike."""

    def __init__(self, choose: _Choose, tellings: Sequence[_Table | Phrases]) -> None:
        self.choose, self.tellings = choose, tellings

    def __call__(self, label: int, generator: torch.Generator) -> Target:
        several = len(self.tellings) > 1
        told = self.tellings[int(torch.randint(len(self.tellings), (), generator=generator)) if several else 0]
        name, condition = self.choose(label, generator, told.of)
        return Target(name, condition, told.of(label), told.template)


def draw_targets(
    model: DiffusionModel,
    known: Sequence[int],
    kind: TargetKind = "auto",
    named: Sequence[str] = (),
    wording: Wording = Wording(),  # noqa: B008
) -> DrawTarget:
    """Targets from the classes of a generator, or from words where it is told by prompts.

    Args:
        model: a class-conditional diffusion model.
        known: the classes that are in the distribution.
        kind: `words`: those of `wording`, without those near a class that is in the distribution (see `screened`; a
            TrapWarning names some); `unseen`: classes of the generator that are not in the distribution, screened
            alike; `others`: any class but the image's own; `mixtures`: halfway, on the sphere, between two classes that
            are in the distribution and not the image's own; `none`: nothing is put in; `auto`: `named` where any are
            given, or words where any are, else `unseen` where there are any, else `mixtures`, for which generators
            that are told by prompts want to be asked.
        named: classes by name or number.
        wording: prompts and words.

    Raises FaroutError where no target is left for a class, for one that is in the distribution or unknown, for names
    beside another kind, and for prompts that are too long.
    """
    space = class_conditioning(model)
    if not isinstance(space, PromptContexts):
        return _Targets(_class_choice(model, known, kind, named), [_Table(space, model.device)])
    words = wording.vocabulary(space, known)
    if words:
        choose: _Choose = _OneOf(wording.near(space, words, known), [*space.class_names, *words])
    else:
        choose = _class_choice(model, known, kind, named)
    return _Targets(choose, [Phrases(space, words, template) for template in wording.templates])


def _class_choice(model: DiffusionModel, known: Sequence[int], kind: TargetKind, named: Sequence[str]) -> _Choose:
    space = class_conditioning(model)
    names = space.class_names
    unseen = [label for label in range(len(names)) if label not in set(known)]
    if named:
        return _other(_named(model, known, kind, named), known, names)
    if kind == "none":
        return lambda label, generator, of: ("", None)
    if kind == "others":
        return _other(range(len(names)), known, names)
    if kind == "auto" and not unseen and isinstance(space, PromptContexts):
        raise FaroutError(
            "there are no targets: this generator uses prompts and knows no class without images; give words "
            "(words=FILE, --words FILE: one a line; or --words imagenet), or targets mixtures, others or none"
        )
    if kind == "mixtures" or (kind == "auto" and not unseen):
        return _Mixture(known, names)
    return _other(_far(unseen, known, names), known, names)


def _named(model: DiffusionModel, known: Sequence[int], kind: TargetKind, named: Sequence[str]) -> Sequence[int]:
    if kind != "auto":
        raise FaroutError(f"targets {kind!r} and target_classes {', '.join(named)} do not go together; leave one out")
    chosen = choose_classes(model, named)
    inside = [class_conditioning(model).class_names[label] for label in chosen if label in set(known)]
    if inside:
        raise FaroutError(
            f"{', '.join(inside)} has images and so is in-distribution; give other "
            "target_classes, or leave these images out (@classes=…)"
        )
    return chosen


def _far(unseen: Sequence[int], known: Sequence[int], names: Sequence[str]) -> list[int]:
    """Without classes whose names are near those of known ones."""
    left = set(screened([names[label] for label in unseen], [names[label] for label in known]))
    near = [names[label] for label in unseen if names[label] not in left]
    if near:
        warnings.warn(
            f"the classes {', '.join(near)} are not used as targets: they have names like classes with images; if they "
            "are something else, give them as target_classes",
            TrapWarning,
            stacklevel=4,
        )
    return [label for label in unseen if names[label] in left]


def _other(choices: Sequence[int], known: Sequence[int], names: Sequence[str]) -> _Choose:
    """One of some classes, not the image's own."""
    if not choices or len(names) < 2:
        raise FaroutError(
            "no targets are left: no class of this generator is outside the distribution under a name of its own; "
            "give target_classes, targets mixtures or none, or a generator that knows more classes"
        )
    return _OneOf({label: [choice for choice in choices if choice != label] for label in known}, names)


class _OneOf:
    """One of those that an image's class may become, by number."""

    def __init__(self, choices: Mapping[int, Sequence[int]], names: Sequence[str]) -> None:
        self.choices, self.names = choices, names

    def __call__(self, label: int, generator: torch.Generator, of: _Of) -> tuple[str, Condition]:
        choices = self.choices[label]
        chosen = choices[int(torch.randint(len(choices), (), generator=generator))]
        return self.names[chosen], of(chosen)


class _Mixture:
    """Halfway between two of the known classes, neither of them the image's own."""

    def __init__(self, known: Sequence[int], names: Sequence[str]) -> None:
        self.known, self.names = tuple(known), names
        if len(self.known) < 3:
            raise FaroutError(
                "no targets are left: a mixture of two classes other than the image's own requires three with "
                "images, there "
                f"are {len(self.known)}; give target_classes, targets others or none, or a generator that knows more "
                "classes"
            )

    def __call__(self, label: int, generator: torch.Generator, of: _Of) -> tuple[str, Condition]:
        choices = [choice for choice in self.known if choice != label]
        drawn = torch.randperm(len(choices), generator=generator)[:2].tolist()
        first, second = (choices[place] for place in sorted(drawn))
        one, two = of(first).tensors, of(second).tensors
        mixed = {name: slerp(one[name], two[name], torch.full((1,), 0.5)) for name in one}
        return f"{self.names[first]} + {self.names[second]}", Condition(mixed)
