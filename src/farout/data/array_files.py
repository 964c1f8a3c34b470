"""Readers of files of numpy arrays, .npz and .npy.

An array is one image of shape (H, W), (H, W, C) or (1, H, W), or a batch of shape (N, H, W), (N, C, H, W) or
(N, H, W, C), with C = 1, 3 or 4 (RGB and alpha). Where both of the last fit, channels are first. Headers are read
first: what an array needs in memory is known, and refused, before anything is decompressed or allocated.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.files import file_size, open_at
from farout.core.remote_files import FilePath
from farout.data.columns import read_groups, read_labels, warn_about_source
from farout.data.decoding import DecodedImage, LeastSize
from farout.data.file_listing import Listing, check_count, index_keys
from farout.data.image_objects import decode_object
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection

__all__ = ["ARRAY_SUFFIXES", "list_array_file"]

ARRAY_SUFFIXES = (".npz", ".npy")
"""File endings of files of arrays."""

_CHANNELS = (1, 3, 4)
_LABEL_WORDS = frozenset({"label", "labels", "target", "targets", "class", "classes", "category", "y"})
_IMAGE_WORDS = frozenset({"image", "images", "img", "imgs", "data", "x"})
_MAX_HEADER = 2**14


@dataclass(frozen=True)
class _Header:
    """The header of an array.

    Attributes:
        shape, dtype: those of the array.
        is_fortran: whether the first axis is the fastest.
        offset: number of bytes before the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_image_shape(self) -> bool:
        """Whether the array can be one image or a batch."""
        return self.dtype.kind in "buif" and (
            len(self.shape) in (2, 3) or (len(self.shape) == 4 and bool({self.shape[1], self.shape[3]} & {*_CHANNELS}))
        )

    def __str__(self) -> str:
        return f"{self.shape} {'object' if self.dtype.hasobject else self.dtype}"


def list_array_file(
    path: FilePath, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION
) -> Listing:
    """List the images of an .npy file, or of one array of an .npz file with its labels.

    Of several arrays of images, `images` is used, or the one that the selection names; the labels are the array that is
    named alike: `labels`, `test_labels` for `test_images`, `y_test` for `x_test`.

    Raises:
        SourceError: the file cannot be read, has no array of images, several of which none is named, an array beyond
            the byte limit, or labels of another number.
    """
    if path.suffix.lower() == ".npy":
        selection.check_used(where=str(path), kind="a file of one array")
        with _read_errors(path), open_at(path, 0, _MAX_HEADER) as file:
            header = _read_header(file)
            _check_is_image(header, str(path))
            count = _count_images(header.shape, None, str(path))
            if header.offset + header.nbytes > file_size(path):
                raise ValueError(f"its header announces {header.nbytes} bytes, more than the file has")
            if header.is_fortran or count is None:
                _check_size(header, str(path), reading)
                file.seek(header.offset)
                values = _read_values(file, header)
                images: Any = values if count is not None else [values]
            else:
                images = _FileArray(path, header)
        return _list_images(images, 1 if count is None else count, str(path), reading)
    selection.check_used("split", "array", "label", where=str(path), kind="a file of arrays")
    with _read_errors(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        headers = {name: _read_member_header(archive, member, name, path) for name, member in members.items()}
        name = _choose_array(headers, path, selection)
        where = f"{path}, array {name}"
        _check_size(headers[name], where, reading)

        def read(array: str) -> Any:
            _check_size(headers[array], f"{path}, array {array}", reading)
            with archive.open(members[array]) as stream:
                stream.read(headers[array].offset)
                return _read_values(stream, headers[array])

        column, labels, names = _read_labels(headers, name, lambda array: np.atleast_1d(read(array)), path, selection)
        num_labels = None if labels is None else len(labels)
        count = _count_images(headers[name].shape, num_labels, where)
        groups = None
        if count is not None:
            others = [each for each, header in headers.items() if header.shape == (count,) and each != column]
            _, groups = read_groups(others, lambda array: read(array).tolist(), str(path))
        values = read(name)
    num_images = 1 if count is None else count
    if labels is not None and len(labels) != num_images:
        raise SourceError(
            f"{where} contains {num_images} images, and the array {column} has {len(labels)} labels; expected one "
            "label per image"
        )
    return _list_images([values] if count is None else values, num_images, where, reading, labels, names, groups)


@contextmanager
def _read_errors(path: FilePath) -> Iterator[None]:
    """Convert what broken files of arrays raise to a SourceError that names the file."""
    try:
        yield
    except SourceError:
        raise
    except (
        *(OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),  # of zip files
        *(ValueError, SyntaxError, TypeError, TokenError, MemoryError, OverflowError, KeyError),  # of headers
    ) as error:
        kind = path.suffix.lower().removeprefix(".")
        raise SourceError(
            f"{path} cannot be read as {kind} without pickle ({error or type(error).__name__})"
        ) from error


def _read_header(stream: IO[bytes]) -> _Header:
    """Read the header of an array; raises ValueError and others for broken ones."""
    start = io.BytesIO(stream.read(_MAX_HEADER))  # a header may announce 4 GiB of itself
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(start)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(start)
    else:
        raise ValueError(f"its arrays have format version {'.'.join(map(str, version))}, which numpy uses for tables")
    if any(size < 0 for size in shape):
        raise ValueError(f"its header has the shape {shape}")
    return _Header(tuple(map(int, shape)), dtype, bool(is_fortran), start.tell())


def _read_member_header(archive: zipfile.ZipFile, member: str, name: str, path: FilePath) -> _Header:
    try:
        with archive.open(member) as stream:
            header = _read_header(stream)
    except (ValueError, SyntaxError, TypeError, TokenError, EOFError) as error:
        raise SourceError(f"{path}, array {name} cannot be read ({error})") from error
    size = archive.getinfo(member).file_size
    if not header.dtype.hasobject and size != header.offset + header.nbytes:
        raise SourceError(
            f"{path}, array {name}: the header announces {header} of {header.nbytes} bytes, and the file contains "
            f"{max(0, size - header.offset)}"
        )
    return header


def _check_size(header: _Header, where: str, reading: ReadSettings) -> None:
    if header.dtype.hasobject:
        raise SourceError(f"{where} contains Python objects, which are not read without pickle; save numbers")
    if header.nbytes > reading.max_bytes:
        raise SourceError(
            f"{where} has {header} of {header.nbytes} bytes, and the limit is {reading.max_bytes} (--max-bytes)"
        )


def _read_values(stream: IO[bytes], header: _Header) -> np.ndarray:
    data = bytearray(header.nbytes)
    view, filled = memoryview(data), 0
    while filled < len(data):
        part = stream.read(min(len(data) - filled, 2**20))
        if not part:
            raise EOFError(f"it ends after {filled} of {len(data)} bytes")
        view[filled : filled + len(part)] = part
        filled += len(part)
    values = np.frombuffer(data, dtype=header.dtype)
    return values.reshape(header.shape, order="F" if header.is_fortran else "C")


class _FileArray:
    """The images of an .npy file, read by index, so that a file may be larger than the memory."""

    def __init__(self, path: FilePath, header: _Header) -> None:
        self._path, self._header = path, header

    def __len__(self) -> int:
        return self._header.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        shape, dtype = self._header.shape[1:], self._header.dtype
        image = _Header(shape, dtype, False, self._header.offset + index * math.prod(shape) * dtype.itemsize)
        try:
            with open_at(self._path, image.offset, image.nbytes) as file:
                return _read_values(file, image)
        except (OSError, EOFError) as error:
            raise UnreadableImageError(f"{index}: {error}") from error


class _ArrayImages:
    """Converts the images of an array by index."""

    def __init__(self, images: Any, reading: ReadSettings) -> None:
        self._images, self._reading = images, reading

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        return decode_object(self._images[index], str(index), self._reading, least_size)


def _list_images(
    images: Any,
    count: int,
    where: str,
    reading: ReadSettings,
    labels: tuple[int, ...] | None = None,
    names: tuple[str, ...] | None = None,
    groups: tuple[str, ...] | None = None,
) -> Listing:
    check_count(count, where, reading.max_bytes)
    is_final = isinstance(images, list | np.ndarray) and images[0].dtype == np.uint8
    return Listing(index_keys(count), _ArrayImages(images, reading), labels, names, groups, in_memory=is_final)


def _words(name: str) -> frozenset[str]:
    """Return the words of a name: train and images of `train_images`, x and train of `x_train`, `XTrain`, `xtrain`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    name = re.sub(r"(?i)(?<![a-z])([xy])(?=train|test|val|dev)", r"\1_", name)
    return frozenset(re.split(r"[\W_]+", name.casefold())) - {""}


def _choose_array(headers: Mapping[str, _Header], path: FilePath, selection: Selection) -> str:
    """Return the name of the array of images."""
    described = ", ".join(f"{name} {header}" for name, header in headers.items()) or "none"
    if selection.array and selection.split:
        raise SourceError(f"{path} is given with :{selection.split} and @array={selection.array}; give one of them")
    if selection.array:
        alike = [name for name in headers if name.casefold() == selection.array.casefold()]
        if selection.array not in headers and len(alike) != 1:
            raise SourceError(f"{path} has no array {selection.array!r}; its arrays are {described}")
        name = selection.array if selection.array in headers else alike[0]
        _check_is_image(headers[name], f"{path}, array {name}")
        return name
    fitting = [name for name, header in headers.items() if header.has_image_shape and not _words(name) & _LABEL_WORDS]
    if any(len(headers[name].shape) > 2 for name in fitting):
        fitting = [name for name in fitting if len(headers[name].shape) > 2]
    if selection.split:
        of_split = [name for name in fitting if selection.split.casefold() in _words(name)]
        if len(of_split) != 1:
            raise SourceError(
                f"{path} has {len(of_split)} arrays of images with {selection.split!r} in their names; its arrays are "
                f"{described} (@array=NAME names one)"
            )
        return of_split[0]
    if not fitting:
        unreadable = [name for name, header in headers.items() if header.dtype.hasobject]
        hint = f"; Python objects ({', '.join(unreadable)}) are not read without pickle" if unreadable else ""
        raise SourceError(f"{path} has the arrays {described}; expected images of shape (N, H, W[, C]){hint}")
    if len(fitting) == 1:
        return fitting[0]
    if "images" in fitting:
        others = ", ".join(f"{name} {headers[name]}" for name in fitting if name != "images")
        warn_about_source(f"{path} has several arrays that can be images; images is read, not {others} (@array=NAME)")
        return "images"
    listed = ", ".join(f"{name} {headers[name]}" for name in fitting)
    raise SourceError(f"{path} has several arrays that can be images: {listed}; name one: {path}@array={fitting[0]}")


def _check_is_image(header: _Header, where: str) -> None:
    if header.dtype.hasobject:
        raise SourceError(f"{where} contains Python objects, which are not read without pickle; save numbers")
    if not header.has_image_shape:
        raise SourceError(
            f"{where} has shape and type {header}; expected numbers of shape (H, W), (H, W, C), (N, H, W), "
            "(N, C, H, W) or (N, H, W, C) with C = 1, 3 or 4"
        )


def _count_images(shape: tuple[int, ...], num_labels: int | None, where: str) -> int | None:
    """Return the number of images of an array, None if the array itself is one image; raises SourceError."""
    if 0 in shape:
        raise SourceError(f"{where} is empty: shape {shape}; expected at least one image")
    if len(shape) == 4:
        return shape[0]
    if len(shape) == 2:
        if num_labels == shape[0] > 1:
            raise SourceError(
                f"{where} has shape {shape} and {num_labels} labels: if each row is an image, save it as "
                f"({shape[0]}, H, W); expected one label for one image"
            )
        return None
    if num_labels == shape[0]:
        return shape[0]
    if shape[0] in (3, 4):
        raise SourceError(
            f"{where} has shape {shape}, which can be one image or {shape[0]} gray images; save it as "
            f"(1, {', '.join(map(str, shape))}) or as ({shape[0]}, 1, {shape[1]}, {shape[2]})"
        )
    return None if shape[0] == 1 or shape[2] in _CHANNELS else shape[0]


def _read_labels(
    headers: Mapping[str, _Header], images: str, read: Any, path: FilePath, selection: Selection
) -> tuple[str, tuple[int, ...] | None, tuple[str, ...] | None]:
    """Return the array of the labels of the array `images` (empty: none), the labels and the class names."""
    others = [name for name in headers if name != images]
    if selection.label:
        return read_labels(others, read, str(path), chosen=selection.label)
    labels = [name for name in others if _words(name) & _LABEL_WORDS and len(headers[name].shape) < 3]
    split = _words(images) - _IMAGE_WORDS
    found = [name for name in labels if _words(name) - _LABEL_WORDS == split]
    if not found:
        found = [
            name
            for name in labels
            if _words(name) <= _LABEL_WORDS and headers[name].shape[0] == headers[images].shape[0]
        ]
    if len(found) > 1:
        warn_about_source(f"{path} has several arrays of labels: {', '.join(found)}; {found[0]} is used (@label=NAME)")
    if found:
        return read_labels(others, read, str(path), chosen=found[0])
    wrong = [name for name in others if _words(name) & _LABEL_WORDS and _words(name) - _LABEL_WORDS == split]
    if wrong:
        described = ", ".join(f"{name} {headers[name]}" for name in wrong)
        warn_about_source(f"{path} has no labels for {images}: {described} has not one label per image")
        return "", None, None
    count = headers[images].shape[0]
    unknown = [name for name in others if headers[name].shape in ((count,), (count, 1)) and name not in labels]
    if unknown and headers[images].has_image_shape and len(headers[images].shape) > 2:
        warn_about_source(
            f"{path} has no labels for {images}: none of the arrays {', '.join(unknown)} is called labels, targets or "
            f"y; if one contains labels, add @label={unknown[0]}"
        )
    return "", None, None
