"""How the networks of a detector or a synthesiser are run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from farout.devices import PrecisionChoice, resolve_device, resolve_precision
from farout.errors import FaroutError

__all__ = ["Runtime"]

_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class Runtime:
    """How networks are run. Results are bit-equal for one device, precision and `rows`; the rest never matters.
    Raises FaroutError for sizes out of range.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        precision: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where the device computes in it natively, else fp32.
        rows: rows of one network call; `auto`: 32 on a CPU, 256 on an accelerator.
        batch_size: images measured or made together; `auto`: by a memory budget.
        workers: threads that decode images.
        cache: keep features on disk and read those that are there (see `farout features list`).
    """

    device: str = "auto"
    precision: PrecisionChoice = "auto"
    rows: int | Literal["auto"] = 32
    batch_size: int | Literal["auto"] = "auto"
    workers: int = 2
    cache: bool = True

    def __post_init__(self) -> None:
        sizes = [size for size in (self.rows, self.batch_size) if size != "auto"]
        if min(sizes, default=1) < 1 or self.workers < 0:
            given = f"{self.rows}, {self.batch_size} and {self.workers}"
            raise FaroutError(f"rows and batch_size want at least 1, workers 0 or more, got {given}")

    def resolved(self) -> Runtime:
        """With every `auto` but the batch size replaced by what it means here.

        Raises FaroutError for a device that is not there, and a precision that it lacks.
        """
        device = resolve_device(self.device)
        rows = self.rows if self.rows != "auto" else (32 if device.type == "cpu" else 256)
        return replace(self, device=str(device), precision=resolve_precision(self.precision, device), rows=rows)

    def images_at_once(self, shape: Sequence[int], rows_per_image: int = 1) -> int:
        """Images of `shape` (C, H, W) in one batch: as set, or what a budget of 256 MiB holds, at most 64; but as many
        as fill a network call, which is padded to its rows.
        """
        if self.batch_size != "auto":
            return self.batch_size
        filling = 1 if self.rows == "auto" else math.ceil(self.rows / rows_per_image)
        # a solver holds about ten arrays of the size of its input
        return max(min(_MEMORY // (10 * 4 * math.prod(shape) * rows_per_image), 64), min(filling, 64))
