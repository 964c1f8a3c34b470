"""Readers of torch Datasets, and of other objects with the same methods."""

from __future__ import annotations

import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from farout.core import progress
from farout.core.errors import MisleadingResultWarning, SourceError, UnreadableImageError
from farout.core.names import encode_name
from farout.data.columns import LABEL_COLUMNS, find_columns
from farout.data.decoding import DecodedImage, LeastSize
from farout.data.file_listing import Listing, encode_labels, index_keys
from farout.data.image_objects import (
    NO_LABEL,
    FailedItem,
    UnsupportedImageError,
    check_image,
    class_of,
    decode_object,
    describe_error,
    split_item,
)
from farout.data.image_source import ImageSource
from farout.data.in_memory import encode_item_labels, list_iterable, probe_indices
from farout.data.read_settings import DEFAULT_READING, ReadSettings

__all__ = ["list_dataset"]


def list_dataset(dataset: Any, memory_mib: int = 1024, reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List a Dataset whose items are images, pairs (image, label) or dicts, see `split_item`; keys are the indices.

    Labels are those of the items. All items are read once for them, except for the Datasets of torchvision whose
    labels are known without their images (ImageFolder, MNIST, CIFAR10 and their like), for a TensorDataset, and for
    subsets and concatenations of these. Integer labels have the names in the attribute `classes` if each is an index
    of it, and if an attribute `targets` contains the same labels. An IterableDataset is read once, see `list_iterable`.

    An item that raises an error, or that is no image, is one unreadable image. Warns if the first items differ when
    they are read a second time.

    Raises:
        SourceError: the Dataset has no length or no items, none of its first items is an image, or a label is no class.
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        listing = list_iterable(dataset, name, memory_mib, reading)
        return replace(listing, class_names=listing.class_names or _fitting_names(dataset, listing.labels))
    if type(dataset) is ConcatDataset:
        parts: list[Any] = [part for part in dataset.datasets if len(part)]  # type: ignore[arg-type]
        return _join(parts, [list_dataset(part, memory_mib, reading) for part in parts], name)
    if isinstance(dataset, ImageSource):
        return Listing(
            dataset.keys, _SourceReader(dataset), dataset.labels, dataset.class_names, dataset.groups, in_memory=True
        )
    count = _length_of(dataset, name)
    reader = _DatasetReader(dataset, reading)
    pairs = _probe(reader, count, name)
    known = _known_labels(dataset)
    is_unlabeled = bool(pairs) and all(label is NO_LABEL for _, label in pairs.values())
    if is_unlabeled and (known is None or not _is_part_of_source(dataset)):
        return Listing(index_keys(count), reader)
    if known is not None and len(known) == count and _agree(known, pairs):
        classes = [class_of(label, str(index)) for index, label in enumerate(known)]
        labels, names = None, None
        if any(value is not None for value in classes):
            labels, names = encode_labels(classes, name)
    else:
        labels, names = encode_item_labels(reader.read_pairs(count, name), name, index_keys(count))
    return Listing(index_keys(count), reader, labels, names or _fitting_names(dataset, labels))


def _length_of(dataset: Any, name: str) -> int:
    try:
        count = len(dataset)
    except Exception as error:
        raise SourceError(
            f"{name} has no length: {describe_error(error)}; expected a Dataset with __len__ and __getitem__, or an "
            "IterableDataset"
        ) from error
    if not count:
        raise SourceError(f"{name} is empty; give at least one image")
    return count


class _SourceReader:
    """Reads the images of an ImageSource, for a DataLoader or ConcatDataset of it."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        return DecodedImage(self._source[index])


def _is_part_of_source(dataset: Any) -> bool:
    """Whether the Dataset is an ImageSource or a Subset of one, whose items are images without their labels."""
    return _is_part_of_source(dataset.dataset) if type(dataset) is Subset else isinstance(dataset, ImageSource)


class _DatasetReader:
    """Reads the images of a Dataset by index, one at a time: Datasets are made for processes, not for threads."""

    def __init__(self, dataset: Any, reading: ReadSettings) -> None:
        self._dataset, self.reading = dataset, reading
        self._failed: dict[int, FailedItem] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_failed": dict(self._failed), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def pair(self, index: int) -> tuple[object, object]:
        """Return image and label of an item; the image is a FailedItem if the Dataset raises an error."""
        if index in self._failed:
            return self._failed[index], NO_LABEL
        try:
            with self._lock:
                return split_item(self._dataset[index])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - code of the user may raise anything; one unreadable image
            return FailedItem(describe_error(error)), NO_LABEL

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        return decode_object(self.pair(index)[0], str(index), self.reading, least_size)

    def read_pairs(self, count: int, name: str) -> list[tuple[object, object]]:
        """Return all labels, and instead of images the items that failed or `_UNLABELED`."""
        pairs: list[tuple[object, object]] = []
        with progress.task(f"reading labels of {name}", count) as bar:
            for index in range(count):
                image, label = self.pair(index)
                if label is NO_LABEL:
                    image = _failure_of(image, str(index)) or _UNLABELED
                if isinstance(image, FailedItem) and label is NO_LABEL:
                    self._failed[index] = image  # even if another access succeeds: its label is not known
                    pairs.append((image, label))
                else:
                    pairs.append((_UNLABELED, label))
                bar.advance()
        return pairs


def _failure_of(image: object, key: str) -> FailedItem | None:
    """Return what is wrong with an item that has no label, or None if it is an image."""
    try:
        check_image(image, key)
    except UnsupportedImageError as error:
        return FailedItem(str(error).removeprefix(f"{key}: "), is_unsupported=True)
    return image if isinstance(image, FailedItem) else None


_UNLABELED = np.zeros((1, 1), dtype=np.uint8)
"""Replaces an image of which only the label is used."""


def _probe(reader: _DatasetReader, count: int, name: str) -> dict[int, tuple[object, object]]:
    """Read the first items and some others; return those that did not fail.

    Raises SourceError if none of them is an image. Warns if one differs when it is read again.
    """
    pairs: dict[int, tuple[object, object]] = {}
    unsupported: dict[int, UnsupportedImageError] = {}
    is_random = False
    for index in probe_indices(count):
        image, label = reader.pair(index)
        if isinstance(image, FailedItem):
            continue
        if image is not None:
            pairs[index] = (image, label)
        try:
            first = decode_object(image, str(index), reader.reading)
            is_random = is_random or not torch.equal(first.values, reader(index).values)
        except UnsupportedImageError as error:
            unsupported[index] = error
        except UnreadableImageError:
            continue  # one image, reported when it is read again
    if 0 in unsupported and len(unsupported) == len(pairs):
        raise SourceError(f"item {unsupported[0]}") from unsupported[0]
    if is_random:
        warnings.warn(
            f"items of {name} change when they are read again; results cannot be repeated. Open it without random "
            "augmentation",
            MisleadingResultWarning,
            stacklevel=4,
        )
    return pairs


def _known_labels(dataset: Any) -> Sequence[object] | None:
    """Return the labels of all items where they are known without reading images, else None."""
    if type(dataset) is Subset:
        known = _known_labels(dataset.dataset)
        return None if known is None else _select(known, dataset.indices)
    if isinstance(dataset, ImageSource):
        return dataset.labels
    if type(dataset) is TensorDataset:
        return list(dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    vision = sys.modules.get("torchvision.datasets")
    if vision is None or not isinstance(dataset, vision.VisionDataset):
        return None
    read_item = type(dataset).__getitem__
    if read_item is vision.DatasetFolder.__getitem__:
        targets = [target for _, target in dataset.samples]
    elif read_item in (vision.MNIST.__getitem__, vision.CIFAR10.__getitem__):
        targets = list(dataset.targets)
    else:
        return None
    if dataset.target_transform is None:
        return targets
    try:
        return [dataset.target_transform(class_of(target, str(index))) for index, target in enumerate(targets)]
    except Exception:  # noqa: BLE001 - code of the user may raise anything; the items will raise it again
        return None


def _agree(known: Sequence[object], pairs: Mapping[int, tuple[object, object]]) -> bool:
    return all(
        label is NO_LABEL or class_of(known[index], str(index)) == class_of(label, str(index))
        for index, (_, label) in pairs.items()
    )


def _fitting_names(dataset: Any, labels: Sequence[int] | None) -> tuple[str, ...] | None:
    """Return the names in `classes`, or of the labels of a Hugging Face Dataset, if they name these labels, else None.

    A transform of the targets may give other labels than those that the classes are named by.
    """
    classes, features = _attribute(dataset, "classes"), _attribute(dataset, "features")
    if classes is None and _is_part_of_source(dataset):
        classes = _attribute(dataset, "class_names")
    if classes is None and isinstance(features, Mapping):
        column = next(iter(find_columns([name for name in features if isinstance(name, str)], LABEL_COLUMNS)), None)
        classes = None if column is None else getattr(features[column], "names", None)
    if labels is None or not isinstance(classes, list | tuple | np.ndarray) or not len(classes):
        return None
    targets = _attribute(dataset, "targets")
    if isinstance(targets, Tensor | np.ndarray):
        targets = targets.tolist()
    if type(dataset) is Subset and isinstance(targets, list | tuple):
        targets = _select(targets, dataset.indices)
    is_number = isinstance(targets, list) and all(isinstance(target, int | np.integer) for target in targets)
    if is_number and len(targets) == len(labels) and targets != list(labels):
        return None
    names = tuple(
        encode_name(", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name)) for name in classes
    )
    fits = len(set(names)) == len(names) and all(0 <= label < len(names) for label in labels)
    return names if fits else None


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute of a Dataset, or of the Dataset that it is a Subset of."""
    try:
        return _attribute(dataset.dataset, name) if type(dataset) is Subset else getattr(dataset, name, None)
    except Exception:  # noqa: BLE001 - a property of the user
        return None


def _select(values: Sequence[object], indices: Sequence[int]) -> list[object] | None:
    try:
        return [values[int(index)] for index in indices]
    except IndexError:  # the items that are not there are unreadable images
        return None


def _join(parts: Sequence[Any], listings: Sequence[Listing], name: str) -> Listing:
    """Join the listings of the parts of a ConcatDataset, with the indices in it as keys."""
    count = sum(len(listing.keys) for listing in listings)
    if not count:
        raise SourceError(f"{name} is empty; give at least one image")
    reader = _JoinedReader(listings)
    unlabeled = [index for index, listing in enumerate(listings) if listing.labels is None]
    if len(unlabeled) == len(listings):
        return Listing(index_keys(count), reader)
    if unlabeled:
        raise SourceError(f"part {unlabeled[0]} of {name} has no labels, and others have; give labels to all or none")
    all_names = {listing.class_names for listing in listings}
    if len(all_names) == 1:
        labels = tuple(label for listing in listings for label in listing.labels or ())
        return Listing(index_keys(count), reader, labels, all_names.pop())
    # The same integer means another class in each part: the classes are joined by name. Integers without names are the
    # same in all parts, so that names that only some parts give to them are left out.
    classes: list[object] = []
    for part, listing in zip(parts, listings):
        labels, names = listing.labels or (), listing.class_names
        is_number = names is None or (None in all_names and names == _fitting_names(part, labels))
        classes += labels if is_number or names is None else [names[label] for label in labels]
    labels, names = encode_labels(classes, name)
    return Listing(index_keys(count), reader, labels, names)


class _JoinedReader:
    """Reads the images of several listings by one index; keys in messages are those of the joined set."""

    def __init__(self, listings: Sequence[Listing]) -> None:
        self._reads = [listing.read for listing in listings]
        self._ends = np.cumsum([len(listing.keys) for listing in listings]).tolist()

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        part = bisect_right(self._ends, index)
        own = index - (self._ends[part - 1] if part else 0)
        try:
            return self._reads[part](own, least_size)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{index}: {str(error).removeprefix(f'{own}: ')}") from error
