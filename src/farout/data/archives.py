"""Readers of zip files and tar archives, webdataset shards included. Members are read one by one, never extracted.

The name of a member is only a key: it may be absolute or contain `..`, and no file of that name is ever opened.
"""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, Self

from farout.core.errors import SourceError, UnreadableImageError
from farout.core.files import map_files, open_at
from farout.core.remote_files import FilePath
from farout.data.columns import LABEL_COLUMNS, find_columns
from farout.data.file_listing import Listing, encode_labels
from farout.data.file_names import (
    count_by_suffix,
    encode_inner_path,
    find_system_folder,
    is_hidden,
    is_image_name,
    join_counts,
    limit_descriptions,
    suffix_of,
)
from farout.data.folder_layout import class_labels_of, describe_splits, find_masks, parent_folders_of
from farout.data.image_files import EncodedImageReader, count_frames_if_readable, expand_frames
from farout.data.read_settings import ReadSettings

__all__ = ["is_archive_name", "list_archive_file", "list_archives"]

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_PROGRAMS = {b"\x1f\x8b": "gunzip -k", b"BZh": "bunzip2 -k", b"\xfd7zXZ": "unxz -k", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files -> the command that decompresses them."""
_LABEL_SUFFIXES = ("cls", "class", "label")
_MAX_LABEL_BYTES = 2**20
_TAR_BLOCK = 512
_ZIP_HEADER = 30


@dataclass(frozen=True)
class _Member:
    """A file in an archive.

    Attributes:
        name: name with `/`, without `./`.
        size: number of bytes according to the header.
        start: start of the data in a tar archive.
        entry: entry of a zip file.
        problem: why the member cannot be read, or empty.
    """

    name: str
    size: int
    start: int = 0
    entry: zipfile.ZipInfo | None = None
    problem: str = ""


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is taken for a zip file or a tar archive."""
    return suffix_of(name) in (".zip", ".tar") or name.lower().endswith(_COMPRESSED_TARS)


def list_archive_file(path: FilePath, reading: ReadSettings) -> Listing:
    """List the images of one archive; the keys are the names of the members. Raises SourceError as `list_archives`."""
    return _list_members([path], [""], reading, {}, str(path))


def list_archives(
    root: FilePath, archives: Mapping[str, FilePath], reading: ReadSettings, left_out: Mapping[str, int]
) -> Listing:
    """List the images of several archives, such as the shards of a set; the keys begin with the name of the archive.

    Args:
        root: folder of the archives.
        archives: the archives by their path relative to it.
        reading: limits; `max_bytes` holds for each member.
        left_out: what is next to the archives and was counted.

    Raises:
        SourceError: an archive is damaged, truncated, encrypted or compressed as a whole, or there are no images.
    """
    names = sorted(archives)
    where = str(root / names[0]) if len(names) == 1 else f"{root} ({len(names)} archives)"
    return _list_members([archives[name] for name in names], [f"{name}/" for name in names], reading, left_out, where)


def _list_members(
    paths: Sequence[FilePath], prefixes: Sequence[str], reading: ReadSettings, left_out: Mapping[str, int], where: str
) -> Listing:
    counts = Counter(left_out)
    rows: list[tuple[str, str, str, FilePath, _Member, Any]] = []  # key, group, name, archive, member, label
    layout: set[str] = set()
    for path, prefix, listed_members in zip(paths, prefixes, map_files(_list_archive, paths)):
        members = _choose_members(listed_members, counts)
        images = [name for name in members if is_image_name(name)]
        labels, label_files = _read_labels(path, members, images)
        others = members.keys() - images - label_files
        masks = find_masks(images)
        layout.update(images)
        counts.update(count_by_suffix(others))
        counts.update(masks.values())
        for name, group in zip(images, parent_folders_of(images)):
            if name not in masks:
                key, group = encode_inner_path(prefix + name), (prefix + group).removesuffix("/.")
                rows.append((key, encode_inner_path(group), name, path, members[name], labels.get(name)))
    if not rows:
        found = join_counts(limit_descriptions(counts)) or "nothing"
        is_nested = any(is_archive_name(f"x{what}") for what in counts)
        hint = "; archives in archives are not read, extract the outer one" if is_nested else ""
        raise SourceError(f"{where} contains no images, but {found}{hint}")
    rows.sort(key=lambda row: row[0])
    keys, groups, names, archives, listed, values = zip(*rows)
    codes: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    if any(value is not None for value in values):
        codes, classes = encode_labels(values, where)
    else:
        codes, classes = class_labels_of(names)
    splits = describe_splits(layout, where)
    frames: Sequence[int] | None = None
    if reading.frames == "all":
        frame_counts = [
            count_frames_if_readable(member.name, partial(_read_member, path, member, reading.max_bytes), reading)
            for path, member in zip(archives, listed)
        ]
        keys, frame_groups, indices, frames = expand_frames(keys, groups, frame_counts, where)
        groups = tuple(frame_groups or ())
        codes = None if codes is None else tuple(codes[index] for index in indices)
        archives, listed = tuple(archives[index] for index in indices), tuple(listed[index] for index in indices)
    reader = _MemberReader(keys, archives, listed, reading, frames)
    return Listing(keys, reader, codes, classes, groups, left_out=limit_descriptions(counts), splits=splits)


class _MemberReader(EncodedImageReader):
    """Reads images in archives by index."""

    def __init__(
        self,
        keys: Sequence[str],
        archives: Sequence[FilePath],
        members: Sequence[_Member],
        reading: ReadSettings,
        frames: Sequence[int] | None,
    ) -> None:
        super().__init__(keys, reading, frames)
        self._archives, self._members = tuple(archives), tuple(members)

    def select(self, indices: Sequence[int]) -> Self:
        selected = super().select(indices)
        selected._archives = tuple(self._archives[i] for i in indices)
        selected._members = tuple(self._members[i] for i in indices)
        return selected

    def read_encoded(self, index: int) -> tuple[bytes, str]:
        member = self._members[index]
        return _read_member(self._archives[index], member, self.reading.max_bytes), suffix_of(member.name)


def _read_member(path: FilePath, member: _Member, limit: int) -> bytes:
    """Return the content of a member; raises UnreadableImageError, or what the decompression raises."""
    _check_member(member, limit)
    if member.entry is None:
        with open_at(path, member.start, member.size) as file:
            return _read_from(file, member)
    # the name and the additional fields in front of the data are those of the entry, or a little longer
    entry = member.entry
    in_front = _ZIP_HEADER + len(entry.filename.encode("utf-8", "surrogatepass")) + len(entry.extra) + 256
    with open_at(path, entry.header_offset, in_front + entry.compress_size) as file:
        return _read_from(file, member)


def _check_member(member: _Member, limit: int) -> None:
    if member.problem:
        raise UnreadableImageError(member.problem)
    if member.size > limit:
        raise UnreadableImageError(f"the member has {member.size} bytes, and the limit is {limit} (--max-bytes)")


def _read_from(file: BinaryIO, member: _Member) -> bytes:
    """Return the content of a member of an open archive."""
    if member.entry is None:
        file.seek(member.start)
        data = file.read(member.size)
    else:
        file.seek(member.entry.header_offset)
        header = file.read(_ZIP_HEADER)
        if header[:4] != b"PK\x03\x04":
            raise UnreadableImageError("the archive is damaged: there is no member at its position")
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        with zipfile.ZipExtFile(file, "r", member.entry) as content:
            data = content.read(member.size + 1)
    if len(data) != member.size:
        raise UnreadableImageError(f"the member has {len(data)} bytes, its header says {member.size}")
    return data


def _list_archive(path: FilePath) -> list[_Member]:
    """Return the files of an archive; raises SourceError."""
    return _list_zip(path) if _is_zip(path) else _list_tar(path)


def _choose_members(found: Iterable[_Member], left_out: Counter[str]) -> dict[str, _Member]:
    """Return the files of an archive by name; hidden ones are left out, those in system folders are counted.

    If several have the same name, the last one counts, as when the archive is extracted.
    """
    members: dict[str, _Member] = {}
    for member in found:
        system_folder = find_system_folder(member.name)
        if system_folder is not None:
            left_out[f"in {system_folder}"] += 1
        elif not any(is_hidden(part) for part in member.name.split("/") if part != ".."):
            left_out["replaced by a later member of the same name"] += member.name in members
            members[member.name] = member
    return members


def _is_zip(path: FilePath) -> bool:
    """Whether an archive is a zip file rather than a tar archive: by its first bytes, otherwise by its suffix."""
    try:
        with open_at(path, 0, _TAR_BLOCK) as file:
            head = file.read(_TAR_BLOCK)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    is_tar = head[257:262] == b"ustar"
    return not is_tar and (head.startswith(b"PK") or suffix_of(path.name) == ".zip")


def _clean_name(name: str) -> str:
    """Return the name of a member without `./` and repeated separators; `..` and a first `/` are kept."""
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


def _list_zip(path: FilePath) -> list[_Member]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    except Exception as error:
        raise SourceError(f"{path} cannot be read as a zip file ({error}); is it complete?") from error
    encrypted = sum(entry.flag_bits & 1 for entry in entries)
    if encrypted:
        raise SourceError(f"{path} is encrypted ({encrypted} of {len(entries)} files); give a copy without a password")
    members = []
    for entry in entries:
        name = entry.filename
        if entry.create_system == 0 and "/" not in name:  # written on Windows with its own separator
            name = name.replace("\\", "/")
        members.append(_Member(_clean_name(name), entry.file_size, entry=entry))
    return members


def _list_tar(path: FilePath) -> list[_Member]:
    members: dict[str, _Member] = {}
    listed: list[_Member] = []
    try:
        with path.open("rb") as file:
            head = file.read(6)
            program = next((program for magic, program in _PROGRAMS.items() if head.startswith(magic)), None)
            if program is not None:
                raise SourceError(
                    f"{path} is compressed as a whole, so that its images cannot be read one by one; decompress it to "
                    f"a .tar file ({program}), or extract it and give the folder"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                for entry in archive:
                    if entry.size < 0:  # from here on, tarfile would read the same headers again and again
                        raise SourceError(f"{path} is damaged: {entry.name} has {entry.size} bytes")
                    if not entry.isdir():
                        listed.append(_to_member(entry, members))
                        members[listed[-1].name] = listed[-1]
                end = archive.offset
            # tarfile takes a damaged header for the end of the archive
            file.seek(end)
            mark = file.read(_TAR_BLOCK)
            if mark.strip(b"\0") or len(mark) < _TAR_BLOCK:
                raise SourceError(f"{path} is incomplete or damaged at byte {end}; copy or download it again")
            while rest := file.read(2**20):
                if rest.strip(b"\0"):
                    raise SourceError(
                        f"{path} contains data after its end, perhaps a second archive; give two separate files"
                    )
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{path} cannot be read as a tar archive ({error}); is it complete?") from error
    return listed


def _to_member(entry: tarfile.TarInfo, members: Mapping[str, _Member]) -> _Member:
    """Convert an entry of a tar archive; `members` are those before it, to which it may be a link."""
    name = _clean_name(entry.name)
    if entry.issparse():
        return _Member(name, entry.size, problem="a sparse member, which is not supported; extract the archive")
    if entry.isreg():
        return _Member(name, entry.size, start=entry.offset_data)
    if entry.islnk() or entry.issym():
        folder = name.rpartition("/")[0] if entry.issym() else ""
        target = members.get(os.path.normpath(os.path.join(folder, entry.linkname)))
        if target is not None:
            return replace(target, name=name)
        return _Member(name, 0, problem=f"a link to {entry.linkname}, which is not in the archive before the link")
    return _Member(name, 0, problem="a special member, not a regular file")


def _read_labels(
    path: FilePath, members: Mapping[str, _Member], images: Collection[str]
) -> tuple[dict[str, Any], set[str]]:
    """Read the labels of webdataset samples: `key.cls`, or a field of `key.json`, next to `key.jpg`.

    Returns the label of each image by name, and the names of the members that were read.
    """
    label_files: dict[str, str] = {}
    tables: dict[str, str] = {}
    for name in members:
        sample, suffixes = _split_sample(name)
        if suffixes in _LABEL_SUFFIXES:
            label_files[sample] = name
        elif suffixes == "json":
            tables[sample] = name
    samples = {name: _split_sample(name)[0] for name in images}
    chosen = label_files if any(sample in label_files for sample in samples.values()) else tables
    files = {sample: chosen[sample] for sample in samples.values() if sample in chosen}
    if not files:
        return {}, set()
    with path.open("rb") as file:  # once: labels are small, and next to each other in large blocks
        labels = {
            sample: _read_label(path, file, members[name], is_table=chosen is tables) for sample, name in files.items()
        }
    if all(label is None for label in labels.values()):
        return {}, set()
    return {name: labels.get(sample) for name, sample in samples.items()}, set(files.values())


def _split_sample(name: str) -> tuple[str, str]:
    """Split a name at the first dot after the folder, as webdataset does: the key of the sample and its suffixes."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffixes = file.partition(".")
    return folder + slash + stem, suffixes.lower()


def _read_label(path: FilePath, file: BinaryIO, member: _Member, *, is_table: bool) -> Any:
    try:
        _check_member(member, _MAX_LABEL_BYTES)
        text = _read_from(file, member).decode("utf-8").strip()
        if not is_table:
            return text
        table = json.loads(text)
    except Exception as error:
        raise SourceError(f"{path}: the label in {member.name} cannot be read ({error})") from error
    if not isinstance(table, dict):
        return None
    fields = find_columns(list(table), LABEL_COLUMNS)
    return table[fields[0]] if fields else None
