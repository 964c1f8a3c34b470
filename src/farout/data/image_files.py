"""Listing of image files whose paths are known, and reading them by index."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from farout.core.errors import UnreadableImageError
from farout.core.names import decode_file_name, encode_file_name, expand_path, find_equivalent_path
from farout.core.profiling import timed
from farout.core.remote_files import FilePath
from farout.data.decoding import MULTI_FRAME_SUFFIXES, DecodedImage, LeastSize, count_frames, decode, unreadable_errors
from farout.data.file_listing import Listing, check_keys
from farout.data.read_settings import ReadSettings
from farout.data.untrusted_files import read_bytes

__all__ = [
    "EncodedImageReader",
    "FileReader",
    "count_file_frames",
    "count_frames_if_readable",
    "expand_frames",
    "find_listed_file",
    "list_image_files",
]


def find_listed_file(folder: Path, name: str) -> tuple[str, Path]:
    """Return the key and the path of a file that a table in `folder` names.

    The name may itself be a key, as in a table of scores, and may differ in its Unicode normalization form.
    """
    path = find_equivalent_path(expand_path(name) if name.startswith("~/") else folder / name)
    if decode_file_name(name) != name and not os.path.lexists(path):
        decoded = find_equivalent_path(folder / decode_file_name(name))
        if os.path.lexists(decoded):
            return name, decoded
    return encode_file_name(name), path


def count_frames_if_readable(name: str, read: Callable[[], bytes], reading: ReadSettings) -> int:
    """Return the number of frames of encoded data; 1 if it cannot be read, which is reported with the image.

    Args:
        name: name of the file, whose suffix says whether it can have several frames.
        read: reads the data; called only if it can.
        reading: limits.
    """
    if Path(name).suffix.lower() not in MULTI_FRAME_SUFFIXES:
        return 1
    try:
        with unreadable_errors(name):
            data = read()
        return max(1, count_frames(data, name, reading))
    except UnreadableImageError:
        return 1


def count_file_frames(path: FilePath, reading: ReadSettings) -> int:
    """Return the number of frames of an image file; 1 if it cannot be read, which is reported with the image."""
    return count_frames_if_readable(path.name, lambda: read_bytes(path, reading.max_bytes), reading)


def expand_frames(
    keys: Sequence[str], groups: Sequence[str] | None, counts: Sequence[int], where: str
) -> tuple[tuple[str, ...], Sequence[str] | None, list[int], list[int]]:
    """Make every frame of every file an image: return their keys, groups, indices of the file, and frames.

    The frames of a file with several have the keys `file#0`, `file#1`, ... and are a group. `counts` are the numbers of
    frames. Raises SourceError if another file has one of these keys.
    """
    expanded = [(index, frame) for index, count in enumerate(counts) for frame in range(count)]
    if max(counts) > 1:
        own = groups or keys
        groups = [keys[index] if counts[index] > 1 else own[index] for index, _ in expanded]
    frame_keys = [f"{keys[index]}#{frame}" if counts[index] > 1 else keys[index] for index, frame in expanded]
    return check_keys(frame_keys, where), groups, [index for index, _ in expanded], [frame for _, frame in expanded]


class EncodedImageReader(ABC):
    """Reads encoded images by index.

    Args:
        keys: key of each image.
        reading: limits.
        frames: its frame, where the frames of files with several are images of their own; None: the first.
    """

    def __init__(self, keys: Sequence[str], reading: ReadSettings, frames: Sequence[int] | None) -> None:
        self.keys, self.reading = tuple(keys), reading
        self._frames = None if frames is None else tuple(frames)

    def select(self, indices: Sequence[int]) -> Self:
        """Return a reader of the images at these indices, which holds nothing of the others."""
        selected = copy.copy(self)
        selected.keys = tuple(self.keys[i] for i in indices)
        selected._frames = None if self._frames is None else tuple(self._frames[i] for i in indices)
        return selected

    @abstractmethod
    def read_encoded(self, index: int) -> tuple[bytes, str]:
        """Return the encoded data of an image and the suffix of its file; whatever it raises makes it unreadable."""

    def __call__(self, index: int, least_size: LeastSize | None = None) -> DecodedImage:
        key = self.keys[index]
        with unreadable_errors(key), timed("reading"):
            data, suffix = self.read_encoded(index)
        return self.decode_encoded(index, data, suffix, least_size)

    def decode_encoded(self, index: int, data: bytes, suffix: str, least_size: LeastSize | None) -> DecodedImage:
        """Decode what `read_encoded` has returned."""
        key = self.keys[index]
        if self._frames is None:
            return decode(data, key, self.reading, suffix=suffix, least_size=least_size)
        return replace(decode(data, key, self.reading, self._frames[index], suffix, least_size), frames=1)


class FileReader(EncodedImageReader):
    """Reads image files by index.

    Args:
        keys, reading, frames: as in `EncodedImageReader`.
        paths: the file of each image.
        problems: why an image cannot be read, by key, for those of which that is known.
    """

    def __init__(
        self,
        keys: Sequence[str],
        paths: Sequence[FilePath],
        reading: ReadSettings,
        frames: Sequence[int] | None = None,
        problems: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(keys, reading, frames)
        self._paths, self._problems = tuple(paths), dict(problems or {})

    def select(self, indices: Sequence[int]) -> Self:
        selected = super().select(indices)
        selected._paths = tuple(self._paths[i] for i in indices)
        selected._problems = {key: self._problems[key] for key in selected.keys if key in self._problems}
        return selected

    def read_encoded(self, index: int) -> tuple[bytes, str]:
        problem, path = self._problems.get(self.keys[index]), self._paths[index]
        if problem is not None:
            raise UnreadableImageError(problem)
        return read_bytes(path, self.reading.max_bytes), path.suffix


def list_image_files(
    keys: Sequence[str],
    paths: Sequence[FilePath],
    reading: ReadSettings,
    where: str,
    *,
    problems: Mapping[str, str] | None = None,
    labels: Sequence[int] | None = None,
    class_names: tuple[str, ...] | None = None,
    groups: Sequence[str] | None = None,
    left_out: Mapping[str, int] | None = None,
    splits: str | None = None,
) -> Listing:
    """List image files.

    Where all frames are read, those of a file with several have the keys `file#0`, `file#1`, ... and are a group.

    Args:
        keys: key of each image.
        paths: its file.
        reading: limits and frames.
        where: name of the set, for messages.
        problems: why an image cannot be read, by key, for those of which that is known.
        labels, class_names, groups, left_out, splits: as in `Listing`, per file.

    Raises:
        SourceError: a key occurs more than once.
    """
    problems = problems or {}
    keys, frames = check_keys(keys, where), None
    if reading.frames == "all":
        counts = [1 if key in problems else count_file_frames(path, reading) for key, path in zip(keys, paths)]
        keys, groups, indices, frames = expand_frames(keys, groups, counts, where)
        labels = None if labels is None else [labels[index] for index in indices]
        paths = [paths[index] for index in indices]
    return Listing(
        keys,
        FileReader(keys, paths, reading, frames, problems),
        None if labels is None else tuple(labels),
        class_names,
        None if groups is None else tuple(groups),
        left_out=dict(left_out or {}),
        splits=splits,
    )
