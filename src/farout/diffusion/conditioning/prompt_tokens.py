"""Classes as one token of a prompt, whose input embedding can be replaced by any vector."""

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
from farout.diffusion.conditioning.prompts import TEMPLATE, Prompts, SplitWords, Word, resolve_class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder

__all__ = ["PromptTokens", "read_prompts"]


class PromptTokens(PromptContexts):
    """Classes of Stable Diffusion as the input embeddings of their one-token words, within a prompt.

    A class vector is the input embedding of the class's word: d numbers, 768 in Stable Diffusion 1 and 1024 in 2. The
    condition of a vector is the text encoder's output for the prompt of its class, in which that one embedding is
    replaced (Doorenbos et al., "Non-linear outlier synthesis for out-of-distribution detection", 2411.13619; a form of
    textual inversion, Gal et al. 2023). The null condition is the empty prompt.

    Args:
        encoder: the text encoder, which is shared, not copied.
        class_names: names of the K classes.
        words: the word (and suffix) of each class in its prompt; None: its name.
        template: the prompt; {} is replaced by the word and its suffix.
        split_words: what to do with a word that the tokenizer splits; see `Prompts`.

    Raises:
        FaroutError: as `PromptContexts` does; for a word that is not one token, and one whose token is not found at its
            position in the tokenized prompt.
    """

    kind = "prompt_tokens"

    def __init__(
        self,
        encoder: TextEncoder,
        class_names: Sequence[str],
        words: Sequence[Sequence[str]] | None = None,
        template: str = TEMPLATE,
        split_words: SplitWords = "raise",
    ) -> None:
        super().__init__(encoder, class_names, words, template)
        self.split_words, self.dim = split_words, encoder.width
        positions = [
            _find_token(encoder, template, name, word, split_words)
            for name, word in zip(self.class_names, self.words, strict=True)
        ]
        self._positions = torch.tensor(positions)
        self._table = encoder.input_embeddings(self._token_ids[torch.arange(len(positions)), self._positions])

    def class_vectors(self) -> Tensor:
        """The words' input embeddings (K, d)."""
        return self._table.clone()

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The contexts of labels (B,), or of vectors (B, d) in the prompts of their `labels` (B,)."""
        if not given.is_floating_point():
            return super().__call__(given)
        if labels is None:
            raise FaroutError("a vector of this model is used in the prompt of its class; give labels with the vectors")
        labels = check_labels(labels, self.num_classes).cpu()
        if len(labels) != len(given):
            raise FaroutError(f"{len(given)} class vectors require a label each, got {len(labels)}")
        replacement = (check_vectors(given, self.dim), self._positions[labels])
        return Condition({"encoder_hidden_states": self.encoder.encode_tokens(self._token_ids[labels], replacement)})

    def with_template(self, template: str) -> PromptTokens:
        """The same classes, words and class vectors in other prompts; raises what the constructor raises."""
        return PromptTokens(self.encoder, self.class_names, self.words, template, self.split_words)

    def tensors(self) -> dict[str, Tensor]:
        """The text encoder's weights, the tokenized prompts, and the positions of the class tokens."""
        return {**super().tensors(), "positions": self._positions}

    def describe(self) -> dict[str, Any]:
        """Kind, class names, their words, template, split_words."""
        return {**super().describe(), "split_words": self.split_words}


def _find_token(encoder: TextEncoder, template: str, name: str, word: Word, split_words: SplitWords) -> int:
    """Index of the class's token in its tokenized prompt; the start token has index 0."""
    own, prompt = encoder.token_ids(word.word), word.prompt(template)
    is_split = split_words == "first_token" and len(own) > 1 and not re.search(r"[\s_-]", word.word)
    if not (len(own) == 1 or is_split) or not all(encoder.is_text_token(token) for token in own):
        tokens = ", ".join(encoder.token_strings(own))
        problem = "the tokenizer lacks" if len(own) == 1 else f"are {len(own)} tokens ({tokens})"
        raise FaroutError(
            f"the class {name!r} requires a name of one token in prompts, and {word.word!r} {problem}; give a table of "
            "words (words=FILE, --prompts.words FILE: .csv with columns class and word, or .yaml), "
            "split_words='first_token' for a word that is split, as published, or vector='context', which accepts any "
            "name"
        )
    before = encoder.token_ids(template.partition("{}")[0])
    if encoder.token_ids(prompt)[: len(before) + len(own)] != [*before, *own]:
        raise FaroutError(
            f"the token of the class {name!r} ({encoder.token_strings(own)[0]}) is not at the position of its name in "
            f"the prompt {prompt!r}, whose tokens are {', '.join(encoder.token_strings(encoder.token_ids(prompt)))}; "
            "put spaces around the {}"
        )
    return len(before) + 1


def read_prompts(folder: Path, class_names: Sequence[str], prompts: Prompts) -> Conditioning:
    """The classes of a Stable Diffusion folder: `PromptTokens`, or `TextTokens` where class vectors are contexts.

    Raises FaroutError for names, words and templates that do not suit the folder's tokenizer; StoreError and
    MissingExtraError as `TextEncoder.read` does.
    """
    words = resolve_class_words(class_names, prompts.words)
    check_table(len(class_names), class_names, has_null=False)
    encoder = TextEncoder.read(folder)
    if prompts.vector == "token":
        return PromptTokens(encoder, class_names, words, prompts.template, prompts.split_words)
    table = encoder([*(word.prompt(prompts.template) for word in words), ""])
    return TextTokens(table, class_names, has_null=True, template=prompts.template)
