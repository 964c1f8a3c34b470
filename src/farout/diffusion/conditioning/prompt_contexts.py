"""Classes as prompts of a text encoder that stays available for other prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition, Conditioning, check_labels, check_table, check_vectors
from farout.diffusion.conditioning.class_tokens import TextTokens
from farout.diffusion.conditioning.prompts import TEMPLATE, Word, check_template, resolve_class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder

__all__ = ["PromptContexts"]


class PromptContexts(Conditioning):
    """Classes of Stable Diffusion as the outputs (contexts) of its text encoder for their prompts.

    A class vector is a whole context: L tokens of d numbers, concatenated. `TextTokens` has the same vectors in a table
    and does not need the text encoder. The null condition is the empty prompt.

    Args:
        encoder: the text encoder, which is shared, not copied.
        class_names: names of the K classes.
        words: the word (and suffix) of each class in its prompt; None: its name.
        template: the prompt; {} is replaced by the word and its suffix.

    Raises FaroutError for prompts that are too long, and for another number of words than classes.
    """

    kind, has_null = "prompt_contexts", True

    def __init__(
        self,
        encoder: TextEncoder,
        class_names: Sequence[str],
        words: Sequence[Sequence[str]] | None = None,
        template: str = TEMPLATE,
    ) -> None:
        check_template(template)
        self.class_names = check_table(len(class_names), class_names, has_null=False)
        self.encoder, self.template, self.dim = encoder, template, encoder.length * encoder.width
        self.words = resolve_class_words(self.class_names) if words is None else tuple(Word(*word) for word in words)
        if len(self.words) != self.num_classes:
            raise FaroutError(f"{self.num_classes} classes require a word each, got {len(self.words)}")
        self.prompts = tuple(word.prompt(template) for word in self.words)
        self._token_ids = encoder.tokenize(self.prompts)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def class_vectors(self) -> Tensor:
        """The contexts of the classes (K, L d)."""
        return self.encoder(self.prompts).flatten(1)

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The contexts of labels (B,), or of vectors (B, L d), which are contexts themselves."""
        if given.is_floating_point():
            vectors = check_vectors(given, self.dim).to(self.encoder.device)
            return Condition({"encoder_hidden_states": vectors.reshape(-1, self.encoder.length, self.encoder.width)})
        with torch.no_grad():
            token_ids = self._token_ids[check_labels(given, self.num_classes).cpu()]
            return Condition({"encoder_hidden_states": self.encoder.encode_tokens(token_ids)})

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of any prompts, one row each."""
        return Condition({"encoder_hidden_states": self.encoder(prompts)})

    def null_condition(self, count: int) -> Condition:
        """The context of the empty prompt, `count` times."""
        return Condition({"encoder_hidden_states": self.encoder.null_context(count)})

    def to_text_tokens(self) -> TextTokens:
        """The same classes with whole contexts as class vectors, without the text encoder."""
        contexts = self(torch.arange(self.num_classes)).tensors["encoder_hidden_states"]
        table = torch.cat([contexts, self.encoder.null_context(1)])
        return TextTokens(table, self.class_names, has_null=True, template=self.template).to(table.device)

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """The network with fixed contexts: the text encoder is not trained."""
        return self.to_text_tokens().trainable_module(network)

    def copy_for(self, network: nn.Module) -> Self:
        """The same conditioning, because nothing of it is part of the network."""
        return copy.copy(self)

    def parameters(self) -> list[nn.Parameter]:
        """Empty: the text encoder is frozen."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """The text encoder's weights, and the tokenized prompts."""
        return {**self.encoder.tensors(), "prompts": self._token_ids}

    def describe(self) -> dict[str, Any]:
        """Kind, class names, their words, template."""
        return {
            "kind": self.kind,
            "class_names": list(self.class_names),
            "has_null": True,
            "words": [list(word) for word in self.words],
            "template": self.template,
        }

    def to(self, device: torch.device | str) -> Self:
        """Moves the text encoder."""
        self.encoder.to(device)
        return self
