"""Index of cached features: which row of which file has the features of an image, 28 bytes of memory per row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from farout.features.feature_files import Array, FeatureFile

__all__ = ["FeatureIndex", "split_hashes"]


def split_hashes(hashes: bytes | Array) -> Array:
    """Content hashes of 16 bytes each -> uint64 (n, 2), in the order of the bytes."""
    return np.frombuffer(hashes, ">u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """The rows of some files, sorted by the first half of their hashes.

    Attributes:
        files: the files.
        high, low: the halves of the hashes, uint64.
        file: index of the file of each row, uint32.
        row: its number in the file, uint32.
        check: its checksum, uint32.
    """

    files: tuple[FeatureFile, ...]
    high: Array
    low: Array
    file: Array
    row: Array
    check: Array

    @classmethod
    def from_file(cls, file: FeatureFile, hashes: Array, checks: Array) -> Self:
        """The index of one file, see `open_feature_file`."""
        high, low = split_hashes(hashes).T
        numbers = np.arange(file.rows, dtype=np.uint32)
        return cls((file,), high, low, np.zeros_like(numbers), numbers, checks)._take(np.argsort(high))

    @classmethod
    def join(cls, indexes: Sequence[Self]) -> Self:
        """The index of all files of several indexes."""
        starts = np.cumsum([0, *(len(each.files) for each in indexes)])
        files = [each.file + np.uint32(start) for each, start in zip(indexes, starts, strict=False)]
        high, low, row, check = (
            np.concatenate([getattr(each, name) for each in indexes]) for name in ("high", "low", "row", "check")
        )
        joined = cls(sum((each.files for each in indexes), ()), high, low, np.concatenate(files), row, check)
        return joined._take(np.argsort(high, kind="stable"))  # which is fast for parts that are sorted

    def without(self, paths: Collection[object]) -> Self:
        """The index without the files of these paths."""
        kept = [number for number, file in enumerate(self.files) if file.path not in paths]
        numbers = np.zeros(len(self.files), dtype=np.uint32)
        numbers[kept] = np.arange(len(kept))
        taken = self._take(np.flatnonzero(np.isin(self.file, kept)))
        files = tuple(self.files[number] for number in kept)
        return type(self)(files, taken.high, taken.low, numbers[taken.file], taken.row, taken.check)

    def _take(self, order: Array) -> Self:
        columns = (column[order] for column in (self.high, self.low, self.file, self.row, self.check))
        return type(self)(self.files, *columns)

    def __len__(self) -> int:
        return len(self.high)

    def find(self, hashes: Array) -> Iterator[tuple[int, FeatureFile, int, int]]:
        """Find the rows of images.

        Args:
            hashes: content hashes, uint64 (n, 2), see `split_hashes`.

        Yields:
            For each row of one of the images: index of its hash in `hashes`, file, number and checksum of the row.
        """
        starts = np.searchsorted(self.high, hashes[:, 0])
        stops = np.searchsorted(self.high, hashes[:, 0], side="right")
        for number in np.flatnonzero(stops > starts).tolist():
            for position in range(int(starts[number]), int(stops[number])):
                if self.low[position] == hashes[number, 1]:
                    file = self.files[self.file[position]]
                    yield number, file, int(self.row[position]), int(self.check[position])
