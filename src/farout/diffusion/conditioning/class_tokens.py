"""Class tokens that the network attends to: conditionings of a `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import TableConditioning, check_table

__all__ = ["ClassTokens", "TextTokens"]


class _TokenTable(nn.Module):
    """L tokens of d numbers for each class and, in the last row, for the null condition."""

    def __init__(self, table: Tensor, *, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.detach().clone().float(), requires_grad=requires_grad)


class _NetworkWithTokens(nn.Module):
    """Network and table in one module, for training."""

    def __init__(self, network: nn.Module, tokens: _TokenTable) -> None:
        super().__init__()
        self.network, self.tokens = network, tokens

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        """x (B, C, H, W), t (B,), indices of the table's rows (B,) -> the network's output."""
        return self.network(x, t, encoder_hidden_states=self.tokens.weight[class_labels])


class ClassTokens(TableConditioning):
    """Learned tokens of each class, which a `UNet2DConditionModel` attends to (Rombach et al. 2022, section 3.3).

    A class vector is the class's L tokens of d numbers, concatenated: `dim` = L d. The table is saved next to the
    network and trained with it.

    Args:
        table: the tokens (K + 1, L, d), or (K, L, d) without a null row; copied.
        class_names: names of the K classes, in the order of the table's rows.
        has_null: whether the last row was trained as the null condition.

    Raises FaroutError for a table of another shape.
    """

    kind, keyword = "class_tokens", "encoder_hidden_states"
    is_trained: ClassVar[bool] = True

    def __init__(self, table: Tensor, class_names: Sequence[str], *, has_null: bool) -> None:
        if table.ndim != 3:
            raise FaroutError(f"a table of class tokens must have the shape (K + 1, L, d), got {tuple(table.shape)}")
        self.class_names = check_table(len(table), class_names, has_null)
        self.has_null, self.dim = has_null, table.shape[1] * table.shape[2]
        self._tokens = _TokenTable(table, requires_grad=self.is_trained)

    @classmethod
    def create_random(cls, class_names: Sequence[str], length: int, width: int, *, has_null: bool) -> Self:
        """Random tokens from a standard normal distribution, as in torch's embeddings: L = `length`, d = `width`."""
        return cls(torch.randn(len(class_names) + 1, length, width), class_names, has_null=has_null)

    @property
    def _weight(self) -> Tensor:
        return self._tokens.weight

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """Network and table in one module."""
        return _NetworkWithTokens(network, self._tokens)

    def copy_for(self, network: nn.Module) -> Self:
        """The same conditioning with its own table."""
        table = self._tokens.weight
        return type(self)(table, self.class_names, has_null=self.has_null).to(table.device)

    def parameters(self) -> list[nn.Parameter]:
        """The table, if it is trained."""
        return [self._tokens.weight] if self.is_trained else []

    def tensors(self) -> dict[str, Tensor]:
        """The table."""
        return {"tokens": self._tokens.weight.detach()}

    def to(self, device: torch.device | str) -> Self:
        """Moves the table."""
        self._tokens.to(device)
        return self


class TextTokens(ClassTokens):
    """Outputs of a frozen text encoder for the prompt of each class, computed once; the null row is the empty prompt's.

    A class vector is the whole context: 77 tokens of d numbers in Stable Diffusion. The prompts are made from
    `template`; see `farout.diffusion.conditioning.prompts`.
    """

    kind = "text_tokens"
    is_trained: ClassVar[bool] = False

    def __init__(self, table: Tensor, class_names: Sequence[str], *, has_null: bool, template: str) -> None:
        super().__init__(table, class_names, has_null=has_null)
        self.template = template

    def copy_for(self, network: nn.Module) -> Self:
        """The same conditioning with its own table."""
        table = self._tokens.weight
        copied = type(self)(table, self.class_names, has_null=self.has_null, template=self.template)
        return copied.to(table.device)

    def describe(self) -> dict[str, Any]:
        """Kind, class names, whether there is a null row, template."""
        return {**super().describe(), "template": self.template}
