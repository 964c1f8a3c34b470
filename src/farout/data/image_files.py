"""Reading of image files by index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from farout.core.errors import UnreadableImageError
from farout.core.names import decode_key, encode_key, expand_path, find_equivalent_path
from farout.data.decoding import decode

__all__ = ["FileReader", "find_listed_file"]


def find_listed_file(folder: Path, name: str) -> tuple[str, Path]:
    """Return the key and the path of a file that a table in `folder` names.

    The name may itself be a key, as in a table of scores, and may differ in its Unicode normalization form.
    """
    path = find_equivalent_path(expand_path(name) if name.startswith("~/") else folder / name)
    if decode_key(name) != name and not os.path.lexists(path):
        decoded = find_equivalent_path(folder / decode_key(name))
        if os.path.lexists(decoded):
            return name, decoded
    return encode_key(name), path


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
