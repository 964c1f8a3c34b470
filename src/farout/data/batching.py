"""Prepared images of a source: batches in order for scoring, single images for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.profiling import timed
from farout.data.image_source import ImageSource
from farout.data.preprocessing import Preprocessing

__all__ = ["Batch", "LoadedImages", "PreparedImages", "iterate_batches", "iterate_loaded", "prefetch"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The readable images of one chunk of a source.

    Attributes:
        keys: keys of the images.
        images: float32 (B, C, H, W) in [0, 1]; empty if `features` are given.
        labels: int64 (B,), or None if the source has no labels.
        indices: indices of the images in the source.
        features: stored features (B, width) that replace the images, or None.
        identities: for each image its content hash with the variant applied, which seeds its random numbers; default:
            the keys.
    """

    keys: tuple[str, ...]
    images: Tensor
    labels: Tensor | None
    indices: tuple[int, ...]
    features: Tensor | None = None
    identities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.identities:
            object.__setattr__(self, "identities", self.keys)


@dataclass(frozen=True)
class LoadedImages(Generic[T]):
    """The readable images of one chunk of a source, each prepared from its pixels.

    Attributes:
        keys, labels, indices, identities: as of a `Batch`.
        prepared: what each image was prepared to.
    """

    keys: tuple[str, ...]
    labels: Tensor | None
    indices: tuple[int, ...]
    identities: tuple[str, ...]
    prepared: list[T]


def iterate_batches(
    source: ImageSource, preprocessing: Preprocessing, size: int, *, start: int = 0, workers: int = 2
) -> Iterator[Batch]:
    """Yield the images of a source in order, one `Batch` per chunk of `size` images.

    Chunk k covers the indices `k * size` to `(k + 1) * size - 1`, whatever `start` is. A batch contains fewer images,
    or none, if some are unreadable and the policy of the source is `skip` or `nan`; `source.unreadable` lists them.

    Args:
        source: the images.
        preprocessing: applied to each image.
        size: number of images in a chunk.
        start: index of the first image; inside a chunk, the first batch is the rest of that chunk.
        workers: threads that decode the next chunks; 0: none. The result does not depend on it.

    Raises:
        UnreadableImageError: an image is unreadable and the policy is `raise`.
    """

    def prepare(index: int) -> tuple[str, Tensor]:
        image = source.read(index, preprocessing.least_size)
        return image.identity, preprocessing(image.pixels)

    return _stack_images(iterate_loaded(source, prepare, size, start=start, workers=workers), preprocessing)


def _stack_images(prepared: Iterator[LoadedImages[Tensor]], preprocessing: Preprocessing) -> Iterator[Batch]:
    for loaded in prepared:
        empty = torch.zeros(0, preprocessing.channels, *preprocessing.size)
        images = torch.stack(loaded.prepared) if loaded.prepared else empty
        yield Batch(loaded.keys, images, loaded.labels, loaded.indices, identities=loaded.identities)


def iterate_loaded(
    source: ImageSource,
    prepare: Callable[[int], tuple[str, T]],
    size: int,
    *,
    start: int = 0,
    workers: int = 2,
) -> Iterator[LoadedImages[T]]:
    """Like `iterate_batches`, with what `prepare` returns for the index of each image: its identity, and anything.

    `prepare` reads the image; it is called by `workers` threads.
    """
    if size < 1 or start < 0 or workers < 0:
        raise SourceError(f"size {size}, start {start}, workers {workers}: expected size >= 1 and the others >= 0")
    edges = sorted({start, *range(start - start % size + size, len(source), size), len(source)})
    spans = [range(a, b) for a, b in pairwise(edges) if a >= start]
    return prefetch([partial(_load_images, source, prepare, span) for span in spans], workers)


def prefetch(loads: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Yield the results of `loads` in order, computed by `workers` threads (0: none), at most `workers` + 1 ahead."""
    if not workers:
        yield from (load() for load in loads)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="farout-images") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for load in loads:
                waiting.append(pool.submit(load))
                if len(waiting) > workers:
                    yield _wait(waiting.popleft())
            while waiting:
                yield _wait(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()


@timed("waiting for images")
def _wait(loading: Future[T]) -> T:
    return loading.result()


def _load_images(source: ImageSource, prepare: Callable[[int], tuple[str, T]], span: range) -> LoadedImages[T]:
    indices: list[int] = []
    prepared: list[T] = []
    identities: list[str] = []
    for index in span:
        try:
            identity, result = prepare(index)
        except UnreadableImageError:
            if source.policy == "raise":
                raise
            continue  # the source lists it by key and reason
        indices.append(index)
        prepared.append(result)
        identities.append(identity)
    labels = None if source.labels is None else torch.tensor([source.labels[i] for i in indices], dtype=torch.int64)
    return LoadedImages(tuple(source.keys[i] for i in indices), labels, tuple(indices), tuple(identities), prepared)


class PreparedImages(Dataset[Tensor]):
    """Prepared images of a source for training: item i is float32 (C, H, W) in [0, 1].

    An unreadable image raises UnreadableImageError under every policy.

    Attributes:
        labels: int64 (N,), or None if the source has no labels.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing
        self.labels = None if source.labels is None else torch.tensor(source.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocessing(self.source.read_pixels(index, self.preprocessing.least_size))
