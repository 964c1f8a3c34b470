"""Images given as Python objects: PIL images, arrays, tensors, encoded bytes and paths, with or without a label.

An array or tensor is one image if its shape is (H, W), (C, H, W), (H, W, C) or (1, C, H, W), with C = 1 (gray), 3 (RGB)
or 4 (RGB and alpha, composited on white). If several fit: (C, H, W) with C = 1 or 3, then (H, W, C), then (4, H, W).
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.names import expand_path, find_equivalent_path, printable
from farout.core.remote_files import FilePath, as_file_path, is_url
from farout.data.columns import LABEL_COLUMNS, find_columns
from farout.data.decoding import (
    DecodedImage,
    LeastSize,
    check_pixels,
    count_frames,
    decode,
    frames_of,
    from_pil,
    range_of_tags,
    unreadable_errors,
)
from farout.data.image_files import count_file_frames
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.untrusted_files import read_bytes

__all__ = [
    "IMAGE_NAMES",
    "NO_LABEL",
    "FailedItem",
    "Frame",
    "UnsupportedImageError",
    "can_be_image",
    "can_only_be_image",
    "check_image",
    "check_range",
    "class_of",
    "count_frames_of",
    "decode_object",
    "describe_error",
    "is_one_image",
    "path_of",
    "resolve_path",
    "split_item",
]

_CHANNELS = (1, 3, 4)
IMAGE_NAMES = ("image", "img", "images", "pixel_values", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Names under which an item that is a dict has its image; in this order, in any case."""


class _NoLabel:
    """The label of an item that has none; a label that is None is missing."""

    def __repr__(self) -> str:
        return "NO_LABEL"


NO_LABEL = _NoLabel()

_LOADING = threading.Lock()
"""A PIL image has a position and is loaded at first use, so that two threads must not use the same one."""


class UnsupportedImageError(UnreadableImageError):
    """An object of a type or shape that is no image, more likely a mistake of the caller than a fault of one image."""


@dataclass(frozen=True)
class FailedItem:
    """An item that could not be read.

    Attributes:
        reason: what happened.
        is_unsupported: whether it is no image, see `UnsupportedImageError`.
    """

    reason: str
    is_unsupported: bool = False

    def error(self, key: str) -> UnreadableImageError:
        """Return the error of this item."""
        kind = UnsupportedImageError if self.is_unsupported else UnreadableImageError
        return kind(f"{key}: {self.reason}")


def describe_error(error: Exception) -> str:
    """Return message and type of an error that code of the user raised, on one line."""
    name = type(error).__name__
    try:
        text = printable(" ".join(str(error).split()))
    except Exception:  # noqa: BLE001 - its own __str__ may fail as well
        return name
    if isinstance(error, UnreadableImageError):
        return text
    return f"{text} ({name})" if text else name


def split_item(item: object) -> tuple[object, object]:
    """Return image and label of an item; the label is `NO_LABEL` if the item has none.

    A tuple or list is (image,), or (image, label, …), of which the rest is ignored. A dict has its image under one of
    `IMAGE_NAMES`, or as the only value that can be an image, and its label under one of `LABEL_COLUMNS`.
    """
    if isinstance(item, tuple | list) and item and can_be_image(item[0]):
        return item[0], item[1] if len(item) > 1 else NO_LABEL
    if isinstance(item, tuple | list) and item and item[0] is None:
        return None, item[1] if len(item) > 1 else NO_LABEL
    if isinstance(item, Mapping) and not _is_encoded_cell(item):
        texts = [name for name in item if isinstance(name, str)]
        images = find_columns(texts, IMAGE_NAMES) or [name for name in item if can_only_be_image(item[name])]
        if images and (len(images) == 1 or images[0] in find_columns(texts, IMAGE_NAMES)):
            label = next((name for name in find_columns(texts, LABEL_COLUMNS) if name != images[0]), None)
            return item[images[0]], NO_LABEL if label is None else item[label]
    return item, NO_LABEL


def can_be_image(value: Any) -> bool:
    """Whether the type of a value is that of an image or of a path."""
    if isinstance(value, Image.Image | bytes | bytearray | memoryview | io.BytesIO | str | os.PathLike):
        return True
    return _is_encoded_cell(value) or (_is_array_like(value) and len(_shape_of(value)) > 0)


def can_only_be_image(value: Any) -> bool:
    """Whether a value can be an image and no label, unlike texts and single numbers or vectors."""
    return can_be_image(value) and not isinstance(value, str) and not (_is_array_like(value) and len(value.shape) < 2)


def _is_array_like(value: object) -> bool:
    return isinstance(value, np.ndarray | Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def _shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape that an array-like object claims to have; one axis of length 0 if it is no shape."""
    try:
        return tuple(int(length) for length in value.shape)
    except Exception:  # noqa: BLE001 - code of the user
        return (0,)


def _is_encoded_cell(value: object) -> bool:
    """Whether the value is an image of the Hugging Face hub that is not decoded: {"bytes": …, "path": …}."""
    return isinstance(value, Mapping) and set(value) <= {"bytes", "path"} and bool(value)


def path_of(image: object) -> str | None:
    """Return the path as a text if the image is given as a path, else None."""
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image).replace(os.sep, "/")
    return None


def resolve_path(path: str) -> FilePath:
    """Return the file of an image that is given as a path or URL; raises FaroutError for a URL with a secret."""
    return as_file_path(path) if is_url(path) else find_equivalent_path(expand_path(path))


def check_image(image: object, key: str) -> None:
    """Raise UnsupportedImageError if the type, shape or value type of the object is that of no image.

    Contents are not looked at: encoded bytes, files and pixels may still be unreadable.
    """
    if isinstance(image, Image.Image | bytes | bytearray | memoryview | io.BytesIO | str | os.PathLike):
        return
    if isinstance(image, DecodedImage | Frame) or _is_encoded_cell(image):
        return
    if isinstance(image, FailedItem):
        if image.is_unsupported:
            raise image.error(key)
        return
    if not _is_array_like(image):
        raise UnsupportedImageError(f"{key}: {_describe(image)}, expected an image")
    shape, kind = _shape_of(image), getattr(image, "dtype", None)
    if len(shape) == 1 and kind in (np.uint8, torch.uint8):
        return  # encoded bytes, as torchvision.io.read_file and cv2.imencode return them
    _check_shape(shape, key)
    if isinstance(image, Tensor):
        fits = not (image.dtype.is_complex or image.is_quantized or image.layout != torch.strided or image.is_meta)
    else:
        fits = isinstance(kind, np.dtype) and kind.kind in "buif"
    if not fits:
        layout = "" if not isinstance(image, Tensor) or image.layout == torch.strided else f", {image.layout}"
        raise UnsupportedImageError(f"{key}: values of type {kind}{layout}, expected integers, floats or bool")


def check_range(decoded: DecodedImage, key: str, reading: ReadSettings) -> None:
    """Raise UnsupportedImageError for values that have no usual range, if none is declared."""
    values = decoded.values
    has_usual_range = values.dtype in (torch.uint8, torch.uint16) or decoded.value_range is not None
    if has_usual_range or isinstance(reading.value_range, tuple) or not bool(torch.isfinite(values).all()):
        return
    low, high = float(values.min()), float(values.max())
    if low < 0 or (values.is_floating_point() and high > 1):
        hint = "ReadSettings(value_range=(low, high))"
        if low >= 0 and high <= 255:
            hint = f"for 0 to 255 pass uint8, or open the source with {hint}"
        elif low >= -1 and high <= 1:
            hint = f"for -1 to 1 pass (x + 1) / 2, or open the source with {hint}"
        else:
            hint = f"declare their range: open_source(…, reading={hint})"
        kind = f"{values.dtype} values".removeprefix("torch.")
        raise UnsupportedImageError(f"{key}: {kind} from {low:g} to {high:g} have no usual range; {hint}")


def _describe(image: object) -> str:
    if image is None:
        return "the item is None"
    if isinstance(image, Mapping):
        return f"the item is a dict with the keys {', '.join(map(repr, list(image)[:8]))}"
    if isinstance(image, tuple | list):
        first = f" that begins with a {type(image[0]).__name__}" if image else " without elements"
        return f"the item is a {type(image).__name__}{first}"
    shape = f" of shape {_shape_of(image)}" if _is_array_like(image) else ""
    return f"the item is a {type(image).__name__}{shape}"


def is_one_image(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is one image, not a batch; see this module."""
    if len(shape) == 4:
        return False
    return len(shape) == 2 or (len(shape) == 3 and (shape[0] in _CHANNELS or shape[-1] in _CHANNELS))


def _check_shape(shape: tuple[int, ...], key: str) -> None:
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    if not is_one_image(shape):
        hint = "; a batch is not an item: concatenate the batches" if len(shape) == 4 else ""
        raise UnsupportedImageError(
            f"{key}: shape {shape}, expected (H, W), (C, H, W) or (H, W, C) with C = 1, 3 or 4{hint}"
        )
    if 0 in shape:
        raise UnsupportedImageError(f"{key}: shape {shape}, an image without pixels")


@dataclass(frozen=True)
class Frame:
    """One frame of an image with several.

    Attributes:
        image: a path, encoded bytes, or a PIL image.
        index: which frame.
    """

    image: object
    index: int


def count_frames_of(image: object, reading: ReadSettings) -> int:
    """Return the number of frames of an image; 1 if it cannot be read, which is reported with the image."""
    path = path_of(image)
    try:
        if path is not None:
            return count_file_frames(resolve_path(path), reading)
        if isinstance(image, bytes | bytearray | memoryview | io.BytesIO):
            return max(1, count_frames(_to_bytes(image), "", reading))
        # Another than the first frame of a PIL image was chosen by the user.
        return frames_of(image) if isinstance(image, Image.Image) and image.tell() == 0 else 1
    except (UnreadableImageError, OSError, ValueError):  # of a closed PIL image
        return 1


def _to_bytes(image: bytes | bytearray | memoryview | io.BytesIO) -> bytes:
    return image.getvalue() if isinstance(image, io.BytesIO) else bytes(image)


def decode_object(
    image: object, key: str, reading: ReadSettings = DEFAULT_READING, least_size: LeastSize | None = None
) -> DecodedImage:
    """Convert one image to native values (C, H, W); encoded ones in a reduced size where `least_size` allows it.

    Raises:
        UnsupportedImageError: the object is no image, see `check_image`.
        UnreadableImageError: the image cannot be read, for whatever reason; the message starts with `key`.
    """
    if isinstance(image, Frame):
        return replace(_decode_frame(image.image, key, reading, image.index, least_size), frames=1)
    return _decode_frame(image, key, reading, None, least_size)


def _decode_frame(
    image: Any, key: str, reading: ReadSettings, frame: int | None, least_size: LeastSize | None
) -> DecodedImage:
    """Convert an image, or one frame of it; None: the first frame, or that which a PIL image is at."""
    if image is None:
        raise UnreadableImageError(f"{key}: the item is None")
    if isinstance(image, FailedItem):
        raise image.error(key)
    if isinstance(image, DecodedImage):
        return image
    path = path_of(image)
    if path is not None:
        return _decode_file(path, key, reading, frame, least_size)
    if isinstance(image, bytes | bytearray | memoryview | io.BytesIO):
        return decode(_to_bytes(image), key, reading, frame or 0, least_size=least_size)
    if _is_encoded_cell(image):
        data = image.get("bytes")
        if isinstance(data, bytes):
            return decode(data, key, reading, frame or 0, least_size=least_size)
        return _decode_file(str(image.get("path")), key, reading, frame, least_size)
    check_image(image, key)
    if isinstance(image, Image.Image):
        with unreadable_errors(key), _LOADING:
            return _decode_pil(image, reading, frame)
    with unreadable_errors(key):
        values = _to_array(image)
    if values.ndim == 1 and values.dtype == np.uint8:
        return decode(values.tobytes(), key, reading, least_size=least_size)
    _check_shape(values.shape, key)  # of the values themselves, whatever the object said
    with unreadable_errors(key):
        return DecodedImage(_to_channels_first(values, reading))


def _decode_pil(image: Image.Image, reading: ReadSettings, frame: int | None) -> DecodedImage:
    check_pixels(image.width, image.height, reading)
    position = image.tell()
    frames = frames_of(image) if position == 0 else 1
    if frame is not None:
        image.seek(frame)
    try:
        value_range = range_of_tags(image)
        image.load()
        return DecodedImage(from_pil(image), value_range, frames)
    finally:
        if frame is not None:
            image.seek(position)


def _decode_file(
    path: str, key: str, reading: ReadSettings, frame: int | None, least_size: LeastSize | None
) -> DecodedImage:
    with unreadable_errors(key):
        file = resolve_path(path)
        data = read_bytes(file, reading.max_bytes)
    return decode(data, key, reading, frame or 0, file.suffix, least_size)


def _to_array(image: object) -> np.ndarray[Any, np.dtype[Any]]:
    if isinstance(image, Tensor):
        image = image.detach().cpu().resolve_conj().resolve_neg()
        if image.is_floating_point() and image.dtype not in (torch.float16, torch.float32, torch.float64):
            image = image.float()
        return image.numpy()
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        raise UnreadableImageError("the array has masked values; fill them first")
    return np.asarray(image)


def _to_channels_first(values: np.ndarray[Any, np.dtype[Any]], reading: ReadSettings) -> Tensor:
    """Convert one image to (1 or 3, H, W) of type uint8, uint16, int32 or float32."""
    if values.ndim == 4:
        values = values[0]
    if values.ndim == 2:
        values = values[None]
    elif values.shape[0] not in (1, 3) and values.shape[2] in _CHANNELS:
        values = values.transpose(2, 0, 1)
    check_pixels(values.shape[2], values.shape[1], reading)
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * 255
    elif values.dtype.kind in "iu" and values.dtype not in (np.uint8, np.uint16):
        if int(values.min()) < -(2**31) or int(values.max()) >= 2**31:
            raise UnreadableImageError(f"{values.dtype} values from {values.min()} to {values.max()} exceed 32 bits")
        values = values.astype(np.int32)
    elif values.dtype.kind == "f":
        values = _clip_rounding(values.astype(np.float32))
    if values.shape[0] == 4:
        values = _composite_on_white(values)
    values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _clip_rounding(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Clip floats to [0, 1] if arithmetic on [0, 1] has left it by no more than rounding."""
    low, high = float(values.min()), float(values.max())
    outside = low < 0 or high > 1
    return values.clip(0, 1) if outside and low >= -1e-6 and high <= 1 + 1e-6 else values


def _composite_on_white(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Composite RGB and alpha (4, H, W) on white; alpha is opaque at the largest value of the type, or at 1."""
    if values.dtype == np.uint8:
        return from_pil(Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))).numpy()
    white = 65535.0 if values.dtype == np.uint16 else 1.0
    if values.dtype.kind != "f" and values.dtype != np.uint16:
        raise UnreadableImageError(f"alpha of type {values.dtype}; expected uint8, uint16 or floats in [0, 1]")
    color, alpha = values[:3].astype(np.float64), values[3:].astype(np.float64) / white
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise UnreadableImageError(
            f"color and alpha from {values.min():g} to {values.max():g}, expected 0 to {white:g}"
        )
    composited = color * alpha + white * (1 - alpha)
    return composited.astype(np.float32) if values.dtype.kind == "f" else np.rint(composited).astype(values.dtype)


def class_of(label: object, key: str) -> int | float | str | bool | list[Any] | None:
    """Return a label as a number, a text, a list of several numbers (see `encode_labels`), or None if it is missing.

    Raises:
        SourceError: the label is no class, such as 0.5 or an image.
    """
    if _is_array_like(label) and not isinstance(label, Tensor | np.ndarray | np.generic):
        label = np.asarray(label)  # arrays of TensorFlow and JAX
    if isinstance(label, Tensor | np.ndarray | np.generic):
        is_vector = label.ndim < 2 or math.prod(label.shape) == max(label.shape)  # also (1, K)
        label = label.reshape(-1).tolist() if is_vector else label
    while isinstance(label, list | tuple) and len(label) == 1:
        label = label[0]
    if isinstance(label, Enum):
        label = label.value if isinstance(label.value, int | str) else label.name
    if isinstance(label, bytes):
        label = label.decode("utf-8", "backslashreplace")
    if isinstance(label, list | tuple) and all(isinstance(value, bool | int | float) for value in label):
        return list(label)
    if label is None or isinstance(label, str | int | bool) or (isinstance(label, float) and label.is_integer()):
        return label
    shown = f"{label!r}" if isinstance(label, float) else _describe(label).replace("the item is ", "")
    raise SourceError(
        f"the label of item {key} is {shown}; expected an integer, a text or a one-hot vector; or "
        "give the images without labels"
    )
