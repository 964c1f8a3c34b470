"""Seeded standard-normal noise: shared by all images or drawn per image, the same for any batch size or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from farout.core.errors import FaroutError

__all__ = ["NoiseKind", "image_noise", "noise_table", "seeded_generator", "shared_noise"]

NoiseKind = Literal["shared", "image"]


def seeded_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose draws follow from the seed and the names alone."""
    text = "\0".join([str(seed), *(str(name) for name in names)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def _normal(shape: Sequence[int], seed: int, *names: object) -> Tensor:
    return torch.randn(tuple(shape), generator=seeded_generator(seed, *names))


def shared_noise(shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise of `shape` (one image, without B) from (seed, level, repeat), to be used for every image."""
    return _normal(shape, seed, "shared", float(level), repeat)


def image_noise(keys: Sequence[str], shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise (B, *shape), row i from (seed, keys[i], level, repeat) alone; for images of a source the keys are
    their content hashes (`Batch.identities`).
    """
    rows = [_normal(shape, seed, "image", key, float(level), repeat) for key in keys]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def noise_table(
    kind: NoiseKind,
    keys: Sequence[str],
    shape: Sequence[int],
    seed: int,
    levels: Sequence[int | float],
    draws: int,
    *,
    antithetic: bool = False,
) -> Tensor:
    """float32 noise (B, levels, draws, *shape) of every start of every image; `shared`: one for all images (expanded).

    `antithetic`: every second draw is the negative of the one before. Raises FaroutError for another kind.
    """
    if kind not in ("shared", "image"):
        raise FaroutError(f"noise is 'shared' or drawn per 'image', got {kind!r}")

    def draw(level: int | float, repeat: int) -> Tensor:
        if kind == "shared":
            return shared_noise(shape, seed, level, repeat)[None]
        return image_noise(keys, shape, seed, level, repeat)

    def row(level: int | float) -> Tensor:
        if not antithetic:
            return torch.stack([draw(level, repeat) for repeat in range(draws)], dim=1)
        drawn = [draw(level, repeat) for repeat in range((draws + 1) // 2)]
        return torch.stack([sign * noise for noise in drawn for sign in (1, -1)][:draws], dim=1)

    table = torch.stack([row(level) for level in levels], dim=1)
    return table.expand(len(keys), *table.shape[1:])
