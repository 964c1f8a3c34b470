"""One wording for everything that goes wrong when files are read or written: "cannot write PATH: REASON"."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farout.core.errors import FaroutError, ReadError, WriteError

__all__ = ["describe_system_error", "find_os_error", "read_errors", "write_errors"]

_HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your quota is used up; remove files, or write to another disk",
}
_ERRORS_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EPIPE}
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate", re.IGNORECASE
)
_SIZE = re.compile(r"allocate ([\d.]+ \w+)")
_WRITERS_WITHOUT_ERRNO = re.compile(r"PytorchStreamWriter|inline_container|^\d+ requested and \d+ written$")
"""Messages of torch.save and numpy if the system did not accept all bytes."""


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Inside this context, `path` is written: errors of the system become `WriteError`, whatever library reports them.

    Errors about other files, such as one that is read meanwhile, are passed on.

    Args:
        path: the file or folder, as the user knows it and not a temporary name.

    Raises:
        WriteError: "cannot write PATH: REASON".
    """
    try:
        yield
    except WriteError as error:
        if not _belongs_to(error.filename, path):
            raise
        raise WriteError(path, str(error.strerror), error.errno, error.hint) from error  # not a temporary name
    except FaroutError:
        raise
    except Exception as error:
        cause = find_os_error(error, Path(path).parent)
        if cause is None or (cause.filename is not None and not _belongs_to(cause.filename, path)):
            raise
        reason = cause.strerror or str(cause)
        raise WriteError(path, reason, cause.errno, _HINTS.get(cause.errno or 0, "")) from error


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    """Inside this context, `path` is read: an OSError becomes a `ReadError`.

    Raises:
        ReadError: "cannot read PATH: REASON".
    """
    try:
        yield
    except FaroutError:
        raise
    except OSError as error:
        raise ReadError(path, error.strerror or str(error), error.errno) from error


def describe_system_error(error: Exception, out: str = "") -> str | None:
    """One line about an error of the system that no other message explains; None if it is an error in the program.

    Args:
        error: any exception.
        out: the folder that the command writes.
    """
    text = str(error)
    cause = find_os_error(error, Path(out) if out else None)
    is_out_of_memory = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)
    if isinstance(error, MemoryError) or is_out_of_memory or (cause is not None and cause.errno == errno.ENOMEM):
        size = f" ({match[1]} more were needed)" if (match := _SIZE.search(text)) else ""
        return f"out of memory{size}; give a smaller --batch-size or fewer --workers, or use smaller images"
    if cause is None:
        return None
    if isinstance(cause, ConnectionError | TimeoutError) or cause.errno is None:
        return f"cannot read from the network or a device: {text.splitlines()[0] if text else type(error).__name__}"
    reason = cause.strerror or os.strerror(cause.errno)
    is_written = cause.errno in _ERRORS_OF_WRITING or (out and cause.filename and _belongs_to(cause.filename, out))
    if isinstance(cause.filename, str | bytes | os.PathLike):
        name = os.fsdecode(cause.filename)
    else:  # files of farout are written inside `write_errors`, so this is what is printed
        name = "to the output stream" if is_written else "a file"
    hint = f"; {_HINTS[cause.errno]}" if cause.errno in _HINTS else ""
    return f"cannot {'write' if is_written else 'read'} {name}: {reason}{hint}"


def find_os_error(error: BaseException, folder: Path | None = None) -> OSError | None:
    """The error of the system behind an error of a library, or None if there is none.

    safetensors gives the number of the error in its message only, torch and numpy none at all.

    Args:
        error: what a library raised.
        folder: where it was writing; if no reason is known, a full disk is recognized there.
    """
    link: BaseException | None = error
    while isinstance(link, OSError | RuntimeError):  # torch raises a RuntimeError while it handles the OSError
        if isinstance(link, OSError) and link.errno is not None:
            return link
        link = link.__cause__ or link.__context__
    if match := re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(error)):
        number = int(match[1] or match[2])  # the second form is that of safetensors before 0.6
        return OSError(number, os.strerror(number))
    if isinstance(error, OSError | RuntimeError) and _WRITERS_WITHOUT_ERRNO.search(str(error)):
        number = errno.ENOSPC if folder is not None and _is_full(folder) else errno.EIO
        return OSError(number, os.strerror(number))
    return error if isinstance(error, OSError) else None


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def _belongs_to(filename: object, path: str | Path) -> bool:
    """Whether a file of an error is `path`, in it, one of its parents, or a temporary name of it."""
    if not isinstance(filename, str | bytes | os.PathLike):  # a file descriptor
        return True
    try:
        given, target = (Path(os.path.abspath(os.fsdecode(each))) for each in (filename, path))
    except OSError:  # the current folder was deleted
        return True
    if given in (target, *target.parents) or target in given.parents:
        return True
    within = given.relative_to(target.parent).parts if target.parent in given.parents else ("",)
    return within[0].startswith((f".{target.name}", target.name))
