"""The settings for running the networks of a detector or a synthesizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from farout.core import store
from farout.core.backends import BackendChoice, check_backend
from farout.core.chunking import BatchSize, check_batch_size
from farout.core.devices import PrecisionChoice, resolve_device, resolve_precision
from farout.core.errors import FaroutError

__all__ = ["Runtime"]

_CPU_MEMORY, _ACCELERATOR_MEMORY = 256 * 2**20, 2 * 2**30
_CPU_IMAGES, _ACCELERATOR_IMAGES = 64, 256
_MAX_WORKERS = 1024


@dataclass(frozen=True)
class Runtime:
    """Settings for running networks. Raises FaroutError for values out of range.

    Only `device` and `precision` change results by more than rounding, and in bf16 `backend`; `batch_size`, `workers`
    and `cache` change speed and memory.

    Args:
        device: device of the networks: `auto` (CUDA if present, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.
        precision: precision of the networks: `fp32`, `bf16`, `fp16`, or `auto` (bf16 if the device supports it
            natively, else fp32).
        batch_size: maximum number of images processed together and of rows per network call; `auto`: set by memory.
        workers: number of threads that decode images.
        cache: store features on disk and reuse stored ones (see `farout features list`).
        backend: library that evaluates the networks: `eager` (torch), `compile` (torch.compile), `openvino`,
            `onnxruntime`, or `auto` (the fastest that is installed, if there are enough images to pay for the
            conversion).
    """

    device: str = "auto"
    precision: PrecisionChoice = "auto"
    batch_size: BatchSize = "auto"
    workers: int = 2
    cache: bool = True
    backend: BackendChoice = "eager"

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if not 0 <= self.workers <= _MAX_WORKERS:
            raise FaroutError(f"workers is {self.workers}; expected 0 or more threads, at most {_MAX_WORKERS}")

    def resolve_auto(self) -> Runtime:
        """The same settings with `auto` replaced by the device and precision of this machine.

        Raises:
            FaroutError: for a device that is not available, and a precision or a backend that it does not support.
        """
        device = resolve_device(self.device)
        precision = resolve_precision(self.precision, device)
        if self.backend != "auto":
            check_backend(self.backend, device, precision)
        return replace(self, device=str(device), precision=precision)

    def describe_environment(self) -> dict[str, Any]:
        """What results depend on beyond the images and the detector: device type, precision, library versions, CPU.

        Results of another device type or precision are not comparable; the versions and the instruction set of the CPU
        change rounding.
        """
        return {
            "device": self.device.partition(":")[0],
            "precision": self.precision,
            "versions": store.versions(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            **({} if self.backend in ("auto", "eager") else {"backend": self.backend}),
        }

    def images_per_batch(self, shape: Sequence[int], rows_per_image: int = 1) -> int:
        """The number of images of `shape` (C, H, W) to process together: `batch_size`, or by memory if it is `auto`.

        `auto` reserves memory for about ten float32 arrays of the size of a solver's input, with `rows_per_image` rows
        per image: at most 256 MiB and 64 images on a CPU, 2 GiB and 256 images on an accelerator.
        """
        if self.batch_size != "auto":
            return self.batch_size
        on_cpu = self.device.partition(":")[0] in ("cpu", "auto")
        memory, max_images = (_CPU_MEMORY, _CPU_IMAGES) if on_cpu else (_ACCELERATOR_MEMORY, _ACCELERATOR_IMAGES)
        return max(1, min(memory // (10 * 4 * math.prod(shape) * rows_per_image), max_images))
