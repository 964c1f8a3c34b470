"""The order in which a training run sees its data: an endless stream of items that depends only on the seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sized
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["DataOrder", "make_loader", "num_items", "seed_of"]


def seed_of(*parts: object) -> int:
    """A seed of 63 bits, derived from values that have a `repr`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def num_items(data: Dataset[Any]) -> int:
    """The number of items of a data set with a length; torch does not declare one for all data sets."""
    return len(cast("Sized", data))


class DataOrder:
    """An endless stream of indices: one random permutation of the data per epoch, one after the other.

    The permutation depends on (seed, epoch), so the items of an update follow from its number, also after a resume.

    Args:
        count: number of items of the data.
        seed: seed of the permutations.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._indices = -1, [0]

    def __getitem__(self, position: int) -> int:
        """The index of the item at a position of the stream."""
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self._epoch, self._indices = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._indices[offset]

    def positions_of_update(self, update: int, batch_size: int, short_last_batch: bool = False) -> range:
        """The positions of the batch of an update.

        Args:
            update: number of the update, from 0.
            batch_size: items per batch.
            short_last_batch: end each epoch with a smaller batch, if the data do not divide evenly; else the last batch
                of an epoch is filled up from the next one.
        """
        if not short_last_batch:
            return range(update * batch_size, (update + 1) * batch_size)
        epoch, batch = divmod(update, math.ceil(self.count / batch_size))
        start = epoch * self.count + batch * batch_size
        return range(start, min(start + batch_size, (epoch + 1) * self.count))


class _SeededItems(Dataset[Any]):
    """Items by (position, index); torch's generator is seeded by the position before each item.

    So random augmentation is the same for any number of worker processes. If the data set has
    `item_at(position, index)`, it is called instead of `[index]`: such items may depend on the position, too.
    """

    def __init__(self, data: Dataset[Any], *seed: object) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        torch.default_generator.manual_seed(seed_of(*self.seed, position))
        item_at = getattr(self.data, "item_at", None)
        return self.data[index] if item_at is None else item_at(position, index)


def make_loader(
    data: Dataset[Any],
    batches: Iterable[list[tuple[int, int]]],
    seed: tuple[object, ...],
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of batches, each given as (position, index) of its items.

    The random numbers that an item takes from torch's generator depend only on (seed, position).
    """
    return DataLoader(
        _SeededItems(data, *seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
    )
