"""Seeded standard normal noise, shared by all images or drawn per image, independent of batch size and order."""

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
    """A CPU generator whose random numbers depend only on the seed and the names."""
    text = "\0".join([str(seed), *(str(name) for name in names)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def shared_noise(shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise of `shape` (one image, without B) from (seed, level, repeat), used for every image."""
    return torch.randn(tuple(shape), generator=seeded_generator(seed, "shared", float(level), repeat))


def image_noise(identities: Sequence[str], shape: Sequence[int], seed: int, level: int | float, repeat: int) -> Tensor:
    """float32 noise (B, *shape) whose row i depends only on (seed, identities[i], level, repeat).

    `Batch.identities` has the identities of the images of a source.
    """
    generators = [seeded_generator(seed, "image", identity, float(level), repeat) for identity in identities]
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def noise_table(
    kind: NoiseKind,
    identities: Sequence[str],
    shape: Sequence[int],
    seed: int,
    levels: Sequence[int | float],
    draws: int,
    *,
    antithetic: bool = False,
) -> Tensor:
    """float32 noise (B, levels, draws, *shape) of all images, levels and draws.

    Args:
        kind: `image`: each image has its own noise; `shared`: all have the same (expanded, not copied).
        identities: identities of the images (`Batch.identities`).
        shape: shape of the noise of one image.
        seed: seed of all noise.
        levels: noise levels t; each has its own noise.
        draws: draws per level.
        antithetic: every second draw is the negative of the one before.

    Raises FaroutError for another kind.
    """
    if kind not in ("shared", "image"):
        raise FaroutError(f"noise must be 'shared' or 'image', got {kind!r}")
    table = []
    for level in levels:
        noise = []
        for repeat in range((draws + 1) // 2 if antithetic else draws):
            if kind == "shared":
                drawn = shared_noise(shape, seed, level, repeat)[None]
            else:
                drawn = image_noise(identities, shape, seed, level, repeat)
            noise += [drawn, -drawn] if antithetic else [drawn]
        table.append(torch.stack(noise[:draws], dim=1))
    stacked = torch.stack(table, dim=1)
    return stacked.expand(len(identities), *stacked.shape[1:])
