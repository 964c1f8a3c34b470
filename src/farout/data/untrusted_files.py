"""Reading of files that may be anything: only regular files, and only up to a size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from farout.core.errors import UnreadableImageError

__all__ = ["read_bytes"]

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    The kind of the file is checked after it is opened, without waiting, so that a named pipe cannot block and a device
    cannot be read without end, even if the path is replaced in between.

    Raises:
        UnreadableImageError: the file is missing, not regular, larger than the limit, or cannot be read. The message is
            the reason without the path.
    """
    try:
        # O_NONBLOCK: opening a named pipe waits for a writer. Windows has no such flag, and no pipes in folders.
        handle = os.open(Path(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UnreadableImageError(f"{error.strerror or error} ({type(error).__name__})") from error
    except ValueError as error:  # a zero byte in the path
        raise UnreadableImageError(str(error)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
            raise UnreadableImageError(f"this is {kind}, not a regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(limit + 1)  # files of some file systems have a size of 0
    except OSError as error:
        raise UnreadableImageError(f"{error.strerror or error} ({type(error).__name__})") from error
    finally:
        os.close(handle)
    if len(data) > limit:
        size = max(status.st_size, len(data))
        raise UnreadableImageError(f"the file has {size} bytes, and the limit is {limit} (max_bytes)")
    return data
