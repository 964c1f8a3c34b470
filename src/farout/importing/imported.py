"""Settings and results of an import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from farout.core.errors import FaroutError
from farout.importing.checkpoint import Checkpoint

__all__ = ["FormulaSchedule", "ImportSettings", "Imported", "describe_origin"]

FormulaSchedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
"""The schedules that are given by a formula."""


@dataclass(frozen=True)
class ImportSettings:
    """What a file of weights does not contain. None, or empty: that of the published models of the layout.

    See `farout.importing.import_weights.import_weights` for their meaning.
    """

    size: int | None = None
    classes: tuple[str, ...] = ()
    null_class: bool | None = None
    schedule: FormulaSchedule | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    train_steps: int | None = None
    head_width: int | None = None
    heads: int | None = None
    first: str | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    images: str | None = None

    def check(self, layout: str, used: Sequence[str]) -> None:
        """Raises FaroutError for a setting that the layout does not use."""
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, ())]
        unused = [name for name in given if name not in used]
        if unused:
            raise FaroutError(f"{unused[0]} has no effect on weights of the layout {layout}; leave it out")


@dataclass(frozen=True)
class Imported:
    """A converted model.

    Attributes:
        model: has `save(folder)` and `parameters`.
        network: description of the network.
        assumed: what the file does not say and was assumed, by setting.
        next_command: a command that uses the folder, with `{out}` for it.
    """

    model: Any
    network: str
    assumed: dict[str, str]
    next_command: str


def describe_origin(checkpoint: Checkpoint, layout: str, assumed: dict[str, str]) -> dict[str, Any]:
    """The provenance of an imported model, which its card shows."""
    part = {"imported_part": checkpoint.part} if checkpoint.part else {}
    return {
        "imported_from": checkpoint.path.name,
        "source_sha256": checkpoint.sha256,
        "imported_layout": layout,
        **part,
        "assumed": "; ".join(f"{name}: {value}" for name, value in assumed.items()) or "nothing",
        "unknown": "training images, and whether images that are scored were among them",
    }
