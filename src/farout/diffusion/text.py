"""Class names as prompts of a text-conditional model: a Stable Diffusion folder in diffusers' format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.diffusion.class_tokens import TextTokens
from farout.errors import FaroutError, MissingExtraError, StoreError

__all__ = ["TEMPLATE", "has_text", "read_text_tokens"]

TEMPLATE = "An image of a {}"
"""The prompt of a class; {} stands for its name."""


def has_text(folder: Path) -> bool:
    """Whether a diffusers folder has a text encoder."""
    return (folder / "text_encoder").is_dir()


@torch.no_grad()
def read_text_tokens(folder: Path, class_names: Sequence[str], template: str | None = None) -> TextTokens:
    """Runs the folder's CLIP text encoder once on the prompt of each class and on the empty prompt.

    The contexts are the encoder's last hidden states, padded to the tokenizer's length, as Stable Diffusion takes them
    (Rombach et al. 2022). Encoder and tokenizer are let go afterwards.

    Raises FaroutError for a template without exactly one {}, or a prompt that is too long; StoreError for parts that
    are missing or of another class; MissingExtraError without transformers.
    """
    template = TEMPLATE if template is None else template
    if template.count("{}") != 1:
        raise FaroutError(f"a prompt template holds one {{}} for the class name, got {template!r}")
    tokenizer, encoder = _read(folder)
    prompts = [*(template.replace("{}", name) for name in class_names), ""]
    length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
    return TextTokens(
        torch.cat([_context(prompt, tokenizer, encoder, length) for prompt in prompts]),
        class_names,
        has_null=True,
        template=template,
    )


def _context(prompt: str, tokenizer: Any, encoder: Any, length: int) -> Tensor:
    tokens = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
    if tokens.shape[1] > length:
        raise FaroutError(f"the prompt {prompt!r} has {tokens.shape[1]} tokens, the text encoder takes {length}")
    return encoder(tokens).last_hidden_state.float()


def _read(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise MissingExtraError('text-conditional models want `pip install "farout[text]"`') from error
    from farout import store

    architectures = store.read_json(folder / "text_encoder" / "config.json").get("architectures") or []
    if architectures != ["CLIPTextModel"]:
        raise StoreError(f"{folder / 'text_encoder'} holds {architectures}; farout reads a CLIPTextModel")
    try:
        # named classes and no remote code: nothing from the folder is run
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise StoreError(f"the text encoder or tokenizer of {folder} cannot be read ({error})") from error
    return tokenizer, encoder.eval()
