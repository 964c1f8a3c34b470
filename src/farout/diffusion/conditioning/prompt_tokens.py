"""Classes as one token of a prompt: the text conditioning in which the class's own word can be exchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition, Conditioning, check_labels, check_table, check_vectors
from farout.diffusion.conditioning.class_tokens import TextTokens
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompts import TEMPLATE, Pieces, Prompts, Word, resolve_class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder

__all__ = ["PromptTokens", "read_prompts"]


class PromptTokens(PromptContexts):
    """Stable Diffusion's classes as the input embeddings of their one-token words, within a prompt.

    A class vector is what the text encoder looks up for the class's word: d numbers, 768 in Stable Diffusion 1 and 1024
    in 2. A condition is the encoder's answer to the class's prompt with that one embedding exchanged, and so wants the
    class too (Doorenbos et al., "Non-linear outlier synthesis for out-of-distribution detection", 2411.13619; a form of
    textual inversion, Gal et al. 2023). The null condition is the empty prompt.

    Args:
        encoder, class_names, words, template: see `PromptContexts`.
        pieces: of a word that the tokenizer splits; see `Prompts`.

    Raises:
        FaroutError: as `PromptContexts` does; for a word that is not one token, and one that the tokenised prompt does
            not have where it stands.
    """

    kind = "prompt_tokens"

    def __init__(
        self,
        encoder: TextEncoder,
        class_names: Sequence[str],
        words: Sequence[Sequence[str]] | None = None,
        template: str = TEMPLATE,
        pieces: Pieces = "refuse",
    ) -> None:
        super().__init__(encoder, class_names, words, template)
        self.pieces, self.dim = pieces, encoder.width
        named = zip(self.class_names, self.words, strict=True)
        places = [_place(encoder, template, name, word, pieces) for name, word in named]
        self._places = torch.tensor(places)
        self._table = encoder.input_embeddings(self._numbers[torch.arange(len(places)), self._places])

    def class_vectors(self) -> Tensor:
        """The words' input embeddings (K, d)."""
        return self._table.clone()

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The contexts of labels (B,), or of vectors (B, d) in the prompts of their `labels` (B,)."""
        if not given.is_floating_point():
            return super().__call__(given)
        if labels is None:
            raise FaroutError("a vector of this model is used in the prompt of its class; give labels with the vectors")
        rows = check_labels(labels, self.num_classes).cpu()
        if len(rows) != len(given):
            raise FaroutError(f"{len(given)} class vectors require a label each, got {len(rows)}")
        exchanged = (check_vectors(given, self.dim), self._places[rows])
        found = self.encoder.encode_tokens(self._numbers[rows], exchanged)
        return Condition({"encoder_hidden_states": found})

    def with_template(self, template: str) -> PromptTokens:
        """The same classes, words and class vectors in other prompts; see the class for what is raised."""
        return PromptTokens(self.encoder, self.class_names, self.words, template, self.pieces)

    def tensors(self) -> dict[str, Tensor]:
        """The text encoder's weights, the prompts as its tokenizer writes them, and the tokens' places."""
        return {**super().tensors(), "places": self._places}

    def describe(self) -> dict[str, Any]:
        """Kind, class names, their words, template, pieces."""
        return {**super().describe(), "pieces": self.pieces}


def _place(encoder: TextEncoder, template: str, name: str, word: Word, pieces: Pieces) -> int:
    """Where the class's token stands in its prompt, the start being number 0."""
    own, prompt = encoder.token_ids(word.word), word.prompt(template)
    split = pieces == "first" and len(own) > 1 and not re.search(r"[\s_-]", word.word)
    if not (len(own) == 1 or split) or not all(encoder.is_text_token(token) for token in own):
        what = (
            f"are {len(own)} tokens ({', '.join(encoder.token_strings(own))})"
            if len(own) != 1
            else "the tokenizer lacks"
        )
        raise FaroutError(
            f"the class {name!r} requires a name of one token in prompts, and {word.word!r} {what}; give a table of "
            "words "
            "(words=FILE, --prompts.words FILE: .csv with columns class and word, or .yaml), pieces='first' for a word "
            "that is split, as published, or vector='context', which takes any name"
        )
    before = encoder.token_ids(template.partition("{}")[0])
    if encoder.token_ids(prompt)[: len(before) + len(own)] != [*before, *own]:
        raise FaroutError(
            f"the token of the class {name!r} ({encoder.token_strings(own)[0]}) is not where its name is in the prompt "
            f"{prompt!r}, whose tokens are {', '.join(encoder.token_strings(encoder.token_ids(prompt)))}; put spaces "
            "around the {}"
        )
    return len(before) + 1


def read_prompts(folder: Path, class_names: Sequence[str], prompts: Prompts) -> Conditioning:
    """The classes of a Stable Diffusion folder: `PromptTokens`, or `TextTokens` where contexts are wanted.

    Raises FaroutError for names, words and templates that do not go with the folder's tokenizer; StoreError and
    MissingExtraError as `TextEncoder.read` does.
    """
    words = resolve_class_words(class_names, prompts.words)
    check_table(len(class_names), class_names, has_null=False)
    encoder = TextEncoder.read(folder)
    if prompts.vector == "token":
        return PromptTokens(encoder, class_names, words, prompts.template, prompts.pieces)
    table = encoder([*(word.prompt(prompts.template) for word in words), ""])
    return TextTokens(table, class_names, has_null=True, template=prompts.template)
