"""Readers of paths and URLs: folders, globs, archives, tables, array files and single images."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

from farout.core.errors import SourceError
from farout.core.names import find_path
from farout.core.remote_files import FilePath, RemotePath
from farout.data.archives import is_archive_name, list_archive_file
from farout.data.array_files import ARRAY_SUFFIXES, list_array_file
from farout.data.file_listing import Listing
from farout.data.file_names import is_image_name
from farout.data.folders import list_folder, list_glob, list_image_file
from farout.data.image_lists import LIST_SUFFIXES, list_image_table
from farout.data.parquet_files import list_parquet
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.data.source_spec import BRACES, NO_SELECTION, Selection, has_wildcards

__all__ = ["list_path", "list_url"]


def list_path(location: str, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION) -> Listing:
    """List a folder, a glob, an archive, a table, an array file or one image.

    Raises SourceError if it does not exist, cannot be read, or contains no images.
    """
    path = find_path(location)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if has_wildcards(location):
            return list_glob(str(path), reading, selection)
        if os.path.islink(path):
            raise SourceError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise SourceError(f"{location!r} is neither an existing path nor a named set (`farout list sets`)") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{location!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        return list_folder(path, reading, selection)
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path} is a named pipe, a socket or a device; expected a folder or a regular file")
    return _list_file(path, reading, selection)


def list_url(url: str, reading: ReadSettings = DEFAULT_READING, selection: Selection = NO_SELECTION) -> Listing:
    """List what `list_path` lists, on an object store; or a file on a web server, which has no folders.

    Raises:
        SourceError: it does not exist, cannot be listed or read, or contains no images.
        MissingExtraError: the library of the store is not installed.
    """
    path = RemotePath.parse(url)
    if path.is_web:
        return list_glob(url, reading, selection) if BRACES.search(url) else _list_file(path, reading, selection)
    try:
        kind = path.find_kind()
        if kind is None and selection.split and RemotePath(f"{path}:{selection.split}").exists():  # a name with a colon
            return list_url(f"{path}:{selection.split}", reading, replace(selection, split=""))
    except OSError as error:
        if not has_wildcards(url):  # which no name of a bucket may contain, for example
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
        kind = None
    if kind is None and has_wildcards(url):
        return list_glob(url, reading, selection)
    if kind is None:
        raise SourceError(f"there is no file {path}, and no file below it; check the bucket and the prefix")
    return _list_file(path, reading, selection) if kind == "file" else list_folder(path, reading, selection)


def _list_file(path: FilePath, reading: ReadSettings, selection: Selection) -> Listing:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        selection.check_used("column", "label", where=str(path), kind="one parquet file")
        return list_parquet(path, reading, selection)
    if suffix in LIST_SUFFIXES:
        return list_image_table(path, reading, selection)
    if suffix in ARRAY_SUFFIXES:
        return list_array_file(path, reading, selection)
    if is_archive_name(path.name):
        selection.check_used(where=str(path), kind="an archive")
        return list_archive_file(path, reading)
    if is_image_name(path.name):
        selection.check_used(where=str(path), kind="an image file")
        return list_image_file(path, reading)
    if isinstance(path, RemotePath) and path.is_web:
        raise SourceError(
            f"{path} is not the address of a file that farout reads; a web server has no folders: give a URL that ends "
            "in .parquet, .csv, .npz, .zip, .tar or the suffix of an image, or several as in shard-{000..009}.tar"
        )
    raise SourceError(
        f"{path} is not an image source; expected a folder, .parquet, .csv, .tsv, .jsonl, .txt, .npz, .npy, "
        ".zip, .tar, or an image file"
    )
