"""Reading of image files by index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from farout.core.errors import UnreadableImageError
from farout.data.decoding import decode

__all__ = ["FileReader"]


class FileReader:
    """Reads image files by index."""

    def __init__(self, keys: Sequence[str], paths: Sequence[Path]) -> None:
        self._keys, self._paths = tuple(keys), tuple(paths)

    def __call__(self, index: int) -> Tensor:
        key = self._keys[index]
        try:
            data = self._paths[index].read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{key}: {error.strerror or error} ({type(error).__name__})") from error
        return decode(data, key)
