"""The folder of the feature cache: where it is, what it contains, its size limit, and what is deleted from it.

Each kind of features (weights, layers, preprocessing, precision, library versions) has a folder with `settings.json`
and files of rows. The modification time of a file is the time of its last use: reading sets it, too, so that it is
known which file is the least recently used, without writing anything else.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.core.files import lock_file
from farout.core.names import expand_path
from farout.features.feature_files import FORMAT, SUFFIX, count_rows

__all__ = [
    "HASHES_PREFIX",
    "SETTINGS_FILE",
    "CacheFullError",
    "CachedFeatureSet",
    "cache_folder",
    "cache_limit",
    "clear_cache",
    "format_size",
    "list_cached_features",
    "lock_cache",
    "make_room",
    "measure_cache",
    "warn_once",
]

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
DEFAULT_LIMIT = 20 * 2**30
IN_USE_SECONDS = 600
"""Files that were read or written in this time are not deleted to make room: a running process may need them again."""
_DAY = 86400
_FOLDER_NAME = re.compile("[0-9a-f]{16}")
HASHES_PREFIX = "content-hashes-"
"""Begins the names of the folders with the content hashes of encoded images, see `farout.features.known_images`."""
_OLD_SUFFIX = ".npy"
_LOCK_FILE = ".lock"
_UNITS = {
    "": 2**30,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


class CacheFullError(StoreError):
    """The feature cache has reached its size limit, and all its files are in use."""


def cache_folder() -> Path:
    """`$FAROUT_CACHE`, or `farout` in the user's cache folder.

    Raises StoreError if neither is known.
    """
    given = os.environ.get("FAROUT_CACHE")
    if given:
        return expand_path(given)
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    try:
        return expand_path(user_cache) / "farout"
    except FaroutError as error:
        raise StoreError("there is no home folder for the feature cache; set FAROUT_CACHE to a folder") from error


def cache_limit() -> int | None:
    """The size limit of the cache in bytes: `$FAROUT_CACHE_LIMIT`, or 20 GiB; None: no limit.

    Raises StoreError for a text that is not a size.
    """
    given = os.environ.get("FAROUT_CACHE_LIMIT", "").strip()
    if not given:
        return DEFAULT_LIMIT
    if given.lower() == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", given, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size < 2**63:
        expected = "a size above 0 such as 20, 500MB or 1.5TiB (in GiB without a unit), or none"
        raise StoreError(f"FAROUT_CACHE_LIMIT is {given!r:.100}; expected {expected}")
    return int(size)


def format_size(size: float) -> str:
    """A number of bytes in the largest binary unit of which there is at least one."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


@dataclass(frozen=True)
class _StoredFile:
    """A file of the cache that contains features."""

    path: Path
    size: int
    last_used: float


def _kind_folders(root: Path) -> list[Path]:
    return sorted(folder for folder in (root / "features").glob("*/") if _FOLDER_NAME.fullmatch(folder.name))


def _all_folders(root: Path) -> list[Path]:
    return [*_kind_folders(root), *sorted((root / "features").glob(f"{HASHES_PREFIX}*/"))]


def _find_files(folder: Path) -> list[_StoredFile]:
    """The files of one kind of features, also of an older layout; files of killed processes are removed."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another process deleted it
                if entry.name.startswith("."):  # temporary
                    if time.time() - entry.stat().st_mtime > _DAY:
                        os.unlink(entry.path)
                elif entry.name.endswith((SUFFIX, _OLD_SUFFIX)):
                    found.append(_StoredFile(Path(entry.path), entry.stat().st_size, entry.stat().st_mtime))
    return found


def measure_cache(root: Path | None = None) -> int:
    """Size of the cache in bytes."""
    return sum(file.size for folder in _all_folders(root or cache_folder()) for file in _find_files(folder))


@contextmanager
def lock_cache(root: Path) -> Iterator[bool]:
    """Exclude other processes from merging and deleting files; yields False at once if another one does so now, or if
    this process must not write there.

    The system releases the lock when the process ends. Where the file system has no locks, it yields True: without
    them, several processes would do the same work, and no row would be lost.
    """
    try:
        file = (root / "features" / _LOCK_FILE).open("ab")
    except OSError:
        yield False
        return
    with file:
        yield lock_file(file) is not False


def make_room(root: Path, size: int, limit: int | None) -> int:
    """Delete the least recently used files, of all kinds of features, if `size` more bytes would exceed the limit.

    Files that were used in the last ten minutes are kept. One line is logged if files are deleted.

    Returns:
        The number of bytes that may be written, `size` included, before this must be called again.

    Raises:
        CacheFullError: there is no room, and all files were used in the last ten minutes.
    """
    if limit is None:
        return 2**63
    files = [file for folder in _all_folders(root) for file in _find_files(folder)]
    excess = sum(file.size for file in files) + size - limit
    if excess <= 0:
        return size + min(-excess, limit // 64)  # other processes write, too
    now = time.time()
    unused = sorted(
        (file for file in files if not now - IN_USE_SECONDS < file.last_used < now + _DAY),
        key=lambda file: file.last_used if file.last_used <= now else 0.0,  # a wrong clock set it
    )
    if sum(file.size for file in unused) < excess:
        raise CacheFullError(_describe_full(root, limit))
    with lock_cache(root) as is_locked:
        if not is_locked:
            return size  # another process makes room
        deleted: list[_StoredFile] = []
        freed = 0
        for file in unused:
            if freed >= excess + limit // 20:  # so that files are not deleted one by one
                break
            if _delete(file):
                freed += file.size
                deleted.append(file)
        for folder in {file.path.parent for file in deleted}:
            _remove_unused_folder(folder)
    if deleted:
        logger.info(
            "the feature cache reached its limit of %s (FAROUT_CACHE_LIMIT): deleted %d file(s), %s, that were not"
            " used since %s",
            format_size(limit),
            len(deleted),
            format_size(freed),
            datetime.fromtimestamp(max(file.last_used for file in deleted)).strftime("%Y-%m-%d %H:%M"),
        )
    if freed < excess:  # Windows does not delete a file that is open, and other users' files may be protected
        raise CacheFullError(_describe_full(root, limit))
    return size


def _describe_full(root: Path, limit: int) -> str:
    return (
        f"the feature cache {root / 'features'} has reached its limit of {format_size(limit)}, and all its files are in"
        " use; set FAROUT_CACHE_LIMIT to more"
    )


def _delete(file: _StoredFile) -> bool:
    """Delete a file unless it was used since it was found."""
    try:
        if file.path.stat().st_mtime == file.last_used:
            file.path.unlink()
            return True
    except OSError:  # another process deleted it, or another user owns it
        return False
    return False


def _remove_unused_folder(folder: Path) -> None:
    """Remove the folder of a kind of features without files, unless a process may be about to write the first one."""
    settings = folder / SETTINGS_FILE
    with suppress(OSError):
        written = settings.stat().st_mtime if settings.exists() else 0.0
        if not _find_files(folder) and time.time() - written > IN_USE_SECONDS:
            settings.unlink(missing_ok=True)
            folder.rmdir()  # fails if a file was written just now; its writer writes the settings again


@dataclass(frozen=True)
class CachedFeatureSet:
    """One kind of features in the cache.

    Attributes:
        folder: its folder.
        settings: what decides the features, as far as it is known.
        images: number of images; 0 if they cannot be read.
        mib: size in MiB.
        last_used: time of the last use, or None if there are no files.
        is_readable: False for features that another version of farout stored, which are not used any more.
    """

    folder: Path
    settings: dict[str, Any]
    images: int
    mib: float
    last_used: datetime | None
    is_readable: bool


def list_cached_features(root: Path | None = None) -> list[CachedFeatureSet]:
    """The contents of the cache, one entry per kind of features."""
    return [_describe_kind(folder, _find_files(folder)) for folder in _kind_folders(root or cache_folder())]


def _describe_kind(folder: Path, files: Sequence[_StoredFile]) -> CachedFeatureSet:
    try:
        settings = store.read_json(folder / SETTINGS_FILE)
    except (StoreError, OSError):
        settings = {}
    layout = settings.get("format", None if any(file.path.suffix == _OLD_SUFFIX for file in files) else FORMAT)
    return CachedFeatureSet(
        folder,
        settings,
        images=sum(count_rows(file.path) for file in files if file.path.suffix == SUFFIX),
        mib=sum(file.size for file in files) / 2**20,
        last_used=datetime.fromtimestamp(max(file.last_used for file in files)) if files else None,
        is_readable=layout == FORMAT,
    )


def clear_cache(
    name: str | None = None, root: Path | None = None, unused_days: float | None = None
) -> list[CachedFeatureSet]:
    """Remove one kind of features by the name of its folder, or all; returns what was removed.

    Args:
        name: name of the folder.
        root: folder of the cache; None: `cache_folder()`.
        unused_days: remove only files that were not used for this number of days.

    Raises:
        StoreError: for an unknown name, or a negative number of days.
    """
    if unused_days is not None and not unused_days >= 0:
        raise StoreError(f"unused_days is {unused_days}; expected a number of days, 0 or more")
    root = root or cache_folder()
    folders = [folder for folder in _kind_folders(root) if name in (None, folder.name)]
    if name is not None and not folders:
        raise StoreError(f"the cache in {root} has no features {name!r}; see `farout features list`")
    removed = []
    for folder in _all_folders(root) if name is None and unused_days is None else ():
        if folder not in folders:
            shutil.rmtree(folder)
    for folder in folders:
        files = _find_files(folder)
        if unused_days is None:
            removed.append(_describe_kind(folder, files))
            shutil.rmtree(folder)
            continue
        files = [file for file in files if file.last_used < time.time() - unused_days * _DAY]
        if files:
            removed.append(_describe_kind(folder, files))
            for file in files:
                _delete(file)
            _remove_unused_folder(folder)
    return removed
