"""Images of named sources, and thumbnails for a page with many images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from farout.core.errors import FaroutError, LeftOutWarning, SourceError, UnreadableImageError
from farout.data import catalog
from farout.data.decoding import to_pil
from farout.data.image_source import ImageSource
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.sources import open_source
from farout.report.rendering import data_url

__all__ = ["SourceImages", "ThumbnailSet", "thumbnail_data_url"]

_LONGEST_SIDE = 72


def thumbnail_data_url(picture: Image.Image) -> str:
    """Data URL of a picture of at most 72 pixels per side, never enlarged; PNG or JPEG, whichever is smaller."""
    small = picture.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    encoded = []
    for image_format, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        buffer = io.BytesIO()
        small.save(buffer, image_format.upper(), **settings)
        encoded.append((len(buffer.getvalue()), image_format, buffer.getvalue()))
    _, image_format, data = min(encoded)
    return data_url(data, image_format)


class SourceImages:
    """Images by source name and key; each source is opened once.

    Args:
        hub: whether sets on a hub may be downloaded; if not, they count as unavailable.
        reading: how image files are read.

    Attributes:
        missing: why a source cannot be opened, by source name.
    """

    def __init__(self, *, hub: bool, reading: ReadSettings = DEFAULT_READING) -> None:
        self.hub, self.reading = hub, reading
        self.missing: dict[str, str] = {}
        self._sources: dict[str, tuple[ImageSource, dict[str, int]] | None] = {}

    def read(self, source: str, key: str) -> Tensor | None:
        """Read an image (C, H, W), uint8, in its native size; None if it is unavailable."""
        opened = self._open(source)
        if opened is None or key not in opened[1]:
            return None
        try:
            return opened[0][opened[1][key]]
        except UnreadableImageError:
            return None  # the page shows its key without a picture

    def content_hash(self, source: str, key: str, reduced_decoding: bool) -> str | None:
        """Content hash of an image, as of a source with this `reduced_decoding`; None if it is unavailable."""
        opened = self._open(source)
        if opened is None or self.read(source, key) is None:
            return None
        return opened[0].with_reduced_decoding(reduced_decoding).content_hash(opened[1][key])

    def _open(self, name: str) -> tuple[ImageSource, dict[str, int]] | None:
        """A source and the index of each key; None if it cannot be opened."""
        if name not in self._sources:
            try:
                if not self.hub and not catalog.is_local(name):
                    raise SourceError(f"{name} is not on this machine")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", LeftOutWarning)  # shown when the source was scored or fitted
                    source = open_source(name, policy="nan", reading=self.reading)
                self._sources[name] = (source, {key: index for index, key in enumerate(source.keys)})
            except (FaroutError, OSError) as error:
                self._sources[name], self.missing[name] = None, str(error)
        return self._sources[name]


class ThumbnailSet:
    """Numbered thumbnails of a page, each stored once, up to a total size.

    Args:
        limit: maximum number of characters of all data URLs together.

    Attributes:
        urls: data URLs by number.
        is_full: whether an image was left out because of the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.is_full = limit, False
        self.urls: list[str] = []
        self._numbers: dict[tuple[str, str], int | None] = {}
        self._size = 0

    def add(self, group: str, key: str, load: Callable[[], Image.Image | None]) -> int | None:
        """Number of a picture, which `load` returns if it is new; None if there is no picture or no more room."""
        if (group, key) not in self._numbers:
            picture = load()
            self._numbers[group, key] = None if picture is None or self.is_full else self._append(picture)
        return self._numbers[group, key]

    def _append(self, picture: Image.Image) -> int | None:
        url = thumbnail_data_url(picture)
        if self._size + len(url) > self.limit:
            self.is_full = True
            return None
        self._size += len(url)
        self.urls.append(url)
        return len(self.urls) - 1

    def add_image(self, images: SourceImages, source: str, key: str) -> int | None:
        """Number of an image of a source."""

        def load() -> Image.Image | None:
            image = images.read(source, key)
            return None if image is None else to_pil(image)

        return self.add(source, key, load)

    def add_file(self, path: Path) -> int | None:
        """Number of a picture in a file."""

        def load() -> Image.Image | None:
            if not path.is_file():
                return None
            with Image.open(path) as picture:
                return picture.convert("RGB")

        return self.add("\0file", str(path), load)
