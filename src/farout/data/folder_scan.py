"""Walking through folders: links are followed without loops, and what cannot be entered is reported, not skipped.

On an object store, all names below a prefix are listed at once; the same names are hidden, counted or matched.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from farout.core import store
from farout.core.errors import SourceError
from farout.core.remote_files import FilePath, RemotePath, is_url
from farout.data.file_names import is_hidden, is_image_name, is_system_folder, suffix_of
from farout.data.source_spec import BRACES, WILDCARDS, has_wildcards

__all__ = ["FolderScan", "FoundFiles", "GlobMatches", "expand_braces", "match_glob", "scan_folder", "split_pattern"]

_MAX_BRACE_PATTERNS = 100_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass
class FoundFiles:
    """Files below a folder; paths are relative to it, with `/`.

    Attributes:
        root: the folder.
        sizes: the size of each file on an object store; empty on this machine.
    """

    root: FilePath
    sizes: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def locate(self, path: str) -> FilePath:
        """Return the whole path of a file."""
        file = self.root / path
        return file.with_size(self.sizes[path]) if isinstance(file, RemotePath) and path in self.sizes else file

    def is_file(self, path: str) -> bool:
        """Whether a path is a file that can be opened, rather than a pipe or a broken link."""
        return isinstance(self.root, RemotePath) or os.path.isfile(self.root / path)


@dataclass
class FolderScan(FoundFiles):
    """What a folder and its subfolders contain; paths are relative to it, with `/`.

    Attributes:
        files: files, in the order of the folders; hidden ones are left out.
        folders: the folder itself (an empty path) and its subfolders that were entered.
        problems: why an image file cannot be read or a folder cannot be entered; the path of a folder ends with `/`.
        left_out: what was not entered: description and number.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def scan_folder(root: FilePath) -> FolderScan:
    """List the files below `root`; raises SourceError if the folder itself cannot be read.

    Hidden files and folders are left out. System folders, such as `@eaDir`, and folders that farout wrote, such as
    results of an earlier score, are not entered, and their files are counted. A link to a folder is followed, unless
    the folder is listed under its own name, was reached through another link, or contains the link: no folder is listed
    twice, and loops end.
    """
    if isinstance(root, RemotePath):
        return _scan_store(root)
    scan = FolderScan(root)
    start = os.path.realpath(root)
    entered = {start}
    waiting = [("", start)]
    links: list[tuple[str, str, str]] = []  # path of the link, its target, the folder that contains it
    while waiting or links:
        if not waiting:  # links come last, so that a folder is listed under its own name
            links.sort(reverse=True)
            path, target, container = links.pop()
            if target in entered or _contains(target, container) or _contains(target, start):
                scan.left_out["link(s) to folders that are listed already"] += 1
                continue
            entered.add(target)
            waiting.append((path, target))
        path, real = waiting.pop()
        try:
            with os.scandir(real) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as error:
            if not path:
                raise SourceError(f"the folder {root} cannot be read: {error.strerror or error}") from error
            scan.problems[f"{path}/"] = f"the folder cannot be read: {error.strerror or error}"
            continue
        if path and _is_result(real, {entry.name for entry in entries}):
            _count_files(scan, real, f"in {os.path.basename(path)} (written by farout)")
            continue
        scan.folders.append(path)
        for entry in entries:
            if is_hidden(entry.name):
                continue
            entry_path = f"{path}/{entry.name}" if path else entry.name
            try:
                is_folder = entry.is_dir()
                if not is_folder and entry.is_symlink():
                    entry.stat()
            except OSError as error:
                _add_problem(scan, entry, entry_path, error)
                continue
            if not is_folder:
                scan.files.append(entry_path)
            elif is_system_folder(entry.name):
                _count_files(scan, entry.path, f"in {entry.name}")
            elif entry.is_symlink():
                links.append((entry_path, os.path.realpath(entry.path), real))
            elif entry.path in entered:  # reached through a link before
                scan.left_out["link(s) to folders that are listed already"] += 1
            else:
                entered.add(entry.path)
                waiting.append((entry_path, entry.path))
    return scan


def _scan_store(root: RemotePath) -> FolderScan:
    """As `scan_folder`, for a prefix of an object store."""
    return _scan_names(root, _list_names(root))


def _scan_names(root: RemotePath, sizes: Mapping[str, int]) -> FolderScan:
    """As `scan_folder`, for the files of these names below a prefix."""
    marked = {path.rpartition("/")[0] for path in sizes if path.rpartition("/")[2] in _RESULT_FILES} - {""}
    contents: dict[str, set[str]] = {folder: set() for folder in marked}
    for path in sizes if marked else ():
        for position in (position for position, sign in enumerate(path) if sign == "/"):
            if path[:position] in contents:
                contents[path[:position]].add(path[position + 1 :].partition("/")[0])
    results = {folder for folder, names in contents.items() if _is_result(root / folder, names)}
    scan = FolderScan(root, sizes=sizes)
    for path in sizes:
        *folders, name = path.split("/")
        closed = ""  # why the folder is not entered
        for depth, folder in enumerate(folders):
            if is_hidden(folder) or (closed and folder.startswith(".")):
                break
            if not closed and is_system_folder(folder):
                closed = f"in {folder}"
            elif not closed and "/".join(folders[: depth + 1]) in results:
                closed = f"in {folder} (written by farout)"
        else:
            if not is_hidden(name) and closed:
                scan.left_out[closed] += 1
            elif not is_hidden(name):
                scan.files.append(path)
    return scan


def _list_names(root: RemotePath) -> dict[str, int]:
    try:
        return root.list_files()
    except OSError as error:
        raise SourceError(f"{root} cannot be listed: {error.strerror or error}") from error


def _contains(folder: str, other: str) -> bool:
    return other == folder or other.startswith(folder.rstrip("/") + "/")


def _add_problem(scan: FolderScan, entry: os.DirEntry[str], path: str, error: OSError) -> None:
    """Report a broken link, or an entry whose kind cannot be determined.

    It is an image if its name says so, and a folder if it has no suffix; files of other kinds are only counted.
    """
    reason = error.strerror or str(error)
    if entry.is_symlink():
        reason = f"a link to {os.readlink(entry.path)}, which cannot be followed: {reason}"
    if is_image_name(entry.name):
        scan.problems[path] = reason
    elif not suffix_of(entry.name):
        scan.problems[f"{path}/"] = reason
    else:
        scan.files.append(path)


_RESULT_FILES = frozenset({"farout-jobs.json", "settings.json", "config.json"})


def _is_result(folder: str | RemotePath, names: Collection[str]) -> bool:
    """Whether farout wrote the folder: a model, detector, generated images, scores, a benchmark or a chain."""
    if "farout-jobs.json" in names or ("settings.json" in names and {"parts", "manifest.json"} & set(names)):
        return True
    return "config.json" in names and store.kind_of(folder) is not None


def _count_files(scan: FolderScan, folder: str, description: str) -> None:
    """Count the files of a folder that is not entered."""
    count = 0
    unreadable: list[OSError] = []
    for _, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not is_hidden(name)]
        count += sum(not is_hidden(name) for name in files)
    if count:
        scan.left_out[description] += count
    if unreadable:
        scan.left_out[f"{description} (cannot be read)"] += len(unreadable)


@dataclass
class GlobMatches(FoundFiles):
    """What a pattern matches; paths are relative to the root of the pattern.

    Attributes:
        files: matching files, sorted.
        folders: number of matching folders.
        problems: as in `FolderScan`.
        left_out: as in `FolderScan`.
    """

    files: list[str]
    folders: int
    problems: dict[str, str]
    left_out: Counter[str]


def split_pattern(pattern: str) -> tuple[FilePath, str]:
    """Split a pattern into the folder that contains all matches and the rest of the pattern.

    What exists as a path is a path: in `set[1]/*.png`, an existing folder `set[1]` is meant, not `set1`.

    Raises SourceError for a URL with a wildcard in the name of the bucket.
    """
    if is_url(pattern):
        return _split_url_pattern(RemotePath.parse(pattern))
    parts = Path(pattern).parts
    for count, part in enumerate(parts):
        if has_wildcards(part) and not os.path.lexists(Path(*parts[: count + 1])):
            return Path(*parts[:count]), "/".join(parts[count:])
    return Path(*parts[:-1]), parts[-1]


def _split_url_pattern(path: RemotePath) -> tuple[RemotePath, str]:
    scheme, _, rest = path.url.partition("://")
    parts = rest.split("/")
    is_pattern = BRACES.search if path.is_web else has_wildcards  # a query of a web server begins with ?
    first = next((number for number, part in enumerate(parts) if is_pattern(part)), len(parts) - 1)
    if first == 0:
        raise SourceError(f"{path} has a wildcard in the name of the bucket or host; give one of them")
    return RemotePath(f"{scheme}://{'/'.join(parts[:first])}"), "/".join(parts[first:])


def match_glob(root: FilePath, pattern: str) -> GlobMatches:
    """Find what a pattern below `root` matches: `*`, `?`, `[a-c]`, `**` for any subfolders, and braces.

    A wildcard does not match a hidden name. Brackets that match nothing as a wildcard are taken literally.

    Raises:
        SourceError: a path of a pattern with braces does not exist, or there are too many.
    """
    if isinstance(root, RemotePath) and root.is_web:
        return GlobMatches(root, expand_braces(pattern), 0, {}, Counter())
    matches: _Matcher | _StoreMatcher = _StoreMatcher(root) if isinstance(root, RemotePath) else _Matcher(root)
    for expanded in expand_braces(re.sub(r"\*\*/(?:\*\*/)+", "**/", pattern)):
        before = len(matches.found) + len(matches.problems)
        matches.add("", tuple(expanded.split("/")))
        if before == len(matches.found) + len(matches.problems) and "[" in expanded:
            matches.add("", tuple(expanded.replace("[", "[[]").split("/")))
        is_missing = before == len(matches.found) + len(matches.problems)
        if is_missing and expanded != pattern and not has_wildcards(expanded):
            raise SourceError(f"{root / expanded}, which is part of {root / pattern}, does not exist")
    if isinstance(matches, _StoreMatcher):
        sizes = {path: size for path, size in sorted(matches.found.items()) if size is not None}
        return GlobMatches(root, [*sizes], len(matches.found) - len(sizes), {}, matches.left_out, sizes=sizes)
    files = sorted(path for path in matches.found if not os.path.isdir(matches.root / path))
    return GlobMatches(root, files, len(matches.found) - len(files), matches.problems, matches.left_out)


class _Matcher:
    """Collects the paths below a root that match patterns; a folder that cannot be read is a problem."""

    def __init__(self, root: Path) -> None:
        self.root, self._done = root, set[tuple[str, tuple[str, ...]]]()
        self.found: set[str] = set()
        self.problems: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, folder: str, parts: tuple[str, ...]) -> None:
        """Find what matches the components of a pattern below `folder`."""
        if (folder, parts) in self._done:  # a pattern with several ** finds a path several times
            return
        self._done.add((folder, parts))
        part, rest = parts[0], parts[1:]
        if part == "**":
            scan = scan_folder(self.root / folder)
            self.problems |= {_join(folder, path): reason for path, reason in scan.problems.items()}
            self.left_out += scan.left_out
            if not rest:
                self.found |= {_join(folder, path) for path in scan.files}
                return
            for subfolder in scan.folders:
                self.add(_join(folder, subfolder), rest)
            return
        for name in self._matching_names(folder, part):
            path = _join(folder, name)
            if not rest:
                self._add_match(path)
            elif os.path.isdir(self.root / path):
                self.add(path, rest)

    def _matching_names(self, folder: str, part: str) -> Iterator[str]:
        if not WILDCARDS.search(part):
            if os.path.lexists(self.root / folder / part):
                yield part
            return
        try:
            names = os.listdir(self.root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if not folder:
                raise SourceError(f"the folder {self.root} cannot be read: {error.strerror or error}") from error
            self.problems[f"{folder}/"] = f"the folder cannot be read: {error.strerror or error}"
            return
        for name in names:
            if fnmatch.fnmatchcase(name, part) and not (name.startswith(".") and not part.startswith(".")):
                yield name

    def _add_match(self, path: str) -> None:
        full = self.root / path
        if os.path.islink(full) and not os.path.exists(full) and is_image_name(path):
            self.problems[path] = f"a link to {os.readlink(full)}, which cannot be followed"
        else:
            self.found.add(path)


class _StoreMatcher:
    """As `_Matcher`, on an object store: the names below a prefix are listed once, then matched."""

    def __init__(self, root: RemotePath) -> None:
        self._root = root
        self._listed: dict[tuple[str, bool], Mapping[str, int | None]] = {}
        self._counted: set[str] = set()
        self.found: dict[str, int | None] = {}  # sizes; None: a folder
        self.problems: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, folder: str, parts: tuple[str, ...]) -> None:
        """Find what matches the components of a pattern below `folder`."""
        while len(parts) > 1 and not WILDCARDS.search(parts[0]):
            folder, parts = _join(folder, parts[0]), parts[1:]
        if "**" in parts:
            self._add_below(folder, parts[: parts.index("**")], parts[parts.index("**") :])
            return
        for path, size in self._list(folder, below=len(parts) > 1).items():
            names = path.split("/")
            if _matches(names[: len(parts)], parts):
                self.found[_join(folder, "/".join(names[: len(parts)]))] = size if len(names) == len(parts) else None

    def _add_below(self, folder: str, before: tuple[str, ...], parts: tuple[str, ...]) -> None:
        """Find what matches `parts`, which begin with `**`, in the folders that match `before`."""
        sizes_of: dict[str, dict[str, int]] = {}
        for path, size in self._list(folder, below=True).items():
            names = path.split("/")
            if size is not None and len(names) > len(before) and _matches(names[: len(before)], before):
                start = _join(folder, "/".join(names[: len(before)]))
                sizes_of.setdefault(start, {})["/".join(names[len(before) :])] = size
        for start, sizes in sizes_of.items():
            scan = _scan_names(self._root / start, sizes)
            if start not in self._counted:  # several patterns of braces may search the same folder
                self._counted.add(start)
                self.left_out += scan.left_out
            self.found |= {_join(start, path): sizes[path] for path in scan.files if _matches(path.split("/"), parts)}

    def _list(self, folder: str, *, below: bool) -> Mapping[str, int | None]:
        if (folder, below) not in self._listed:
            try:
                path = self._root / folder
                self._listed[folder, below] = path.list_files() if below else path.list_entries()
            except OSError as error:
                raise SourceError(f"{path} cannot be listed: {error.strerror or error}") from error
        return self._listed[folder, below]


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the components of a path match those of a pattern."""
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return len(parts) == 1 or any(_matches(names[start:], parts[1:]) for start in range(len(names)))
    is_hidden_name = names[0].startswith(".") and not parts[0].startswith(".")
    return fnmatch.fnmatchcase(names[0], parts[0]) and not is_hidden_name and _matches(names[1:], parts[1:])


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern: `{000..003}` to numbers, `{a,b}` to alternatives."""
    patterns = [pattern]
    while match := BRACES.search(patterns[0]):
        inner = match[1]
        numbers = _RANGE.fullmatch(inner)
        if numbers is None and "," not in inner:
            raise SourceError(f"{{{inner}}} in {pattern} is not a range; expected numbers, such as {{000..123}}")
        choices = inner.split(",") if numbers is None else _expand_range(numbers[1], numbers[2], pattern)
        if len(choices) * len(patterns) > _MAX_BRACE_PATTERNS:
            raise SourceError(f"{pattern} expands to more than {_MAX_BRACE_PATTERNS} paths; give a glob")
        patterns = [text.replace(match[0], choice, 1) for text in patterns for choice in choices]
    return patterns


def _expand_range(first: str, last: str, pattern: str) -> list[str]:
    start, end = int(first), int(last)
    if abs(end - start) >= _MAX_BRACE_PATTERNS:
        raise SourceError(f"{pattern} expands to more than {_MAX_BRACE_PATTERNS} paths; give a glob")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if end >= start else -1
    return [f"{number:0{width}d}" for number in range(start, end + step, step)]
