"""Seeded standard-normal noise: shared by all images or drawn per image, the same for any batch size or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["image_noise", "shared_noise"]


def _normal(shape: Sequence[int], seed: int, *names: object) -> Tensor:
    text = "\0".join([str(seed), *(str(name) for name in names)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))


def shared_noise(shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise of `shape` (one image, without B) from (seed, level, repeat), to be used for every image."""
    return _normal(shape, seed, "shared", float(level), repeat)


def image_noise(keys: Sequence[str], shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise (B, *shape), row i from (seed, keys[i], level, repeat) alone."""
    rows = [_normal(shape, seed, "image", key, float(level), repeat) for key in keys]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
