"""Class vectors that are added to the time embedding: the conditioning of a class-conditional `UNet2DModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import TableConditioning, check_table

__all__ = ["ClassVectors", "VectorEmbedding"]


class VectorEmbedding(nn.Embedding):
    """An embedding that looks up integers and passes float vectors (B, D) through."""

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> VectorEmbedding:
        """A module with the same table, whose parameter is shared."""
        module = cls(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        module.weight = embedding.weight
        return module

    def forward(self, given: Tensor) -> Tensor:
        """Rows of the table, or the vectors themselves."""
        return given if given.is_floating_point() else super().forward(given)


class ClassVectors(TableConditioning):
    """Class vectors of a `UNet2DModel(num_class_embeds=...)`, which adds them to its time embedding after the MLP.

    The table stays the network's own `class_embedding.weight`, so that diffusers can load the network and training
    changes both. The module is replaced by one that also accepts float vectors, so that
    `network(x, t, class_labels=vectors)` is differentiable in the vectors.

    Args:
        network: the network; its class embedding is replaced in place.
        class_names: names of the classes, in the order of the table's rows.
        has_null: whether the row after the last class was trained as the null condition (Ho & Salimans 2022).

    Raises FaroutError for a network without such a table, or with another number of rows.
    """

    kind, keyword = "class_vectors", "class_labels"

    def __init__(self, network: nn.Module, class_names: Sequence[str], *, has_null: bool) -> None:
        table = getattr(network, "class_embedding", None)
        if not isinstance(table, nn.Embedding):
            raise FaroutError(f"this {type(network).__name__} has no table of class embeddings; it is unconditional")
        if not isinstance(table, VectorEmbedding):
            table = VectorEmbedding.from_embedding(table)
            network.class_embedding = table
        self.class_names = check_table(table.num_embeddings, class_names, has_null)
        self.has_null, self.dim = has_null, int(table.embedding_dim)
        self._table = table

    @property
    def _weight(self) -> Tensor:
        return self._table.weight

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """The network itself, which contains the table."""
        return network

    def copy_for(self, network: nn.Module) -> ClassVectors:
        """The same conditioning for a copy of the network."""
        return ClassVectors(network, self.class_names, has_null=self.has_null)

    def parameters(self) -> list[nn.Parameter]:
        """Empty: the table is part of the network."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Empty: the table is saved with the network."""
        return {}

    def to(self, device: torch.device | str) -> Self:
        """Does nothing: the table moves with the network."""
        return self
