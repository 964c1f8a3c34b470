"""The order in which a training run sees its data: an endless stream that follows from the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["DataOrder", "loader", "seed_of"]


def seed_of(*parts: object) -> int:
    """A seed of 63 bits from anything that can be written."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class DataOrder:
    """The item at each position of an endless stream: one permutation per (seed, epoch), laid end to end.

    Update n takes positions n x batch_size onwards, so an item is seen once per epoch, nothing is dropped, and where a
    run stands follows from its step alone.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._items = -1, [0]

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self._epoch, self._items = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._items[place]


class _Items(Dataset):
    """Items by (position, index): random augmentation follows from the position, for any number of workers.

    Data with a method `at(position, index)` is asked by that: what goes with an item may follow from the position too.
    """

    def __init__(self, data: Dataset, *seed: object) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        torch.default_generator.manual_seed(seed_of(*self.seed, place[0]))
        at = getattr(self.data, "at", None)
        return self.data[place[1]] if at is None else at(*place)


def loader(
    data: Dataset, batches: Iterable[list[tuple[int, int]]], seed: tuple[object, ...], workers: int, pin: bool
) -> DataLoader:
    """Loads batches of (position, index); what an item draws from torch's generator follows from (seed, position)."""
    return DataLoader(_Items(data, *seed), batch_sampler=batches, num_workers=workers, pin_memory=pin)
