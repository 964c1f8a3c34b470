"""Results in a folder or on an object store, through the same few operations.

A location is a local path or a URL, such as `s3://bucket/results`. Files are written whole: to a temporary name that is
flushed and renamed, or as one object, so that a reader sees the old file or the new one. To write the same file again
changes nothing, so that killed work can be repeated.

    out = as_file_path("s3://bucket/results")
    write_bytes(out / "parts" / "0000.parquet", data)
    list_files(out / "parts")            # {"0000.parquet": 1234}
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farout.core import store
from farout.core.errors import ReadError, StoreError
from farout.core.file_errors import read_errors, write_errors
from farout.core.files import read_file
from farout.core.remote_files import FilePath, RemotePath, as_file_path, is_url

__all__ = [
    "FilePath",
    "as_file_path",
    "atomic_file",
    "exists",
    "is_url",
    "list_files",
    "read_bytes",
    "read_json",
    "read_sealed_json",
    "read_text",
    "remove",
    "write_bytes",
    "write_json",
    "write_sealed_json",
    "write_text",
]

_MAX_BYTES = 2**31
_MAX_JSON_BYTES = 2**28


def exists(path: str | FilePath) -> bool:
    """Whether a file or folder exists; on an object store, whether there is an object of this name or below it.

    Raises:
        ReadError: the store cannot be asked.
    """
    path = as_file_path(path)
    with read_errors(str(path)):
        return path.exists()


def list_files(folder: str | FilePath) -> dict[str, int]:
    """Return the sizes of all files below a folder, by their path relative to it with `/`, sorted.

    Names that begin with a `.` are left out: they are temporary. A folder that does not exist has no files.

    Raises:
        ReadError: the folder cannot be listed; never a part of it.
    """
    folder = as_file_path(folder)
    with read_errors(str(folder)):
        sizes = folder.list_files() if isinstance(folder, RemotePath) else _list_local_files(str(folder))
    return {name: sizes[name] for name in sorted(sizes) if not any(part.startswith(".") for part in name.split("/"))}


def _list_local_files(folder: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return sizes
    for entry in entries:
        try:
            if entry.is_dir():
                sizes |= {f"{entry.name}/{name}": size for name, size in _list_local_files(entry.path).items()}
            else:
                sizes[entry.name] = entry.stat().st_size
        except FileNotFoundError:  # a temporary file that was renamed meanwhile
            continue
    return sizes


def read_bytes(path: str | FilePath, limit: int = _MAX_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        ReadError: the file is missing (its `errno` is ENOENT), larger, or cannot be read.
    """
    path = as_file_path(path)
    with read_errors(str(path)):
        return read_file(path, limit)


def write_bytes(path: str | FilePath, data: bytes) -> None:
    """Write a file, at once; folders above it are created.

    Raises:
        WriteError: the file cannot be written.
    """
    path = as_file_path(path)
    if isinstance(path, RemotePath):
        with write_errors(str(path)):
            path.write(data)
        return
    with store.atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: str | FilePath) -> Iterator[Path]:
    """Yield a temporary path on this machine, whose file becomes `path` at the end; after an error nothing is written.

    For files that are too large for `write_bytes`.

    Raises:
        WriteError: the file cannot be written.
    """
    path = as_file_path(path)
    if not isinstance(path, RemotePath):
        with store.atomic_file(path) as temporary:
            yield temporary
        return
    with write_errors(str(path)), tempfile.TemporaryDirectory(prefix="farout-") as folder:
        yield Path(folder, path.name)
        path.upload(Path(folder, path.name))


def remove(path: str | FilePath) -> None:
    """Remove a file, if it exists.

    Raises:
        WriteError: the file cannot be removed.
    """
    path = as_file_path(path)
    with write_errors(str(path)):
        if isinstance(path, RemotePath):
            path.remove()
        else:
            path.unlink(missing_ok=True)


def read_text(path: str | FilePath, limit: int = _MAX_BYTES) -> str:
    """Return the content of a text file in UTF-8.

    Raises:
        ReadError: as `read_bytes`.
        StoreError: it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def write_text(path: str | FilePath, text: str) -> None:
    """Write a text file in UTF-8; raises WriteError."""
    write_bytes(path, text.encode("utf-8"))


def read_json(path: str | FilePath) -> dict[str, Any]:
    """Read a JSON object as `store.read_json` does; raises StoreError also for a file that is missing."""
    try:
        return store.parse_json(path, read_text(path, _MAX_JSON_BYTES))
    except ReadError as error:
        reason = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise StoreError(f"{path} {reason}") from error


def write_json(path: str | FilePath, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the same bytes as `store.write_json`; raises WriteError."""
    write_text(path, store.format_json(content))


def read_sealed_json(path: str | FilePath) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without the hash; raises StoreError if any entry was changed."""
    return store.unseal_json(read_json(path), path)


def write_sealed_json(path: str | FilePath, content: Mapping[str, Any]) -> None:
    """As `write_json`, with an additional last entry `sha256`: the hash of the others."""
    write_json(path, store.seal_json(content))
