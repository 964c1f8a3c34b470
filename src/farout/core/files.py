"""Reading regular files only, hashing them, and flushing files to disk."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, TypeVar

from farout.core.remote_files import FilePath, RemotePath

__all__ = [
    "file_size",
    "flush_file",
    "flush_folder",
    "has_content",
    "hash_file",
    "lock_file",
    "map_files",
    "open_at",
    "open_regular_file",
    "read_file",
]

T = TypeVar("T")

_REMOTE_THREADS = 16
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# opening a named pipe without a writer would wait for one
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
"""Answers of file systems that cannot flush a file or a folder."""


def open_regular_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; never waits, unlike `open`, which waits for the writer of a named pipe.

    Raises OSError for a file that cannot be opened, and for a folder, named pipe, socket or device.
    """
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, f"not a file name: {error}", str(path)) from error
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'a special file')}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def has_content(path: str | Path) -> bool:
    """Whether a file exists and is not empty.

    Images are not flushed one by one, which takes several milliseconds each on most disks; a power failure leaves the
    last ones of a run empty, and a resumed run generates these again.
    """
    try:
        return os.stat(path).st_size > 0 and os.path.isfile(path)
    except OSError:
        return False


def map_files(function: Callable[[FilePath], T], paths: Sequence[FilePath]) -> list[T]:
    """Return the results of a function that opens each file; remote files are opened by several threads."""
    if not any(isinstance(path, RemotePath) for path in paths) or len(paths) == 1:
        return [function(path) for path in paths]
    with ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="farout-files") as pool:
        return list(pool.map(function, paths))


def open_at(path: FilePath, position: int, length: int) -> BufferedReader:
    """Open a file at a position from which about `length` bytes are read: of a remote file, in one request."""
    file = path.open("rb", max(1, length)) if isinstance(path, RemotePath) else path.open("rb")
    file.seek(position)
    return file


def file_size(path: FilePath) -> int:
    """The number of bytes of a file; raises OSError."""
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def read_file(path: str | FilePath, limit: int) -> bytes:
    """The content of a regular or remote file of at most `limit` bytes; raises OSError for any other."""
    if isinstance(path, RemotePath):
        return path.read(limit)
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def hash_file(path: str | Path) -> str:
    """SHA-256 of a regular file as hexadecimal digits; raises OSError for a file that cannot be read."""
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed, or until the process ends however, without waiting.

    Returns whether it is locked: False if another process has locked it, None if its file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def flush_file(path: str | Path) -> None:
    """Write a file that the operating system may still hold in memory to disk, so that it survives a power failure.

    Raises OSError if the disk is full or fails.
    """
    _flush(path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def flush_folder(path: str | Path) -> None:
    """Write the names in a folder to disk, after files were renamed in it; does nothing where that is impossible."""
    if os.name == "posix":
        _flush(path, os.O_RDONLY)


def _flush(path: str | Path, flags: int) -> None:
    descriptor = -1
    try:
        descriptor = os.open(path, flags)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
