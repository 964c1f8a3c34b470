"""Reading of image files, which may be anything: only regular files, and only up to a size."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from farout.core.errors import UnreadableImageError
from farout.core.files import read_file
from farout.core.profiling import timed
from farout.core.remote_files import RemotePath

__all__ = ["read_bytes"]


@timed("reading")
def read_bytes(path: str | os.PathLike[str] | RemotePath, limit: int) -> bytes:
    """Return the content of a regular or remote file of at most `limit` bytes.

    Raises UnreadableImageError if it is missing, not regular, larger, or cannot be read; the message is the reason
    without the path.
    """
    try:
        return read_file(path if isinstance(path, RemotePath) else Path(path), limit)
    except OSError as error:
        hint = " (--max-bytes)" if error.errno == errno.EFBIG else f" ({type(error).__name__})"
        raise UnreadableImageError(f"{error.strerror or error}{hint}") from error
