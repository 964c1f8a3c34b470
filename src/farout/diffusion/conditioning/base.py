"""Conditions of a denoiser, and the interface of everything that produces them."""

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
    """Named tensors with leading dimension B (`class_labels`, `encoder_hidden_states`, ...), one row per input row.

    The names are the keyword arguments of the network that receives the tensors.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            raise FaroutError(f"the tensors of a condition must have one leading dimension, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of the given rows."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times, one after the other."""
        return Condition({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """Concatenates the rows of conditions, which must have the same tensor names."""
        names = [set(part.tensors) for part in parts]
        if any(name != names[0] for name in names):
            raise FaroutError(f"conditions of different kinds cannot be joined: {[sorted(n) for n in names]}")
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Conditioning(Protocol):
    """The classes of a class-conditional model: conditions from labels, or from vectors of its embedding space.

    Labels are 0 to K - 1, indices into `class_names`. Each class is represented by one vector of `dim` numbers; a
    condition that is made from such vectors is differentiable in them.
    """

    kind: str
    class_names: tuple[str, ...]
    dim: int
    has_null: bool

    @property
    def num_classes(self) -> int:
        """K, the number of classes, without the null condition."""

    def class_vectors(self) -> Tensor:
        """The vectors of all classes (K, dim), a detached float32 copy."""

    def __call__(self, given: Tensor, labels: Tensor | None = None) -> Condition:
        """The condition of labels (B,) of an integer type, or of class vectors (B, dim) of a float type.

        Args:
            given: labels or class vectors.
            labels: the classes (B,) of the vectors; required where a vector is used within a prompt of its class.

        Raises FaroutError for a label outside 0 to K - 1, another shape or type, and missing labels.
        """

    def null_condition(self, count: int) -> Condition:
        """The condition without a class, `count` rows; raises FaroutError where the model has none."""

    def trainable_module(self, network: nn.Module) -> nn.Module:
        """The module that is trained, called as `(x, t, class_labels=labels)`; the label K is the null condition."""

    def copy_for(self, network: nn.Module) -> Conditioning:
        """The same conditioning with its own weights, for a copy of the network."""

    def parameters(self) -> list[nn.Parameter]:
        """Trained weights that are not part of the network."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are saved in addition to the network, and are part of the model's hash."""

    def describe(self) -> dict[str, Any]:
        """The entry in `config.json`: kind, class names, whether there is a null condition, settings of the kind."""

    def to(self, device: torch.device | str) -> Self:
        """Moves the tensors that are not part of the network."""


class TableConditioning(Conditioning):
    """A conditioning whose classes are rows of a table; the row after the last class is the null condition.

    Subclasses set `keyword`, the argument of the network that receives rows, and `_weight`, the table.
    """

    keyword: str

    @property
    @abstractmethod
    def _weight(self) -> Tensor:
        """The table (K + 1, ...), or (K, ...) without a null row."""

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
        return self._select_rows(check_labels(given, self.num_classes))

    def null_condition(self, count: int) -> Condition:
        """The null row, `count` times; raises FaroutError where the model has none."""
        if not self.has_null:
            raise missing_null_condition()
        return self._select_rows(torch.full((count,), self.num_classes))

    def _select_rows(self, indices: Tensor) -> Condition:
        table = self._weight.detach()
        # rows instead of indices: one condition may join classes, null rows and free vectors
        return Condition({self.keyword: table[indices.to(table.device)]})

    def describe(self) -> dict[str, Any]:
        """Kind, class names, whether there is a null row."""
        return {"kind": self.kind, "class_names": list(self.class_names), "has_null": self.has_null}


def check_table(rows: int, class_names: Sequence[str], has_null: bool) -> tuple[str, ...]:
    """The class names; raises FaroutError where a table of `rows` rows does not match them and the null row."""
    names = tuple(str(name) for name in class_names)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise FaroutError(f"class names must be different, {', '.join(repeated)} occurs more than once")
    if rows not in ({len(names) + 1} if has_null else {len(names), len(names) + 1}) or not names:
        null = " and a null row" if has_null else ""
        raise FaroutError(f"a class table of {rows} rows does not match {len(names)} class names{null}")
    return names


def check_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels as int64 (B,); raises FaroutError for another shape or a label outside the table."""
    if labels.ndim != 1:
        raise FaroutError(f"labels must have the shape (B,), got {tuple(labels.shape)}")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise FaroutError(f"the labels of this model are 0 to {num_classes - 1}, got {int(outside[0])}")
    return labels.long()


def check_vectors(vectors: Tensor, dim: int) -> Tensor:
    """The vectors unchanged; raises FaroutError for another shape than (B, dim)."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise FaroutError(f"class vectors of this model must have the shape (B, {dim}), got {tuple(vectors.shape)}")
    return vectors


def missing_null_condition() -> FaroutError:
    """The error of a model without a null condition."""
    return FaroutError(
        "this model has no null condition: it was trained without label dropout (or does not record it); use guidance "
        "scale 1 with a class, or train a model with label_dropout=0.1"
    )
