"""Readers of Python objects in memory: arrays, lists, mappings and iterators of images."""

from __future__ import annotations

import copy
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.names import encode_file_name, encode_key
from farout.core.remote_files import RemotePath, check_url, is_url
from farout.data.decoding import DecodedImage, LeastSize
from farout.data.file_listing import Listing, check_keys, encode_labels, index_keys
from farout.data.image_files import expand_frames
from farout.data.image_objects import (
    NO_LABEL,
    FailedItem,
    Frame,
    UnsupportedImageError,
    check_image,
    check_range,
    class_of,
    count_frames_of,
    decode_object,
    describe_error,
    is_one_image,
    path_of,
    resolve_path,
    split_item,
)
from farout.data.read_settings import DEFAULT_READING, ReadSettings

__all__ = [
    "encode_item_labels",
    "list_array",
    "list_images",
    "list_items",
    "list_iterable",
    "list_mapping",
    "probe_indices",
]

_ITEM_BYTES = 256
"""Memory that an item needs in addition to its pixels, roughly."""


def list_array(
    images: np.ndarray | Tensor,
    labels: Sequence[object] | None = None,
    where: str = "images",
    reading: ReadSettings = DEFAULT_READING,
) -> Listing:
    """List the images of an array or tensor, of values as `decode_object` reads them.

    The shape is that of one image (see `farout.data.image_objects`) or of a batch: (N, C, H, W) or (N, H, W, C) with
    C = 1, 3 or 4; (N, H, W) if neither N nor W can be a number of channels. With labels, (N, H, W) is a batch if there
    are N labels. Where the channels are is decided as for one image.

    Raises:
        SourceError: the array has another shape or type, is empty, or has not one label per image.
    """
    if isinstance(images, np.ndarray) and images.dtype == object:
        return list_items(list(images.reshape(-1)), where, reading)
    shape = tuple(images.shape)
    count = None if labels is None else len(labels)
    if is_one_image(shape) and not (len(shape) == 3 and count == shape[0] != 1):
        images = images[None]
    elif len(shape) == 3 and 2 in (shape[0], shape[-1]) and count != shape[0]:
        raise SourceError(
            f"{where} have shape {shape}, which is no batch (N, C, H, W) or (N, H, W, C); for gray images (N, H, W) "
            "add the axis of the channels: images[:, None]"
        )
    elif len(shape) not in (3, 4):
        raise SourceError(f"{where} have shape {shape}, expected (N, C, H, W), (N, H, W, C), or one image (C, H, W)")
    if not len(images):
        raise SourceError(f"{where} are empty: shape {shape}; give at least one image")
    if count is not None and count != len(images):
        raise SourceError(f"{where} contain {len(images)} images and {count} labels; expected one label per image")
    try:
        check_image(images[0], "0")
    except UnsupportedImageError as error:
        reason = str(error).removeprefix("0: ")
        raise SourceError(f"{where} have shape {shape} and type {images.dtype}; each image has {reason}") from error
    keys = index_keys(len(images))
    codes, names = (None, None) if labels is None else encode_item_labels([(None, one) for one in labels], where, keys)
    final = images.dtype in (torch.uint8, np.uint8) and 4 not in (images.shape[1], images.shape[-1])
    return Listing(keys, _ObjectReader(images, keys, reading), codes, names, in_memory=final)


class _ObjectReader:
    """Converts images by index."""

    def __init__(
        self,
        images: Sequence[object] | np.ndarray | Tensor,
        keys: Sequence[str],
        reading: ReadSettings,
        require_range: bool = False,
    ) -> None:
        self._images, self._keys, self._reading, self._require_range = images, tuple(keys), reading, require_range

    def select(self, indices: Sequence[int]) -> _ObjectReader:
        """Return a reader of the images at these indices, which does not hold the others."""
        selected = copy.copy(self)
        selected._keys = tuple(self._keys[i] for i in indices)
        if isinstance(self._images, np.ndarray | Tensor):
            selected._images = self._images[list(indices)]
        else:
            selected._images = [self._images[i] for i in indices]
        return selected

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        decoded = decode_object(self._images[index], self._keys[index], self._reading, least_size)
        if self._require_range:
            check_range(decoded, self._keys[index], self._reading)
        return decoded


def list_images(images: Sequence[object], reading: ReadSettings, *, require_range: bool) -> Listing:
    """List images as they are; an object that is no image is an unreadable one. The keys are the indices.

    Args:
        images: objects of any types that `decode_object` reads, also mixed.
        reading: limits.
        require_range: whether values that have no usual range, such as floats from 0 to 255, are unreadable.
    """
    keys = index_keys(len(images))
    reader = _ObjectReader(images, keys, reading, require_range)
    return Listing(keys, reader, in_memory=all(_is_final(image) for image in images))


def list_items(items: Sequence[object], where: str = "the list", reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List images of any types that `decode_object` reads, also mixed, or pairs (image, label).

    The keys of paths are the paths, those of other images their indices.

    Raises:
        SourceError: there are no items, none of them is an image, or labels are missing or no classes.
    """
    if not items:
        raise SourceError(f"{where} of images is empty; give at least one image")
    return _list_pairs([split_item(item) for item in items], where, reading)


def list_mapping(images: Mapping[Any, Any], reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List the values of a mapping, images or pairs (image, label) as in `list_items`, by its keys.

    A dict of columns, as `{"image": […], "label": […]}`, is a list of its rows.
    """
    if not images:
        raise SourceError("the dict of images is empty; expected {key: image}")
    column: Any
    labels: Any
    column, labels = split_item(images)
    if column is not images and (isinstance(column, list) or len(getattr(column, "shape", ())) == 4):
        if labels is NO_LABEL:
            return list_items(list(column), "the dict", reading)
        if not hasattr(labels, "__len__") or len(labels) != len(column):
            raise SourceError(f"the dict has {len(column)} images and not as many labels; expected one label per image")
        return _list_pairs(list(zip(column, labels)), "the dict", reading)
    keys = [encode_key(str(key)) for key in images]
    if "" in keys:
        raise SourceError("the dict has an empty key; give every image a key")
    return _list_pairs(
        [split_item(item) for item in images.values()], "the dict", reading, check_keys(keys, "the dict")
    )


def _list_pairs(
    pairs: Sequence[tuple[object, object]], where: str, reading: ReadSettings, keys: tuple[str, ...] | None = None
) -> Listing:
    images = [image for image, _ in pairs]
    _check_frames(images, where)
    groups = None
    if keys is None:
        paths = [path_of(image) for image in images]
        for url in filter(is_url, paths):
            check_url(str(url))  # before it becomes a key
        keys = check_keys([str(i) if path is None else encode_file_name(path) for i, path in enumerate(paths)], where)
        groups = None if None in paths else tuple(key.rpartition("/")[0] or "." for key in keys)
    if reading.frames == "all":
        counts = [count_frames_of(image, reading) for image in images]
        keys, frame_groups, indices, frames = expand_frames(keys, groups, counts, where)
        groups = None if frame_groups is None else tuple(frame_groups)
        images = [Frame(images[i], frame) if counts[i] > 1 else images[i] for i, frame in zip(indices, frames)]
        pairs = [(image, pairs[i][1]) for image, i in zip(images, indices)]
    _check_some_image(images, keys, where)
    labels, names = encode_item_labels(pairs, where, keys)
    final = all(_is_final(image) for image in images)
    return Listing(keys, _ObjectReader(images, keys, reading), labels, names, groups, in_memory=final)


def _check_frames(images: Sequence[object], where: str) -> None:
    """Raise SourceError for a PIL image with several frames that is in the list more than once.

    `list(ImageSequence.Iterator(image))` is such a list; all of its items would be read as the same frame.
    """
    stacks = Counter(id(image) for image in images if isinstance(image, Image.Image) and hasattr(image, "n_frames"))
    if any(count > 1 for count in stacks.values()):
        raise SourceError(
            f"{where} contains the same PIL image several times, which is one frame; copy each frame: "
            "[frame.copy() for frame in ImageSequence.Iterator(image)]"
        )


def probe_indices(count: int) -> list[int]:
    """Return up to eight indices, evenly spaced: the items that are read when a set is opened."""
    return sorted({number * count // 8 for number in range(8)})


def _is_final(image: object) -> bool:
    """Whether the image is in memory as the pixels that it is read as, so that a copy would save nothing."""
    values = image.values if isinstance(image, DecodedImage) else image
    return isinstance(values, np.ndarray | Tensor) and values.dtype in (np.uint8, torch.uint8)


def _check_some_image(images: Sequence[object], keys: Sequence[str], where: str) -> None:
    """Raise SourceError if no item can be an image; a single one that cannot is an unreadable image."""
    first: str | None = None
    for image, key in zip(images, keys):
        try:
            _check_item(image, key)
            return
        except UnsupportedImageError as error:
            first = first or str(error)
    more = f" (none of the {len(images)} items of {where} is an image)" if len(images) > 1 else ""
    raise SourceError(f"item {first}{more}")


def _check_item(image: object, key: str) -> None:
    path = path_of(image)
    if path is None:
        check_image(image, key)
        return
    if not path:
        raise UnsupportedImageError(f"{key}: the path is empty")
    file = resolve_path(path)
    if isinstance(file, RemotePath):  # read, or found to be missing, when the image is accessed
        return
    if os.path.isdir(file):
        raise UnsupportedImageError(f"{key}: this is a folder; give the folder itself as the source, not in a list")
    if not os.path.lexists(file):
        raise UnsupportedImageError(
            f"{key}: there is no such file; a list contains paths of images, and a source such as cifar10:test or a "
            "glob is given as a text, without a list"
        )


def encode_item_labels(
    pairs: Sequence[tuple[object, object]], where: str, keys: Sequence[str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return integer labels and class names of pairs (image, label); None if no item has a label, or all are None.

    An item that could not be read has the label of the first other one, which is not used.

    Raises:
        SourceError: a label is no class, see `class_of`, or some items have none.
    """
    known = [(key, label) for key, (image, label) in zip(keys, pairs) if label is not NO_LABEL or _is_image(image, key)]
    if all(label is NO_LABEL for _, label in known):
        return None, None
    missing = [key for key, label in known if label is NO_LABEL]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(pairs)} items of {where} have no label (first: {missing[0]}), and the others "
            "have; give a label to all or none"
        )
    classes = {key: class_of(label, key) for key, label in known}
    if all(value is None for value in classes.values()):
        return None, None
    first = next(iter(classes.values()))
    return encode_labels([classes.get(key, first) for key in keys], where)


def _is_image(image: object, key: str) -> bool:
    try:
        check_image(image, key)
    except UnsupportedImageError:
        return False
    return not isinstance(image, FailedItem)


def list_iterable(
    iterable: Iterable[object], where: str, memory_mib: int = 1024, reading: ReadSettings = DEFAULT_READING
) -> Listing:
    """Read an iterator once and list its items as `list_items` does.

    Pixels are copied, because an iterator may use the same array again; paths and encoded bytes are kept as they are.

    Raises:
        SourceError: the images need more memory than `memory_mib`, or the iterator ends with an error.
    """
    pairs: list[tuple[object, object]] = []
    size, limit = 0, memory_mib * 2**20
    failure: Exception | None = None
    try:
        iterator = iter(iterable)
    except Exception as error:
        raise SourceError(f"{where} cannot be read: {describe_error(error)}") from error
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - code of the user may raise anything; reported as unreadable
            failure = error
            pairs.append((FailedItem(describe_error(error)), NO_LABEL))
            size += _ITEM_BYTES
        else:
            failure = None
            image, label = split_item(item)
            image, held = _copy_image(image, reading)
            pairs.append((image, label))
            size += held
        if size > limit:
            raise SourceError(
                f"{where} has more than {memory_mib} MiB of images ({len(pairs) - 1} images fit), which are read once "
                "and kept in memory; give a Dataset with __getitem__ or image files, or open_source(…, memory_mib=…)"
            )
    if failure is not None:  # a generator ends with its first error, whatever would have come after it
        raise SourceError(
            f"{where} ended with an error after {len(pairs) - 1} items: {describe_error(failure)}; of a Dataset with "
            "__getitem__, an item that raises an error is one unreadable image"
        ) from failure
    if not pairs:
        raise SourceError(f"{where} is empty; give at least one image")
    return _list_pairs(pairs, where, reading)


def _copy_image(image: object, reading: ReadSettings) -> tuple[object, int]:
    """Return an image that no other code changes, and the bytes that it needs."""
    if isinstance(image, bytearray | memoryview | io.BytesIO):
        image = image.getvalue() if isinstance(image, io.BytesIO) else bytes(image)
    if isinstance(image, bytes):
        return image, _ITEM_BYTES + len(image)
    if image is None or isinstance(image, Mapping) or path_of(image) is not None:
        return image, _ITEM_BYTES
    try:
        decoded = decode_object(image, "", reading)
    except UnreadableImageError as error:
        return FailedItem(str(error).removeprefix(": "), isinstance(error, UnsupportedImageError)), _ITEM_BYTES
    decoded = replace(decoded, values=decoded.values.clone())
    return decoded, _ITEM_BYTES + decoded.values.nbytes
