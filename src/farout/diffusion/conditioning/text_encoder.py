"""The text encoder of a Stable Diffusion folder in diffusers' format: prompts -> contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from farout.core import store
from farout.core.chunking import call_in_chunks
from farout.core.errors import FaroutError, MissingExtraError, StoreError

__all__ = ["TextEncoder", "has_text_encoder"]


def has_text_encoder(folder: Path) -> bool:
    """Whether a diffusers folder has a text encoder."""
    return (folder / "text_encoder").is_dir()


class TextEncoder:
    """A frozen CLIP text encoder and its tokenizer, in float32 at any precision of the network.

    The context of a prompt is the last hidden state after the final layer norm, padded to L tokens, as Stable Diffusion
    uses it (Rombach et al. 2022): float32 (L, d). The context of the empty prompt is the null condition.

    Args:
        tokenizer: a `CLIPTokenizer`.
        module: a `CLIPTextModel`; its weights are frozen and converted to float32.

    Attributes:
        length: L, tokens of a prompt, including start, end and padding.
        width: d, numbers of an input embedding, and of a token of a context.
    """

    def __init__(self, tokenizer: Any, module: nn.Module) -> None:
        self.tokenizer, self.module = tokenizer, module.eval().requires_grad_(False).float()
        config: Any = module.config
        self.length = min(int(tokenizer.model_max_length), int(config.max_position_embeddings))
        self.width = int(config.hidden_size)
        self._null: Tensor | None = None

    # -- folders -------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> TextEncoder:
        """Reads `text_encoder/` and `tokenizer/` of a folder.

        Raises StoreError for parts that are missing or of another class, and for folders with two text encoders;
        MissingExtraError without transformers.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise MissingExtraError('text-conditional models require `pip install "farout[text]"`') from error
        if (folder / "text_encoder_2").is_dir():
            raise StoreError(
                f"{folder} has two text encoders; farout reads Stable Diffusion 1.x and 2.x, which have one"
            )
        architectures = store.read_json(folder / "text_encoder" / "config.json").get("architectures") or []
        if architectures != ["CLIPTextModel"]:
            raise StoreError(f"{folder / 'text_encoder'} contains {architectures}; farout reads a CLIPTextModel")
        try:
            # named classes and no remote code: nothing from the folder is executed
            module = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise StoreError(f"the text encoder or tokenizer of {folder} cannot be read ({error})") from error
        return cls(tokenizer, module)

    def write(self, folder: Path) -> None:
        """Writes `text_encoder/` and `tokenizer/`, as diffusers' pipelines do."""
        module: Any = self.module
        module.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def tensors(self) -> dict[str, Tensor]:
        """The encoder's weights, under names that do not depend on the version of transformers."""
        return {name.removeprefix("text_model."): value for name, value in self.module.state_dict().items()}

    # -- tokens --------------------------------------------------------------------------------------------------

    def token_ids(self, text: str) -> list[int]:
        """The token ids of a text, without start, end and padding."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the tokenizer writes them."""
        return list(self.tokenizer.convert_ids_to_tokens(list(token_ids)))

    def is_text_token(self, token_id: int) -> bool:
        """Whether a token is part of a text: not the start, the end or an unknown token."""
        return token_id not in self.tokenizer.all_special_ids

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, padded to int64 (B, L); raises FaroutError for a prompt that is too long."""
        rows = [self.tokenizer(text, padding="max_length", max_length=self.length).input_ids for text in prompts]
        for text, row in zip(prompts, rows, strict=True):
            if len(row) > self.length:
                raise FaroutError(
                    f"the prompt {text!r} has {len(row)} tokens, the text encoder accepts {self.length}; give a "
                    "shorter template or name"
                )
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def input_embeddings(self, token_ids: Tensor) -> Tensor:
        """The input embeddings of tokens of any shape, float32 (..., d) on the CPU, before positions are added."""
        table = self._embedding.weight.detach()
        return table[token_ids.to(table.device)].float().cpu()

    # -- contexts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The contexts of prompts, (B, L, d)."""
        return self.encode_tokens(self.tokenize(prompts))

    def encode_tokens(self, token_ids: Tensor, replacement: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The contexts (B, L, d) of tokenized prompts (B, L).

        Args:
            token_ids: from `tokenize`.
            replacement: vectors (B, d) that replace one input embedding of each prompt, in which contexts are
                differentiable; and the index of the replaced token, int64 (B,), where the start token has index 0.
        """

        def call(token_ids: Tensor, *replacement: Tensor) -> Tensor:
            # positions, mask and the final norm are the encoder's own; only the embeddings are replaced
            with torch.autocast(token_ids.device.type, enabled=False), self._replace_embeddings(*replacement):
                hidden: Tensor = self.module(token_ids).last_hidden_state
                return hidden

        given = () if replacement is None else (replacement[0].float(), replacement[1])
        return call_in_chunks(self.module, call, *(tensor.to(self.device) for tensor in (token_ids, *given)))

    @torch.no_grad()
    def pooled_outputs(self, prompts: Sequence[str]) -> Tensor:
        """One vector for each prompt, float32 (B, d) on the CPU: the output at the end token, which attends to all
        others (Radford et al. 2021, section 2.4; their projection is not part of Stable Diffusion).
        """
        ends = torch.tensor([len(self.token_ids(text)) + 1 for text in prompts])
        return self(prompts).cpu()[torch.arange(len(ends)), ends]

    def null_context(self, count: int) -> Tensor:
        """The context of the empty prompt, `count` times; it is computed once."""
        if self._null is None:
            self._null = self([""])
        return self._null.expand(count, -1, -1)

    @contextmanager
    def _replace_embeddings(self, *replacement: Tensor) -> Iterator[None]:
        """Replaces input embeddings inside the block, as `encode_tokens` documents; without arguments none."""
        if not replacement:
            yield
            return
        vectors, positions = replacement
        rows = torch.arange(len(positions), device=positions.device)
        handle = self._embedding.register_forward_hook(
            lambda _module, _inputs, output: output.index_put((rows, positions), vectors)
        )
        try:
            yield
        finally:
            handle.remove()

    @property
    def _embedding(self) -> nn.Embedding:
        module: Any = self.module
        embedding: nn.Embedding = module.get_input_embeddings()
        return embedding

    @property
    def device(self) -> torch.device:
        """The device of the encoder."""
        return self._embedding.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Moves the encoder."""
        self.module.to(device)
        self._null = None
        return self
