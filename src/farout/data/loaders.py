"""Readers of DataLoaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from farout.core.errors import SourceError
from farout.data.decoding import DecodedImage, LeastSize
from farout.data.file_listing import Listing, check_keys
from farout.data.image_objects import NO_LABEL, can_only_be_image, split_item
from farout.data.in_memory import list_iterable
from farout.data.read_settings import ReadSettings

__all__ = ["list_loader"]


def list_loader(
    loader: DataLoader[Any],
    list_object: Callable[[Any], Listing],
    memory_mib: int,
    reading: ReadSettings,
) -> Listing:
    """List the images of a DataLoader in its order; the keys are the indices in its Dataset.

    With the default `collate_fn`, its Dataset is read by index. Otherwise its batches are read once, see
    `list_iterable`: images (B, …), pairs of images and labels, dicts of both, or lists of items; the keys count their
    images.

    Args:
        loader: the DataLoader.
        list_object: lists its Dataset.
        memory_mib: memory of images that are read once.
        reading: how images are read.

    Raises:
        SourceError: the DataLoader shuffles or draws its images, so that keys would not identify them.
    """
    is_default = loader.collate_fn in (default_collate, default_convert)
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        if is_default and loader.batch_size is not None:
            return list_object(loader.dataset)
        return list_iterable(_items_of(loader), "the DataLoader", memory_mib, reading)
    order = _order_of(loader)
    if not is_default:
        return list_iterable(_items_of(loader), "the DataLoader", memory_mib, reading)
    listing = list_object(loader.dataset)
    if not all(0 <= index < len(listing.keys) for index in order):
        raise SourceError(f"the sampler of the DataLoader gives indices outside 0..{len(listing.keys) - 1}")
    return Listing(
        check_keys([listing.keys[index] for index in order], "the DataLoader"),
        _OrderedReader(listing, order),
        None if listing.labels is None else tuple(listing.labels[index] for index in order),
        listing.class_names,
        None if listing.groups is None else tuple(listing.groups[index] for index in order),
        in_memory=listing.in_memory,
        left_out=listing.left_out,
    )


class _OrderedReader:
    """Reads the images of a listing in another order."""

    def __init__(self, listing: Listing, order: Sequence[int]) -> None:
        self._read, self._order = listing.read, tuple(order)

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        return self._read(self._order[index], least_size)


def _order_of(loader: DataLoader[Any]) -> list[int]:
    """Return the indices in the order of the DataLoader, also those of a last batch that it drops."""
    sampler = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    hint = "its keys would not identify images; give its Dataset or a Subset of it, or shuffle=False"
    if isinstance(sampler, random) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
        raise SourceError(f"the DataLoader shuffles its images ({type(sampler).__name__}), so that {hint}")

    def draw() -> list[int]:
        batches = loader.batch_sampler
        if batches is None or type(batches) is BatchSampler:
            return [int(index) for index in sampler]
        return [int(index) for batch in batches for index in batch]

    order = draw()
    if draw() != order:
        raise SourceError(f"the DataLoader gives its images in another order each time, so that {hint}")
    return order


def _items_of(loader: DataLoader[Any]) -> Iterator[object]:
    for batch in loader:
        # With batch_size=None a DataLoader gives the items of its Dataset, which may be batches themselves.
        image = split_item(batch)[0] if loader.batch_sampler is None else None
        if image is None or len(getattr(image, "shape", ())) == 4:
            yield from _split_batch(batch)
        else:
            yield batch


def _split_batch(batch: Any) -> list[Any]:
    """Split a batch into items: images, or pairs (image, label).

    A batch is an array of images; a pair of images and labels, each an array or a list; a dict of both; or a list of
    items, as `collate_fn=list` gives it.
    """
    if isinstance(batch, Mapping):
        values, labels = split_item(batch)
        return [batch] if values is batch or not hasattr(values, "__len__") else _pair(values, labels)
    if isinstance(batch, Tensor | np.ndarray):
        return list(batch)
    if not isinstance(batch, list | tuple) or not batch:
        return [batch]
    images, labels = batch[0], batch[1] if len(batch) > 1 else NO_LABEL
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return _pair(images, labels)
    if isinstance(images, list | tuple | Tensor | np.ndarray) and isinstance(
        labels, list | tuple | Tensor | np.ndarray
    ):
        is_column = len(images) == len(labels) and not can_only_be_image(labels[0])
        if is_column and all(can_only_be_image(image) for image in images):
            return _pair(images, labels)
    return list(batch)


def _pair(images: Any, labels: Any) -> list[Any]:
    if labels is NO_LABEL or labels is None:
        return list(images)
    if len(images) != len(labels):
        raise SourceError(f"a batch has {len(images)} images and {len(labels)} labels")
    return list(zip(images, labels))
