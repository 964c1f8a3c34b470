"""Prompts of classes and target words for synthesizers that edit images with a text-to-image generator."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.data.classes import present_class_names
from farout.data.image_source import ImageSource
from farout.diffusion import diffusers_folders as folders
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompts import check_template, resolve_class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder
from farout.diffusion.model import DiffusionModel
from farout.synthesis.editing.words import filter_words, find_nearest_words, format_name, read_word_list

__all__ = ["PAPER_TEMPLATE", "PromptConfig"]

PAPER_TEMPLATE = "a photo of a {}"
"""The published template for classes and targets."""

_MAX_LISTED = 8


@dataclass(frozen=True)
class PromptConfig:
    """Words and prompt templates. Raises FaroutError for values out of range.

    Args:
        words: list of target words, see `read_word_list`; empty: no words.
        templates: prompt templates; {} is replaced by the class or the word.
        nearest: use only this many words nearest to each class; None: all.
        class_words: words for the classes, see `conditioning.prompts.read_word_table`; None: their names.
    """

    words: str = ""
    templates: tuple[str, ...] = (PAPER_TEMPLATE,)
    nearest: int | None = None
    class_words: dict[str, str] | str | None = None

    def __post_init__(self) -> None:
        if not self.templates:
            raise FaroutError(f"templates requires at least one, such as {PAPER_TEMPLATE!r}")
        for template in self.templates:
            check_template(template)
        if self.nearest is not None and not self.words:
            raise FaroutError("nearest chooses among words; give words=FILE, or leave nearest out")
        if self.nearest is not None and self.nearest < 1:
            raise FaroutError(f"nearest must be 1 or more, got {self.nearest}")

    def check_targets(self, targets: str, target_classes: Sequence[str]) -> None:
        """Raise FaroutError for words in addition to other targets, and for targets `words` without words."""
        if targets == "words" and not self.words:
            raise FaroutError("targets 'words' requires words; give words=FILE, or words=imagenet")
        if self.words and targets not in ("auto", "words"):
            raise FaroutError(f"targets {targets!r} and words {self.words!r} do not go together; leave one out")
        if self.words and target_classes:
            raise FaroutError(
                f"target_classes {', '.join(target_classes)} and words {self.words!r} do not go together; leave one out"
            )

    def load_diffusion(self, given: DiffusionModel | str | Path, source: ImageSource) -> DiffusionModel:
        """Load the generator; an original Stable Diffusion folder gets a prompt for each class of the images.

        Raises FaroutError for words that cannot be read, class names that do not become prompts, and settings that
        have no effect on the generator.
        """
        if self.words:
            read_word_list(self.words)  # fails early: loading networks takes longer
        if isinstance(given, str | Path):
            given = folders.local_folder(given)
            if folders.requires_class_names(given):
                names = present_class_names(source)
                words = resolve_class_words([format_name(name) for name in names], self.class_words)
                conditioning = PromptContexts(TextEncoder.read(given), names, words, self.templates[0])
                return DiffusionModel.load(given, conditioning=conditioning)
            given = DiffusionModel.load(given)
        if given.conditioning is not None:
            unused: dict[str, Any] = {"class_words": self.class_words} if self.class_words is not None else {}
            if not isinstance(given.conditioning, PromptContexts):
                unused |= {"words": self.words} if self.words else {}
                unused |= {"templates": self.templates} if self.templates != (PAPER_TEMPLATE,) else {}
            if unused:
                settings = ", ".join(f"{name}={value!r}" for name, value in unused.items())
                raise FaroutError(
                    f"{settings} would have no effect: this generator has its own classes "
                    f"({given.conditioning.kind}); leave it out, or give an original Stable Diffusion folder"
                )
        return given

    def image_settings(self) -> dict[str, Any]:
        """What determines the images in addition to the settings: a hash of the content of the word list."""
        if not self.words:
            return {}
        return {"word_list": hashlib.sha256("\n".join(read_word_list(self.words)).encode()).hexdigest()}

    def select_words(self, conditioning: PromptContexts, id_classes: Sequence[int]) -> tuple[str, ...]:
        """The words that can be targets, in their order; none if no words are given.

        Words that are repeated, or match the name or the word of an in-distribution class (see `filter_words`), are
        removed, which a MisleadingResultWarning reports.

        Args:
            conditioning: conditioning of the generator.
            id_classes: the in-distribution classes.

        Raises FaroutError if no word is left, and for prompts that are too long for the text encoder.
        """
        if not self.words:
            return ()
        words = read_word_list(self.words)
        id_names = [
            name
            for label in id_classes
            for name in (conditioning.class_names[label], conditioning.words[label].prompt("{}"))
        ]
        kept = filter_words(words, id_names)
        removed = list((Counter(words) - Counter(kept)).elements())
        if not kept:
            raise FaroutError(
                f"no targets are left: all of the {len(words)} words of {self.words} ({_format_names(removed)}) "
                f"have the same names as in-distribution classes ({_format_names(id_names[::2])}); give other words"
            )
        if removed:
            warnings.warn(
                f"{len(removed)} of the {len(words)} words of {self.words} are not used as targets "
                f"({_format_names(removed)}): they occur twice, or have the same names as in-distribution classes",
                MisleadingResultWarning,
                stacklevel=4,
            )
        for template in self.templates:
            conditioning.encoder.tokenize([template.replace("{}", word) for word in kept])
        return kept

    def choices_by_class(
        self, conditioning: PromptContexts, words: Sequence[str], id_classes: Sequence[int]
    ) -> dict[int, Sequence[int]]:
        """For each in-distribution class, the words that can be its target: all, or the nearest.

        Word i has the number K + i, after the K classes. Nearness is the cosine similarity of
        `TextEncoder.pooled_outputs` of the prompts in the first template.

        Raises FaroutError if there are fewer than `nearest` words.
        """
        if self.nearest is None:
            numbers = range(conditioning.num_classes, conditioning.num_classes + len(words))
            return dict.fromkeys(id_classes, numbers)
        word_prompts = [self.templates[0].replace("{}", word) for word in words]
        class_prompts = [conditioning.words[label].prompt(self.templates[0]) for label in id_classes]
        nearest = find_nearest_words(
            conditioning.encoder.pooled_outputs(word_prompts),
            conditioning.encoder.pooled_outputs(class_prompts),
            self.nearest,
        )
        return dict(zip(id_classes, (conditioning.num_classes + nearest).tolist(), strict=True))


def _format_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + ", …" * (len(names) > _MAX_LISTED)
