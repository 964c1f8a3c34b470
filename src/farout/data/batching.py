"""From a source to batches of prepared images, in order, for scoring; and one by one, for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import SourceError, UnreadableImageError
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing

__all__ = ["Batch", "PreparedImages", "iterate_batches", "prefetch"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Readable images of one chunk: float32 `(B, C, H, W)` in [0, 1], their keys and positions in the source.

    `features` (B, width) stands for the images, which are then empty, where a cache has them.
    """

    keys: tuple[str, ...]
    images: Tensor
    labels: Tensor | None  # int64 (B,)
    indices: tuple[int, ...]
    features: Tensor | None = None
    hashes: tuple[str, ...] = ()

    @property
    def identities(self) -> tuple[str, ...]:
        """What names the random numbers of each image: its content hash, or its key where no hashes were given."""
        return self.hashes or self.keys


def iterate_batches(
    source: ImageSource, preprocessing: Preprocessing, size: int, *, start: int = 0, workers: int = 2
) -> Iterator[Batch]:
    """Yields the source in order, one Batch per chunk of `size` source positions.

    Chunks lie on one grid, `k * size` to `(k + 1) * size`, from position `start` on; a `start` inside a chunk begins
    with the rest of that chunk. Unreadable images raise UnreadableImageError under the policy `raise`; under `skip` and
    `nan` they are left out and stand in `source.unreadable`, so a Batch may hold fewer images, or none. Chunks are
    decoded ahead by `workers` threads (0: none), which never changes the result.
    """
    if size < 1 or start < 0 or workers < 0:
        raise SourceError(f"size {size}, start {start}, workers {workers}: expected size >= 1 and the others >= 0")
    edges = sorted({start, *range(start - start % size + size, len(source), size), len(source)})
    spans = [range(a, b) for a, b in pairwise(edges) if a >= start]
    loads: list[Callable[[], Batch]] = [_loader(source, preprocessing, span) for span in spans]
    return prefetch(loads, workers)


def _loader(source: ImageSource, preprocessing: Preprocessing, span: range) -> Callable[[], Batch]:
    return lambda: _load(source, preprocessing, span)


def prefetch(loads: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Results in order, computed by `workers` threads (0: none) with at most `workers` + 1 of them waiting."""
    if not workers:
        yield from (load() for load in loads)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="farout-images") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for load in loads:
                waiting.append(pool.submit(load))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _load(source: ImageSource, preprocessing: Preprocessing, span: range) -> Batch:
    found: list[tuple[int, Tensor]] = []
    hashes: list[str] = []
    for index in span:
        try:
            pixels = source[index]
            found.append((index, preprocessing(pixels)))
            hashes.append(source.identity(index, pixels))
        except UnreadableImageError:
            if source.policy == "raise":
                raise
            continue  # the source lists it by key and reason
    indices = tuple(index for index, _ in found)
    empty = torch.zeros(0, preprocessing.channels, *preprocessing.size)
    images = torch.stack([image for _, image in found]) if found else empty
    labels = None if source.labels is None else torch.tensor([source.labels[i] for i in indices], dtype=torch.int64)
    return Batch(tuple(source.keys[i] for i in indices), images, labels, indices, hashes=tuple(hashes))


class PreparedImages(Dataset[Tensor]):
    """A source for training: item i is float32 `(C, H, W)` in [0, 1]; an unreadable image raises, whatever the policy.

    `labels` is int64 `(N,)`, or None where the source has none.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing
        self.labels = None if source.labels is None else torch.tensor(source.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocessing(self.source[index])
