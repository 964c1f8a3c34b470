"""What outliers are to show in place of their image's class: classes of the generator, mixtures of them, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from farout.diffusion.conditioning import Condition, Conditioning
from farout.diffusion.interpolation import slerp
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import choose_classes
from farout.errors import FaroutError, TrapWarning
from farout.outliers._decoding import class_space
from farout.outliers._words import screened

__all__ = ["Conditions", "DrawTarget", "Target", "TargetKind", "class_targets"]

TargetKind = Literal["auto", "unseen", "others", "mixtures", "none"]


@dataclass(frozen=True)
class Target:
    """What an outlier is to show. name: for the manifest; condition: of one row, None: nothing is put in."""

    name: str
    condition: Condition | None


DrawTarget = Callable[[int, torch.Generator], Target]
"""The target of an image of a class, drawn from a generator: what any source of targets is, words of a text-conditional
model as well."""


class Conditions:
    """The condition of each class, of one row, computed once."""

    def __init__(self, conditioning: Conditioning, device: torch.device) -> None:
        self.of = cache(lambda label: conditioning(torch.tensor([label], device=device)))


def class_targets(
    model: DiffusionModel, known: Sequence[int], kind: TargetKind = "auto", named: Sequence[str] = ()
) -> DrawTarget:
    """Targets from the classes of a generator.

    Args:
        model: a class-conditional diffusion model.
        known: the classes that are in the distribution.
        kind: `unseen`: classes of the generator that are not in the distribution, without those whose names are near
            one that is (see `screened`; a TrapWarning names them); `others`: any class but the image's own; `mixtures`:
            halfway, on the sphere, between two classes that are in the distribution and not the image's own; `none`:
            nothing is put in; `auto`: `named` where any are given, else `unseen` where there are any, else `mixtures`.
        named: classes by name or number.

    Raises FaroutError where no target is left for a class, for one that is in the distribution or unknown, and for
    names beside another kind.
    """
    space = class_space(model)
    names, conditions = space.class_names, Conditions(space, model.device)
    unseen = [label for label in range(len(names)) if label not in set(known)]
    if named:
        return _OneOf(_named(model, known, kind, named), names, conditions)
    if kind == "none":
        return lambda label, generator: Target("", None)
    if kind == "others":
        return _OneOf(range(len(names)), names, conditions)
    if kind == "mixtures" or (kind == "auto" and not unseen):
        return _Mixture(known, names, conditions)
    return _OneOf(_far(unseen, known, names), names, conditions)


def _named(model: DiffusionModel, known: Sequence[int], kind: TargetKind, named: Sequence[str]) -> Sequence[int]:
    if kind != "auto":
        raise FaroutError(f"targets {kind!r} and target_classes {', '.join(named)} do not go together; leave one out")
    chosen = choose_classes(model, named)
    inside = [class_space(model).class_names[label] for label in chosen if label in set(known)]
    if inside:
        raise FaroutError(
            f"{', '.join(inside)} has images and so is in the distribution, which makes no outliers; give other "
            "target_classes, or leave these images out (@classes=…)"
        )
    return chosen


def _far(unseen: Sequence[int], known: Sequence[int], names: Sequence[str]) -> list[int]:
    """Without classes whose names are near those of known ones."""
    left = set(screened([names[label] for label in unseen], [names[label] for label in known]))
    near = [names[label] for label in unseen if names[label] not in left]
    if near:
        warnings.warn(
            f"the classes {', '.join(near)} are no targets: they are called like classes that have images; where they "
            "are something else, give them as target_classes",
            TrapWarning,
            stacklevel=4,
        )
    return [label for label in unseen if names[label] in left]


class _OneOf:
    """One of some classes, not the image's own."""

    def __init__(self, choices: Sequence[int], names: Sequence[str], conditions: Conditions) -> None:
        self.choices, self.names, self.conditions = tuple(choices), names, conditions
        if not self.choices or len(names) < 2:
            raise FaroutError(
                "no targets are left: no class of this generator is outside the distribution under a name of its own; "
                "give target_classes, targets mixtures or none, or a generator that knows more classes"
            )

    def __call__(self, label: int, generator: torch.Generator) -> Target:
        choices = [choice for choice in self.choices if choice != label]
        chosen = choices[int(torch.randint(len(choices), (), generator=generator))]
        return Target(self.names[chosen], self.conditions.of(chosen))


class _Mixture:
    """Halfway between two of the known classes, neither of them the image's own."""

    def __init__(self, known: Sequence[int], names: Sequence[str], conditions: Conditions) -> None:
        self.known, self.names, self.conditions = tuple(known), names, conditions
        if len(self.known) < 3:
            raise FaroutError(
                f"no targets are left: a mixture of two classes beside the image's own wants three with images, there "
                f"are {len(self.known)}; give target_classes, targets others or none, or a generator that knows more "
                "classes"
            )

    def __call__(self, label: int, generator: torch.Generator) -> Target:
        choices = [choice for choice in self.known if choice != label]
        drawn = torch.randperm(len(choices), generator=generator)[:2].tolist()
        first, second = (choices[place] for place in sorted(drawn))
        one, two = self.conditions.of(first).tensors, self.conditions.of(second).tensors
        mixed = {name: slerp(one[name], two[name], torch.full((1,), 0.5)) for name in one}
        return Target(f"{self.names[first]} + {self.names[second]}", Condition(mixed))
