"""Targets of edited images: classes of the generator, mixtures of classes, words, or no target."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch

from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.diffusion.conditioning.base import Condition, Conditioning
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.interpolation import slerp
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import parse_class_labels
from farout.synthesis.class_space import class_conditioning
from farout.synthesis.editing.prompt_config import PromptConfig
from farout.synthesis.editing.words import filter_words

__all__ = ["Target", "TargetKind", "TargetSampler"]

TargetKind = Literal["auto", "words", "unseen", "others", "mixtures", "none"]

_MAX_CACHED_PROMPTS = 2048

_EncodeRow = Callable[[int], Condition]
"""The condition (one row) of a class by label; numbers after the K classes are those of words."""


@dataclass(frozen=True)
class Target:
    """The target of one edited image.

    Attributes:
        name: name for the manifest; empty without a target.
        condition: condition of the target, one row; None without a target.
        class_condition: condition of the class of the source image, one row.
        template: prompt template of both; empty for a generator without prompts.
    """

    name: str
    condition: Condition | None
    class_condition: Condition
    template: str = ""


class TargetSampler:
    """Draws a target for an image: `sampler(label, generator) -> Target`.

    If there are several prompt templates, one is drawn first and used for the class and the target.

    Args:
        model: a class-conditional diffusion model.
        id_classes: the in-distribution classes.
        kind: `words`: the words of `prompts`, without those that name an in-distribution class (see `filter_words`;
            a MisleadingResultWarning lists the removed ones); `unseen`: classes of the generator that are not
            in-distribution, filtered in the same way; `others`: any class but the image's own; `mixtures`: the
            midpoint, by spherical interpolation, of two in-distribution classes other than the image's own; `none`: no
            target; `auto`: `target_classes` or words if given, else `unseen` if there are such classes, else
            `mixtures` (which must be requested explicitly for a generator with prompts).
        target_classes: target classes by name or number.
        prompts: prompt templates and words.

    Raises FaroutError if no target is left for a class, for target classes that are in-distribution or unknown, for
    target classes in addition to another kind, and for prompts that are too long.
    """

    def __init__(
        self,
        model: DiffusionModel,
        id_classes: Sequence[int],
        kind: TargetKind = "auto",
        target_classes: Sequence[str] = (),
        prompts: PromptConfig = PromptConfig(),  # noqa: B008
    ) -> None:
        conditioning = class_conditioning(model)
        self.names, self.templates, self.is_mixture = list(conditioning.class_names), [""], False
        words: tuple[str, ...] = ()
        if isinstance(conditioning, PromptContexts):
            words = prompts.select_words(conditioning, id_classes)
            self.templates = list(prompts.templates)
        if words and isinstance(conditioning, PromptContexts):
            self.names += words
            self.choices = prompts.choices_by_class(conditioning, words, id_classes)
        else:
            self._choose_classes(model, conditioning, list(id_classes), kind, target_classes)
        if isinstance(conditioning, PromptContexts):
            self.encoders = [_prompt_encoder(conditioning, words, template) for template in self.templates]
        else:
            self.encoders = [_label_encoder(conditioning, model.device)]

    def _choose_classes(
        self,
        model: DiffusionModel,
        conditioning: Conditioning,
        id_classes: list[int],
        kind: TargetKind,
        target_classes: Sequence[str],
    ) -> None:
        """Set `choices`, the target classes by class of the image; without entries there is no target."""
        names = conditioning.class_names
        unseen = [label for label in range(len(names)) if label not in id_classes]
        if target_classes:
            if kind != "auto":
                raise FaroutError(
                    f"targets {kind!r} and target_classes {', '.join(target_classes)} do not go together; leave one out"
                )
            candidates = list(parse_class_labels(model, target_classes))
            in_distribution = [names[label] for label in candidates if label in id_classes]
            if in_distribution:
                raise FaroutError(
                    f"{', '.join(in_distribution)} has images and so is in-distribution; give other target_classes, or "
                    "leave these images out (@classes=…)"
                )
        elif kind == "none":
            self.choices = {}
            return
        elif kind == "others":
            candidates = list(range(len(names)))
        elif kind == "auto" and not unseen and isinstance(conditioning, PromptContexts):
            raise FaroutError(
                "there are no targets: this generator uses prompts and knows no class without images; give words "
                "(words=FILE, --words FILE: one a line; or --words imagenet), or targets mixtures, others or none"
            )
        elif kind == "mixtures" or (kind == "auto" and not unseen):
            if len(id_classes) < 3:
                raise FaroutError(
                    "no targets are left: a mixture of two classes other than the image's own requires three classes "
                    f"with images, there are {len(id_classes)}; give --targets others, --targets none, "
                    "--target-classes (in Python targets=, target_classes=), or a generator that knows more classes"
                )
            self.is_mixture, candidates = True, id_classes
        else:
            distinct = set(filter_words([names[label] for label in unseen], [names[label] for label in id_classes]))
            similar = [names[label] for label in unseen if names[label] not in distinct]
            if similar:
                warnings.warn(
                    f"the classes {', '.join(similar)} are not used as targets: they have the same names as "
                    "in-distribution classes; if they are something else, give them as target_classes",
                    MisleadingResultWarning,
                    stacklevel=4,
                )
            candidates = [label for label in unseen if names[label] in distinct]
        if not candidates or len(names) < 2:
            raise FaroutError(
                "no targets are left: no class of this generator is outside the distribution under a name of its own; "
                "give --targets mixtures, --targets none, --target-classes (in Python targets=, target_classes=), or a "
                "generator that knows more classes"
            )
        self.choices = {label: [choice for choice in candidates if choice != label] for label in id_classes}

    def __call__(self, label: int, generator: torch.Generator) -> Target:
        """Draw a target for an image of the class `label`."""
        count = len(self.templates)
        position = int(torch.randint(count, (), generator=generator)) if count > 1 else 0
        template, encode = self.templates[position], self.encoders[position]
        if not self.choices:
            return Target("", None, encode(label), template)
        choices = self.choices[label]
        if not self.is_mixture:
            choice = choices[int(torch.randint(len(choices), (), generator=generator))]
            return Target(self.names[choice], encode(choice), encode(label), template)
        drawn = torch.randperm(len(choices), generator=generator)[:2].tolist()
        first, second = (choices[index] for index in sorted(drawn))
        one, two = encode(first).tensors, encode(second).tensors
        midpoint = {name: slerp(one[name], two[name], torch.full((1,), 0.5)) for name in one}
        return Target(f"{self.names[first]} + {self.names[second]}", Condition(midpoint), encode(label), template)


def _label_encoder(conditioning: Conditioning, device: torch.device) -> _EncodeRow:
    """Conditions of classes by label; each is computed once."""
    return cache(lambda label: conditioning(torch.tensor([label], device=device)))


def _prompt_encoder(conditioning: PromptContexts, words: Sequence[str], template: str) -> _EncodeRow:
    """Conditions of classes and words in one template; each prompt is encoded once.

    Raises FaroutError if the prompt of a class is too long for the text encoder.
    """
    prompts = [word.prompt(template) for word in conditioning.words]
    conditioning.encoder.tokenize(prompts)
    prompts += [template.replace("{}", word) for word in words]
    return lru_cache(_MAX_CACHED_PROMPTS)(lambda number: conditioning.encode_prompts([prompts[number]]))
