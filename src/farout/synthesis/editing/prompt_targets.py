"""How a generator of text is told the classes of images, and what outliers made of them are to show."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from farout.core.errors import FaroutError, TrapWarning
from farout.data.classes import names_of
from farout.data.image_source import ImageSource
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompts import check_template, class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder
from farout.diffusion.model import DiffusionModel
from farout.synthesis.editing.word_screening import listed, nearest, screened, spoken

__all__ = ["PHOTO", "Phrases", "Wording"]

PHOTO = "a photo of a {}"
"""The published template of classes and targets."""

_REMEMBERED, _EXAMPLES = 2048, 8


@dataclass(frozen=True)
class Wording:
    """Words and prompts. Raises FaroutError for values out of range.

    Args:
        words: what outliers are to show; see `listed`. Empty: no words.
        templates: of prompts; {} stands for the class or the word.
        nearest: of the words, this many that are nearest to each class; None: all.
        class_words: what classes are called, see `conditioning.prompts.read_words`; None: by their names.
    """

    words: str = ""
    templates: tuple[str, ...] = (PHOTO,)
    nearest: int | None = None
    class_words: dict[str, str] | str | None = None

    def __post_init__(self) -> None:
        if not self.templates:
            raise FaroutError(f"templates requires at least one, such as {PHOTO!r}")
        for template in self.templates:
            check_template(template)
        if self.nearest is not None and not self.words:
            raise FaroutError("nearest chooses among words; give words=FILE, or leave nearest out")
        if self.nearest is not None and self.nearest < 1:
            raise FaroutError(f"nearest must be 1 or more, got {self.nearest}")

    def check_beside(self, targets: str, target_classes: Sequence[str]) -> None:
        """Raises FaroutError for words beside other targets, and targets `words` without any."""
        if targets == "words" and not self.words:
            raise FaroutError("targets 'words' requires words; give words=FILE, or words=imagenet")
        if self.words and targets not in ("auto", "words"):
            raise FaroutError(f"targets {targets!r} and words {self.words!r} do not go together; leave one out")
        if self.words and target_classes:
            raise FaroutError(
                f"target_classes {', '.join(target_classes)} and words {self.words!r} do not go together; leave one out"
            )

    # -- the generator ---------------------------------------------------------------------------------------------

    def load(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """The generator; an original Stable Diffusion folder is told the classes of the images.

        Raises FaroutError for words that cannot be read, classes that do not become prompts, and settings that the
        generator has no use for.
        """
        if self.words:
            listed(self.words)  # before networks are read, which takes longer
        if isinstance(given, str | Path):
            given = folders.local(given)
            if folders.wants_prompts(given):
                return DiffusionModel.load(given, conditioning=self._space(given, source))
            given = DiffusionModel.load(given)
        self._check_used(given)
        return given

    def _space(self, folder: Path, source: ImageSource) -> PromptContexts:
        names = names_of(source)
        words = class_words([spoken(name) for name in names], self.class_words)
        return PromptContexts(TextEncoder.read(folder), names, words, self.templates[0])

    def _check_used(self, model: DiffusionModel) -> None:
        """Refuses settings of prompts for a generator that brings classes of its own; others are refused later."""
        if model.conditioning is None:
            return
        unused: dict[str, Any] = {"class_words": self.class_words} if self.class_words is not None else {}
        if not isinstance(model.conditioning, PromptContexts):
            unused |= {"words": self.words} if self.words else {}
            unused |= {"templates": self.templates} if self.templates != (PHOTO,) else {}
        if unused:
            told = ", ".join(f"{name}={value!r}" for name, value in unused.items())
            raise FaroutError(
                f"{told} would have no effect: this generator brings its classes by {model.conditioning.kind}; "
                "leave it out, or give an original Stable Diffusion folder"
            )

    # -- what is said ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What decides the images beside the settings themselves: a hash of the words that the list holds."""
        if not self.words:
            return {}
        return {"word_list": hashlib.sha256("\n".join(listed(self.words)).encode()).hexdigest()}

    def vocabulary(self, space: PromptContexts, known: Sequence[int]) -> tuple[str, ...]:
        """The words that may be drawn, in their order; none where no words are given.

        Those that are repeated or near a class that is in the distribution (see `screened`) are left out, by its name
        or by what it is called; a TrapWarning tells some of them.

        Args:
            space: of the generator.
            known: the classes that are in the distribution.

        Raises FaroutError where none are left, and for prompts that are too long for the text encoder.
        """
        if not self.words:
            return ()
        given = listed(self.words)
        inside = [name for label in known for name in (space.class_names[label], space.words[label].prompt("{}"))]
        kept = screened(given, inside)
        left = list((Counter(given) - Counter(kept)).elements())
        if not kept:
            raise FaroutError(
                f"no targets are left: all of the {len(given)} words of {self.words} ({_some(left)}) are called like "
                f"classes that have images ({_some(inside[::2])}); give other words"
            )
        if left:
            warnings.warn(
                f"{len(left)} of the {len(given)} words of {self.words} are not used as targets ({_some(left)}): they "
                "occur "
                "twice, or have names like classes with images",
                TrapWarning,
                stacklevel=4,
            )
        for template in self.templates:
            space.encoder.numbers([template.replace("{}", word) for word in kept])
        return kept

    def near(self, space: PromptContexts, words: Sequence[str], known: Sequence[int]) -> dict[int, Sequence[int]]:
        """For each class, the numbers (of `Phrases`) of the words that may be drawn for it: all, or the nearest.

        Nearness is the cosine of `TextEncoder.summaries` of prompts in the first template. Raises FaroutError where
        more are wanted than there are.
        """
        if self.nearest is None:
            return dict.fromkeys(known, range(space.classes, space.classes + len(words)))
        said = [self.templates[0].replace("{}", word) for word in words]
        classes = [space.words[label].prompt(self.templates[0]) for label in known]
        found = nearest(space.encoder.summaries(said), space.encoder.summaries(classes), self.nearest)
        return dict(zip(known, (space.classes + found).tolist(), strict=True))


class Phrases:
    """The conditions of classes, and of words numbered after them, in one template; each is encoded once.

    Args:
        space: of the generator.
        words: numbers K, K + 1, ….
        template: of the prompts.

    Raises FaroutError where the prompt of a class is too long for the text encoder.
    """

    def __init__(self, space: PromptContexts, words: Sequence[str], template: str) -> None:
        self.template = template
        said = [word.prompt(template) for word in space.words]
        space.encoder.numbers(said)
        said += [template.replace("{}", word) for word in words]
        self.of = lru_cache(_REMEMBERED)(lambda number: space.said([said[number]]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + ", …" * (len(names) > _EXAMPLES)
