"""Classes as vectors added to the time embedding: the adapter of a class-conditional `UNet2DModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import TableConditioning, check_table

__all__ = ["ClassVectors", "VectorEmbedding"]


class VectorEmbedding(nn.Embedding):
    """An embedding that looks whole numbers up and passes float vectors (B, D) through."""

    @classmethod
    def around(cls, embedding: nn.Embedding) -> VectorEmbedding:
        """The same table, its parameter shared."""
        made = cls(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        made.weight = embedding.weight
        return made

    def forward(self, given: Tensor) -> Tensor:
        """Rows of the table, or the vectors themselves."""
        return given if given.is_floating_point() else super().forward(given)


class ClassVectors(TableConditioning):
    """Class vectors of a `UNet2DModel(num_class_embeds=…)`, added to its time embedding after the latter's MLP.

    The table stays the network's own `class_embedding.weight`, so that diffusers loads the network and training
    changes both; the module is exchanged for one that takes float vectors too, which makes
    `network(x, t, class_labels=vectors)` differentiable in the vectors.

    Args:
        network: the network; its class embedding is exchanged in place.
        class_names: names of the classes, in the order of the table's rows.
        has_null: whether the row after the last class was trained to stand for no class (Ho & Salimans 2022).

    Raises FaroutError for a network without such a table, or one of another number of rows.
    """

    kind, keyword = "class_vectors", "class_labels"

    def __init__(self, network: nn.Module, class_names: Sequence[str], *, has_null: bool) -> None:
        table = getattr(network, "class_embedding", None)
        if not isinstance(table, nn.Embedding):
            raise FaroutError(f"this {type(network).__name__} has no table of class embeddings; it is unconditional")
        if not isinstance(table, VectorEmbedding):
            table = VectorEmbedding.around(table)
            network.class_embedding = table
        self.class_names = check_table(table.num_embeddings, class_names, has_null)
        self.has_null, self.dim = has_null, int(table.embedding_dim)
        self._table = table

    @property
    def _weight(self) -> Tensor:
        return self._table.weight

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """The network itself: the table is a part of it."""
        return network

    def copy_for(self, network: nn.Module) -> ClassVectors:
        """The same conditioning for a copy of the network."""
        return ClassVectors(network, self.class_names, has_null=self.has_null)

    def parameters(self) -> list[nn.Parameter]:
        """None: the table is the network's own."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """None: the table is saved with the network."""
        return {}

    def to(self, device: torch.device | str) -> Self:
        """Nothing: the table moves with the network."""
        return self
