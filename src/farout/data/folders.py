"""Readers of folders and globs of image files. An image file is read when the image is accessed.

Every file that is not hidden is listed as an image, listed with the reason why it cannot be read, or counted in
`Listing.left_out`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from farout.core.errors import SourceError
from farout.core.names import encode_file_name, normalize_name
from farout.core.remote_files import FilePath, RemotePath
from farout.core.store import kind_of, read_json
from farout.data.archives import is_archive_name, list_archives
from farout.data.file_listing import Listing
from farout.data.file_names import (
    count_by_suffix,
    encode_inner_path,
    find_system_folder,
    is_image_name,
    join_counts,
    limit_descriptions,
    suffix_of,
)
from farout.data.folder_layout import (
    class_labels_of,
    describe_splits,
    describe_splits_of_archives,
    find_masks,
    parent_folders_of,
)
from farout.data.folder_scan import FoundFiles, match_glob, scan_folder, split_pattern
from farout.data.image_files import list_image_files
from farout.data.image_lists import find_metadata, list_image_table
from farout.data.parquet_files import choose_shards, list_parquet
from farout.data.read_settings import ReadSettings
from farout.data.source_spec import NO_SELECTION, Selection

__all__ = ["CLASSES_FILE", "list_folder", "list_glob", "list_image_file"]

CLASSES_FILE = "farout-classes.json"
"""JSON file next to the class folders that maps folders to classes, for class names that no folder can have."""


def list_image_file(path: FilePath, reading: ReadSettings) -> Listing:
    """List one image file; its key is its name."""
    key = encode_file_name(path.name) if isinstance(path, Path) else encode_inner_path(path.name)
    return list_image_files([key], [path], reading, str(path.parent), groups=["."])


def list_folder(root: FilePath, reading: ReadSettings, selection: Selection = NO_SELECTION) -> Listing:
    """List the images below a folder, with the class folders as labels.

    Of a folder that farout has written, only its `images/` are listed: it also contains figures. Folders of masks of a
    data set for segmentation, such as `ground_truth/` next to `test/`, are left out and counted. The images are those
    of `metadata.csv` or `metadata.jsonl`, with its labels, if there is one with a column `file_name`. A folder without
    images that contains archives, or the parquet files of one set, is listed as they are.

    Raises SourceError if there are no images, or the folder cannot be read.
    """
    is_written_by_farout = kind_of(root) is not None
    root = root / "images" if is_written_by_farout and _is_folder(root / "images") else root
    scan = scan_folder(root)
    images = [path for path in scan.files if is_image_name(path)]
    others = [path for path in scan.files if not is_image_name(path)]
    if not images and not scan.problems:
        tables = [path for path in others if suffix_of(path) == ".parquet" and scan.is_file(path)]
        if tables and not is_written_by_farout:
            left_out = limit_descriptions(scan.left_out + count_by_suffix(set(others) - set(tables)))
            shards = [scan.locate(path) for path in choose_shards(str(root), tables, selection.split)]
            return list_parquet(shards, reading, selection, left_out, str(root))
        selection.check_used(where=str(root), kind="a folder without parquet files")
        archives = {path: scan.locate(path) for path in others if is_archive_name(path) and scan.is_file(path)}
        left_out = scan.left_out + count_by_suffix(set(others) - set(archives))
        if archives:
            listing = list_archives(root, archives, reading, left_out)
            return replace(listing, splits=describe_splits_of_archives([*archives], str(root)) or listing.splits)
        counts = join_counts(limit_descriptions(left_out))
        raise SourceError(
            f"the folder {root} contains no images; "
            + (f"it contains {counts}" if counts else "it is empty, or all its files are hidden")
        )
    metadata = find_metadata(root, others)
    kind = "a folder of image files" if metadata is None else f"a folder of image files with {metadata}"
    selection.check_used(*(["label"] if metadata else []), where=str(root), kind=kind)
    splits, masks = describe_splits(images, str(root)), find_masks(images)
    left_out = scan.left_out + Counter(masks.values())
    images = [path for path in images if path not in masks]
    paths = [*images, *scan.problems]
    # a folder that cannot be entered belongs to the class that contains it, or is one
    depth = images[0].count("/") if images else 1
    classed = [*images, *("/".join(path.split("/")[:-1][:depth]) + "/" for path in scan.problems)]
    codes, class_names = class_labels_of(classed)
    if class_names is not None and CLASSES_FILE in others and scan.is_file(CLASSES_FILE):
        class_names = _read_class_names(root, class_names)
        others = [path for path in others if path != CLASSES_FILE]
    if not is_written_by_farout:  # else the others are its records
        left_out += count_by_suffix(path for path in others if path != metadata)
    listing = _list_files(
        scan,
        paths,
        scan.problems,
        left_out,
        reading,
        labels=None if codes is None else dict(zip(paths, codes)),
        class_names=class_names,
        splits=splits,
    )
    return listing if metadata is None else _select_by_metadata(listing, root / metadata, reading, selection)


def _is_folder(path: FilePath) -> bool:
    return path.find_kind() == "directory" if isinstance(path, RemotePath) else os.path.isdir(path)


def _select_by_metadata(listing: Listing, metadata: FilePath, reading: ReadSettings, selection: Selection) -> Listing:
    """Return the images of a folder that its table of metadata lists, with the labels of the table.

    Listed files that do not exist are unreadable, images that are not listed are counted. If the table has no labels,
    the class folders give them.
    """
    table = list_image_table(metadata, reading, selection)
    listed = set(table.keys)
    folder_labels = dict(zip(listing.keys, listing.labels or ()))
    if table.labels is None and listed <= set(folder_labels):
        labels = tuple(folder_labels[key] for key in table.keys)
        table = replace(table, labels=labels, class_names=listing.class_names)
    unlisted = sum(key not in listed for key in listing.keys)
    left_out = limit_descriptions({**listing.left_out, f"image(s) that {metadata.name} does not list": unlisted})
    groups = table.groups or tuple(parent_folders_of(table.keys))
    return replace(table, groups=groups, left_out=left_out, splits=listing.splits)


def _list_files(
    found: FoundFiles,
    paths: Iterable[str],
    problems: Mapping[str, str],
    left_out: Mapping[str, int],
    reading: ReadSettings,
    *,
    labels: Mapping[str, int] | None = None,
    class_names: tuple[str, ...] | None = None,
    splits: str | None = None,
) -> Listing:
    """List the files `paths` among those found, in the order of their keys; `problems` and `labels` are by path."""
    encode = encode_inner_path if isinstance(found.root, RemotePath) else encode_file_name
    pairs = sorted((encode(path), path) for path in paths)
    keys, paths = tuple(key for key, _ in pairs), [path for _, path in pairs]
    return list_image_files(
        keys,
        [found.locate(path) for path in paths],
        reading,
        str(found.root),
        problems={key: problems[path] for key, path in pairs if path in problems},
        labels=None if labels is None else tuple(labels[path] for path in paths),
        class_names=class_names,
        groups=tuple(map(encode, parent_folders_of(paths))),
        left_out=limit_descriptions(left_out),
        splits=splits,
    )


def _read_class_names(root: FilePath, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class of each folder: from `CLASSES_FILE`, otherwise the name of the folder."""
    path = root / CLASSES_FILE
    classes = read_json(path)
    if not all(isinstance(name, str) for name in classes.values()):
        raise SourceError(f"{path} must contain a class name for each folder; correct or remove it")
    return tuple(normalize_name(classes.get(folder, folder)) for folder in folders)


def list_glob(pattern: str, reading: ReadSettings, selection: Selection = NO_SELECTION) -> Listing:
    """List what a glob matches: images, or else parquet files of one set, or else archives.

    `{000..003}` and `{a,b}` in braces are expanded.

    Raises SourceError if nothing of that kind matches.
    """
    root, rest = split_pattern(pattern)
    matches = match_glob(root, rest)
    left_out: Counter[str] = matches.left_out
    given = frozenset(rest.split("/"))
    files = []
    for path in matches.files:
        system_folder = find_system_folder(path)
        if system_folder is None or system_folder in given:
            files.append(path)
        else:
            left_out[f"in {system_folder}"] += 1
    if matches.folders and "**" not in given:
        left_out[f"folder(s) (give '{pattern}/**/*' to list their images)"] += matches.folders
    images = [path for path in files if is_image_name(path)]
    if not images and not matches.problems:
        tables = [path for path in files if suffix_of(path) == ".parquet" and matches.is_file(path)]
        if tables:
            left_out += count_by_suffix(set(files) - set(tables))
            paths = [matches.locate(path) for path in tables]
            return list_parquet(paths, reading, selection, limit_descriptions(left_out), pattern)
        selection.check_used(where=pattern, kind="a glob without parquet files")
        archives = {path: matches.locate(path) for path in files if is_archive_name(path) and matches.is_file(path)}
        left_out += count_by_suffix(set(files) - set(archives))
        if archives:
            return list_archives(root, archives, reading, left_out)
        counts = join_counts(limit_descriptions(left_out))
        found = f"matches no images, but {counts}" if counts else "matches nothing"
        hint = "; write [[] for a bracket that belongs to a name" if "[" in pattern else ""
        raise SourceError(f"the glob {pattern} {found}{hint}")
    selection.check_used(where=pattern, kind="a glob of image files")
    left_out += count_by_suffix(path for path in files if not is_image_name(path))
    return _list_files(matches, [*images, *matches.problems], matches.problems, left_out, reading)
