"""Small pictures of scored images for a page that bears many: each stands in it once, and their bytes are bounded."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from farout.core.errors import FaroutError, SourceError, UnreadableImageError
from farout.data import catalog
from farout.data.decoding import to_pil
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.report.rendering import data_address

__all__ = ["SourceImages", "Thumbnails", "small_address"]

_SIDE = 72


def small_address(picture: Image.Image, side: int = _SIDE) -> str:
    """A data address of a picture of at most `side` pixels, never enlarged: PNG or JPEG, whichever is shorter."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    found = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        buffer = io.BytesIO()
        small.save(buffer, kind.upper(), **settings)
        found.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(found)
    return data_address(data, kind)


class SourceImages:
    """Images of sources by name and key, opened once; None where a source or an image is not at hand any more.

    Args:
        hub: whether sets that lie on a hub may be fetched; else they count as not at hand.
    """

    def __init__(self, *, hub: bool) -> None:
        self.hub = hub
        self._sources: dict[str, tuple[ImageSource, dict[str, int]] | None] = {}
        self.missing: dict[str, str] = {}
        """Why a source cannot be opened, by its name."""

    def read(self, source: str, key: str) -> Tensor | None:
        """The image (C, H, W) uint8 in its native size."""
        opened = self._open(source)
        if opened is None or key not in opened[1]:
            return None
        try:
            return opened[0][opened[1][key]]
        except UnreadableImageError:
            return None  # the page shows its key alone

    def hash(self, source: str, key: str) -> str | None:
        """The content hash of a readable image."""
        opened = self._open(source)
        if self.read(source, key) is None or opened is None:
            return None
        return opened[0].content_hash(opened[1][key])

    def _open(self, name: str) -> tuple[ImageSource, dict[str, int]] | None:
        if name not in self._sources:
            try:
                source = open_source(self._checked(name), policy="nan")
                self._sources[name] = (source, {key: place for place, key in enumerate(source.keys)})
            except (FaroutError, OSError) as error:
                self._sources[name], self.missing[name] = None, str(error)
        return self._sources[name]

    def _checked(self, name: str) -> str:
        """The name; raises SourceError where it leads to a hub that is not to be asked."""
        if not (self.hub or catalog.on_this_machine(name)):
            raise SourceError(f"{name} is not on this machine")
        return name


class Thumbnails:
    """Numbers pictures and keeps their addresses, each once, up to `limit` bytes altogether; then it keeps no more."""

    def __init__(self, limit: int) -> None:
        self.limit, self.full = limit, False
        self.addresses: list[str] = []
        self._known: dict[tuple[str, str], int | None] = {}
        self._held = 0

    def number(self, group: str, key: str, make: Callable[[], Image.Image | None]) -> int | None:
        """The number of a picture, made where it is new; None where there is none or no more room."""
        if (group, key) not in self._known:
            self._known[(group, key)] = self._add(make())
        return self._known[(group, key)]

    def _add(self, picture: Image.Image | None) -> int | None:
        if picture is None or self.full:
            return None
        address = small_address(picture)
        if self._held + len(address) > self.limit:
            self.full = True
            return None
        self._held += len(address)
        self.addresses.append(address)
        return len(self.addresses) - 1

    def of_image(self, images: SourceImages, source: str, key: str) -> int | None:
        """The number of a source's image."""

        def made() -> Image.Image | None:
            image = images.read(source, key)
            return None if image is None else to_pil(image)

        return self.number(source, key, made)

    def of_file(self, path: Path) -> int | None:
        """The number of a picture in a file, where there is one."""

        def made() -> Image.Image | None:
            if not path.is_file():
                return None
            with Image.open(path) as picture:
                return picture.convert("RGB")

        return self.number("\0file", str(path), made)
