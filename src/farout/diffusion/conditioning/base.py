"""What a denoiser is told beside the noisy input: tensors that go with the rows of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError

__all__ = [
    "Condition",
    "Conditioning",
    "TableConditioning",
    "check_labels",
    "check_table",
    "check_vectors",
    "missing_null_condition",
]


@dataclass(frozen=True)
class Condition:
    """Named tensors with leading dimension B (`class_labels`, `encoder_hidden_states`, …), one row per input row.

    The names are the keyword arguments of the network that they are handed to.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            raise FaroutError(f"the tensors of a condition require one leading dimension, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of the given rows."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in a row."""
        return Condition({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})

    @staticmethod
    def join(parts: list[Condition]) -> Condition:
        """One condition after the other; all must hold the same names."""
        names = [set(part.tensors) for part in parts]
        if any(name != names[0] for name in names):
            raise FaroutError(f"conditions of different kinds cannot be joined: {[sorted(n) for n in names]}")
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Conditioning(Protocol):
    """What a class-conditional model offers: its class table, and conditions from labels or from vectors of its space.

    Labels are the numbers 0 to K - 1, positions in `class_names`. The network tells classes apart by one vector of
    `dim` numbers each; a condition made from such vectors is differentiable in them.
    """

    kind: str
    class_names: tuple[str, ...]
    dim: int
    has_null: bool

    @property
    def num_classes(self) -> int:
        """K, the number of classes, without the null condition."""

    def class_vectors(self) -> Tensor:
        """The class table (K, dim), a detached float32 copy without the null row."""

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The condition of labels (B,) of a whole-number type, or of class vectors (B, dim) float.

        `labels` (B,) beside vectors are the classes that these began as: where a vector stands within something of its
        class, such as a prompt, they are needed; a table has no use for them.

        Raises FaroutError for a label outside 0 to K - 1, for another shape or type, and for vectors without the labels
        that they need.
        """

    def null_condition(self, count: int) -> Condition:
        """The condition that stands for no class, for `count` rows; FaroutError where the model has none."""

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """What training trains: a module called as `(x, t, class_labels=numbers)`; the number K is the null row."""

    def copy_for(self, network: nn.Module) -> Conditioning:
        """The same conditioning for a copy of the network, with own weights."""

    def parameters(self) -> list[nn.Parameter]:
        """Learnt weights that are not the network's own."""

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside the network, and counts as part of the model."""

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of it: kind, class names, whether there is a null condition."""

    def to(self, device: torch.device | str) -> Self:
        """Moves what is not the network's own."""


class TableConditioning(Conditioning):
    """A conditioning whose classes are rows of a table, the row after the last class for none.

    Set by the kind: `keyword`, the network's argument that takes rows; `_weight`, the table.
    """

    keyword: str

    @property
    @abstractmethod
    def _weight(self) -> Tensor:
        """The table (K + 1, …), or (K, …) without a null row."""

    @property
    def num_classes(self) -> int:
        """K, the number of classes, without the null row."""
        return len(self.class_names)

    def class_vectors(self) -> Tensor:
        """The class table (K, dim), a detached float32 copy without the null row."""
        return self._weight.detach()[: self.num_classes].float().flatten(1).clone()

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The condition of labels (B,), or of class vectors (B, dim), in which it is differentiable."""
        if given.is_floating_point():
            vectors = check_vectors(given, self.dim).to(self._weight.device)
            return Condition({self.keyword: vectors.reshape(len(vectors), *self._weight.shape[1:])})
        return self._rows(check_labels(given, self.num_classes))

    def null_condition(self, count: int) -> Condition:
        """The null row, `count` times; raises FaroutError where the model has none."""
        if not self.has_null:
            raise missing_null_condition()
        return self._rows(torch.full((count,), self.num_classes))

    def _rows(self, numbers: Tensor) -> Condition:
        table = self._weight.detach()
        # rows, never numbers: one condition may join classes, null and free vectors
        return Condition({self.keyword: table[numbers.to(table.device)]})

    def describe(self) -> dict[str, Any]:
        """Kind, class names, whether there is a null row."""
        return {"kind": self.kind, "class_names": list(self.class_names), "has_null": self.has_null}


def check_table(rows: int, class_names: Sequence[str], has_null: bool) -> tuple[str, ...]:
    """The class names; raises FaroutError where a table of `rows` rows does not hold them and the null row."""
    names = tuple(str(name) for name in class_names)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise FaroutError(f"class names must be different, {', '.join(repeated)} comes more than once")
    if rows not in ({len(names) + 1} if has_null else {len(names), len(names) + 1}) or not names:
        null = " and a null row" if has_null else ""
        raise FaroutError(f"a class table of {rows} rows does not go with {len(names)} class names{null}")
    return names


def check_labels(labels: Tensor, classes: int) -> Tensor:
    """The labels as int64 (B,); raises FaroutError for another shape or a label outside the table."""
    if labels.ndim != 1:
        raise FaroutError(f"labels must have the shape (B,), got {tuple(labels.shape)}")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise FaroutError(f"the model knows the labels 0 to {classes - 1}, got {int(outside[0])}")
    return labels.long()


def check_vectors(vectors: Tensor, dim: int) -> Tensor:
    """The vectors as they are; raises FaroutError for another shape than (B, dim)."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise FaroutError(f"class vectors of this model must have the shape (B, {dim}), got {tuple(vectors.shape)}")
    return vectors


def missing_null_condition() -> FaroutError:
    """The error of a model without a null condition."""
    return FaroutError(
        "this model has no null condition: it was not trained with label dropout (or does not say so); use guidance "
        "scale 1 with a class, or train one with label_dropout=0.1"
    )
