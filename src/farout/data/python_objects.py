"""Images given as Python objects: arrays, lists, Datasets, DataLoaders and iterators become listings."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from farout.core.errors import SourceError, UnreadableImageError
from farout.data.file_listing import Listing
from farout.data.hub_datasets import list_hub_dataset
from farout.data.image_objects import UnsupportedImageError, check_range
from farout.data.in_memory import list_array, list_items, list_iterable, list_mapping, probe_indices
from farout.data.loaders import list_loader
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.torch_datasets import list_dataset

__all__ = ["check_value_range", "list_object"]


def list_object(images: Any, memory_mib: int = 1024, reading: ReadSettings = DEFAULT_READING) -> Listing:
    """List the images of a Python object; docs/images.md has the table of types.

    Args:
        images: the object.
        memory_mib: memory of images that can be read only once; at least 1024 are used.
        reading: how images are read.

    Raises:
        SourceError: the object contains no images, or is of another type.
    """
    memory_mib = max(memory_mib, 1024)
    name = type(images).__name__
    if isinstance(images, Image.Image | bytes | bytearray | memoryview | io.BytesIO):
        return list_items([images], name, reading)
    pandas = sys.modules.get("pandas")  # an object of a library exists only if it is imported
    if pandas is not None and isinstance(images, pandas.DataFrame):
        raise SourceError("cannot read images from a DataFrame; give a column, such as table['path'], or a .csv file")
    is_text_array = isinstance(images, np.ndarray) and images.dtype.kind in "UT"  # of paths
    is_column = pandas is not None and isinstance(images, pandas.Series | pandas.Index)
    if is_text_array or is_column or isinstance(images, deque):
        return list_items([*images], name, reading)
    if isinstance(images, Tensor) and images.is_nested:
        return list_items(list(images.unbind()), "the nested tensor", reading)
    if isinstance(images, np.lib.npyio.NpzFile):
        raise SourceError(f"give the path of the .npz file, or one of its arrays: {', '.join(images.files)}")
    if isinstance(images, Tensor | np.ndarray):
        return list_array(images, where="images", reading=reading)
    if isinstance(images, Set):
        raise SourceError(f"a {name} has no order, so that its images have no keys; give a list or a dict")
    hub = sys.modules.get("datasets")
    if hub is not None and isinstance(images, hub.Dataset | hub.DatasetDict | hub.IterableDatasetDict):
        return list_hub_dataset(images, f"the {name}", reading)
    if hub is not None and isinstance(images, hub.IterableDataset):
        return list_dataset(images, memory_mib, reading)
    if isinstance(images, DataLoader):
        return list_loader(images, lambda dataset: list_object(dataset, memory_mib, reading), memory_mib, reading)
    if isinstance(images, Dataset):
        return list_dataset(images, memory_mib, reading)
    if isinstance(images, Mapping):
        return list_mapping(images, reading)
    if isinstance(images, list | tuple):
        return list_items(images, f"the {name}", reading)
    if hasattr(images, "__array__") and hasattr(images, "shape"):
        return list_array(np.asarray(images), where="images", reading=reading)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return list_dataset(images, memory_mib, reading)
    if isinstance(images, Iterable):
        return list_iterable(images, f"the {name}", memory_mib, reading)
    raise SourceError(
        f"cannot read images from a {name}; expected a source string, a path, an image, an array or tensor, a list or "
        "dict of images or paths, a Dataset, or a DataLoader"
    )


def check_value_range(listing: Listing, reading: ReadSettings) -> None:
    """Read some images; raises SourceError if the values of all of them, the first included, have no usual range.

    A single image of such values, among others, is an unreadable image.
    """
    unsupported: dict[int, UnsupportedImageError] = {}
    indices = probe_indices(len(listing.keys))
    for index in indices:
        try:
            check_range(listing.read(index), listing.keys[index], reading)
            return
        except UnsupportedImageError as error:
            unsupported[index] = error
        except UnreadableImageError:
            continue  # reported when it is read again
    if 0 in unsupported:
        raise SourceError(f"item {unsupported[0]}") from unsupported[0]
