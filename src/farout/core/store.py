"""Files and folders on disk: written to a temporary name, flushed and renamed, hashed, loaded without executing code.

A folder that `atomic_folder` writes contains `hashes.json`, the SHA-256 of every other file, which `check_hashes`
compares when the folder is loaded. Model cards (`README.md`) decide no score and may be edited.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from farout.core.errors import FaroutError, MissingExtraError, StoreError, WriteError
from farout.core.file_errors import write_errors
from farout.core.files import flush_file, flush_folder, hash_file, open_regular_file, read_file
from farout.core.interruption import defer_interruption
from farout.core.names import expand_path, is_utf8, printable
from farout.core.remote_files import FilePath, RemotePath

__all__ = [
    "HASHES_FILE",
    "atomic_file",
    "atomic_folder",
    "check_file",
    "check_hashes",
    "check_replaceable",
    "describe_damage",
    "explain_load_errors",
    "format_json",
    "hash_tensors",
    "kind_of",
    "load_tensors",
    "parse_json",
    "read_config",
    "read_hashes",
    "read_json",
    "read_sealed_json",
    "resume_config",
    "save_tensors",
    "seal_json",
    "unseal_json",
    "versions",
    "write_config",
    "write_folder_hashes",
    "write_hashes",
    "write_json",
    "write_sealed_json",
]

_COMMANDS = {"detector": "fit", "diffusion model": "train diffusion", "classifier": "train classifier"}
"""Command that writes a folder of a kind."""
FORMAT = 2
"""Version of the folder layout: 1 had no hashes of the files. Folders of another version are refused."""
HASHES_FILE = "hashes.json"
"""In a folder that is written at once: the SHA-256 of every other file."""
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 2**28, 100
_MAX_LIST_BYTES = 2**31
_UNHASHED = re.compile(r"README\.md|\..*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
"""Model cards, hidden files and what systems add by themselves: they decide no score and may come and go."""
_SEAL = "sha256"
_SHA256 = re.compile("[0-9a-f]{64}")


def _default_mode(folder: bool) -> int:
    """The permissions of new files and folders, which temporary ones do not have."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def _temporary_prefix(path: Path) -> str:
    """The beginning of temporary names; short, because the name itself may be as long as the file system allows."""
    return f".{path.name[:40]}."


@contextmanager
def atomic_file(path: str | Path, temporary: Path | None = None, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path` and rename it to `path` at the end; after an error nothing is left.

    Args:
        path: the file to write.
        temporary: the temporary path; with a fixed one, killed runs leave at most one file. None: a new name.
        flush: whether file and name are on disk before the end, so that they survive a power failure; for single images
            of many, which can be written again, this takes too long.

    Raises:
        WriteError: if the file cannot be written, for example because the disk is full.
    """
    path = expand_path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        working = temporary
        if working is None:
            handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), dir=path.parent)
            os.close(handle)
            working = Path(name)
        try:
            yield working
            if temporary is None:
                working.chmod(_default_mode(folder=False))
            if flush:
                flush_file(working)
            os.replace(working, path)
            if flush:
                flush_folder(path.parent)
        finally:
            working.unlink(missing_ok=True)


def check_replaceable(path: str | Path, kind: str) -> None:
    """Raise StoreError unless `path` does not exist, is an empty folder, or is a farout folder of that kind.

    Called before long work starts, so that no files are lost and no work is wasted.
    """
    path = expand_path(path)
    if "\0" in str(path):
        raise StoreError(f"{str(path)!r} is not the name of a folder: it contains a NUL character")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if kind_of(path) != kind:
        raise StoreError(f"{path} exists and is not a farout {kind}, so it is not replaced; give another folder")


@contextmanager
def atomic_folder(path: str | Path, kind: str | None) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and rename it to `path` at the end; after an error nothing is left.

    Args:
        path: the folder to write.
        kind: kind of the folder, for which `hashes.json` is written; None: write no hashes, and do not check what is
            replaced.

    Raises:
        StoreError: if `path` is something else than a folder of that kind.
        WriteError: if the folder cannot be written, for example because the disk is full.
    """
    path = Path(os.path.abspath(expand_path(path)))  # so that `.` has a name
    if kind is not None:
        check_replaceable(path, kind)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), dir=path.parent))
        try:
            yield temporary
            if kind is not None:
                write_folder_hashes(temporary)
            temporary.chmod(_default_mode(folder=True))
            for parent, _, names in os.walk(temporary):  # other libraries write some files without flushing them
                for name in names:
                    flush_file(Path(parent, name))
                flush_folder(parent)
            with defer_interruption():  # between two renames, neither the old nor the new folder is in place
                _replace_folder(path, temporary)
            flush_folder(path.parent)
        except WriteError as error:  # of a file in the temporary folder, whose name means nothing to the user
            if temporary not in Path(error.filename).parents:
                raise
            raise WriteError(path, error.strerror or str(error), error.errno, error.hint) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Rename folder `new` to `path`; an old folder is removed after that."""
    if not path.exists():
        os.replace(new, path)
        return
    old = new.with_name(f"{new.name}.old")  # Windows cannot rename a folder to an existing one
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:  # also Ctrl-C
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, atomically; values that JSON does not have, such as NaN, are an error."""
    text = format_json(content)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def format_json(content: Mapping[str, Any]) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(content, indent=2, allow_nan=False, sort_keys=False) + "\n"


def read_json(path: str | FilePath) -> dict[str, Any]:
    """Read a JSON object from a regular or remote file.

    Raises:
        StoreError: if the file is missing, cannot be read, or is not one JSON object in UTF-8; also for what Python's
            parser accepts or cannot handle: names that occur twice, NaN and infinite numbers, numbers of thousands of
            digits, deep nesting, and text that is not valid Unicode.
    """
    file = path if isinstance(path, RemotePath) else expand_path(path)
    return parse_json(path, _read_text(file, _MAX_JSON_BYTES))


def write_sealed_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """As `write_json`, with an additional last entry `sha256`: the hash of the others."""
    write_json(path, seal_json(content))


def read_sealed_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without the hash; raises StoreError if any entry was changed."""
    return unseal_json(read_json(path), path)


def seal_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with an additional last entry `sha256`: the hash of the others."""
    plain = json.loads(json.dumps(content, allow_nan=False))  # as it is read back
    return {**plain, _SEAL: _hash_json(plain)}


def unseal_json(content: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return sealed content without the hash; raises StoreError, which names `where`, if any entry was changed."""
    plain = {name: value for name, value in content.items() if name != _SEAL}
    if content.get(_SEAL) != _hash_json(plain):
        raise StoreError(f"{where} was changed: its SHA-256 is not the one that it contains")
    return plain


def _hash_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(format_json(content).encode()).hexdigest()


def _read_text(path: FilePath, limit: int) -> str:
    try:
        return read_file(path, limit).decode("utf-8")
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the folder is incomplete or is not one that farout wrote") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(where: object, text: str) -> dict[str, Any]:
    """Return the JSON object in a text; raises StoreError, which names `where`, as `read_json` does."""

    def refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {repeated!r:.100} occurs twice")
        return content

    def parse_number(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number:.100} is not finite")
        return value

    try:
        content = json.loads(
            text, object_pairs_hook=refuse_repeated_names, parse_float=parse_number, parse_constant=parse_number
        )
        _check_json_values(content)
    except RecursionError as error:
        raise StoreError(f"{where} is nested too deeply; expected at most {_MAX_JSON_DEPTH} levels") from error
    except ValueError as error:  # also JSONDecodeError, and the limit of Python on the digits of an integer
        raise StoreError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise StoreError(f"{where} contains a {type(content).__name__}, expected a JSON object")
    return content


def _check_json_values(content: Any) -> None:
    """Raise ValueError for text that cannot be a name or be written again, and RecursionError for deep nesting."""
    level: list[Any] = [content]
    for _ in range(_MAX_JSON_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
                raise ValueError(f"the text {ascii(value)[:100]} contains a NUL or half of a surrogate pair")
        level = inner
        if not level:
            return
    raise RecursionError


def _is_unicode(text: str) -> bool:
    return text.isascii() or text.isprintable() or not any("\ud800" <= character <= "\udfff" for character in text)


def write_hashes(path: str | Path, hashes: Collection[str]) -> None:
    """Write content hashes of images, sorted, one per line."""
    expand_path(path).write_text("".join(f"{line}\n" for line in sorted(hashes)), encoding="utf-8")


def read_hashes(path: str | Path) -> frozenset[str]:
    """Read content hashes. Raises StoreError if the file is missing, because seen images would count as unseen."""
    path = expand_path(path)
    if not os.path.lexists(path):
        raise StoreError(f"{path} is missing, which lists the images that were seen; the folder is incomplete")
    return frozenset(_read_text(path, _MAX_LIST_BYTES).split())


def write_folder_hashes(folder: str | Path) -> None:
    """Write `hashes.json`: the SHA-256 of every file in the folder.

    Of an inner folder that has `hashes.json` itself, only that file is listed, so that large files are hashed once.
    """
    folder = expand_path(folder)
    files = {name: hash_file(folder / name) for name in _list_hashed_files(folder)}
    write_json(folder / HASHES_FILE, {"algorithm": "sha256", "files": files})


def check_file(path: Path, sha256: str | None, advice: str = "") -> None:
    """Raise StoreError unless a file has the SHA-256 that was recorded when it was written.

    Args:
        path: the file.
        sha256: hexadecimal digits; None: there is no record of the file.
        advice: what to do, for the message.
    """
    advice = f"; {advice}" if advice else ""
    try:
        found = hash_file(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing{advice}") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}{advice}") from error
    if found != sha256:
        raise StoreError(f"{path} was changed after it was written: its SHA-256 is not the recorded one{advice}")


def check_hashes(folder: str | Path) -> None:
    """Compare the files of a folder with `hashes.json`.

    Files of an inner folder that has `hashes.json` itself are compared when that one is loaded.

    Raises StoreError that names the first file that is missing, was changed or was added.
    """
    folder = expand_path(folder)
    path = folder / HASHES_FILE
    text = _read_text(path, _MAX_JSON_BYTES)
    content = parse_json(path, text)
    files = content.get("files")
    if (
        content.get("algorithm") != "sha256"
        or not isinstance(files, dict)
        or not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in files.values())
        or text != format_json(content)
    ):
        raise StoreError(f"{path} was changed; {_RESTORE}")
    try:
        existing = set(_list_hashed_files(folder))
    except OSError as error:
        raise StoreError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    for name, expected in files.items():
        if name not in existing:
            what = "the weights " if name.endswith(".safetensors") else ""
            problem = "cannot be read" if os.path.lexists(folder / name) else "are missing" if what else "is missing"
            raise StoreError(f"{what}{folder / name} {problem}, the folder is incomplete; {_RESTORE}")
        check_file(folder / name, expected, _RESTORE)
    added = sorted(existing - files.keys())
    if added:
        raise StoreError(f"{folder / added[0]} was added to the folder after it was written; remove it")


_RESTORE = "restore the folder from a copy, or write it again"


@contextmanager
def explain_load_errors(folder: str | Path) -> Iterator[None]:
    """Convert what is raised when content does not fit together to StoreError; a missing extra stays what it is.

    Hashes find what was changed by accident. Content that was written with other hashes still must not end a program.
    """
    try:
        yield
    except (StoreError, MissingExtraError):
        raise
    except FaroutError as error:
        raise StoreError(f"{folder} cannot be loaded: {error}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise StoreError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}; {_RESTORE}") from error


def describe_damage(folder: str | Path) -> str:
    """How the files of a folder with `hashes.json` differ from what was written, inner folders included; "" if they do
    not, or if there is no `hashes.json`.
    """
    try:
        for path in sorted(expand_path(folder).rglob(HASHES_FILE)):
            check_hashes(path.parent)
    except StoreError as error:
        return str(error)
    return ""


def _list_hashed_files(folder: Path) -> list[str]:
    """The files of a folder by path within it, sorted; without `hashes.json` and what may come and go."""
    names: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == HASHES_FILE or _UNHASHED.fullmatch(entry.name):
            continue
        if not entry.is_dir():
            names.append(entry.name)
        elif (Path(entry) / HASHES_FILE).exists():
            names.append(f"{entry.name}/{HASHES_FILE}")
        elif entry.is_symlink():  # may lead back here
            names.append(entry.name)
        else:
            names += [f"{entry.name}/{name}" for name in _list_hashed_files(Path(entry))]
    return names


def write_config(folder: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `config.json` of a farout folder: its kind, layout version, library versions, command, and `content`."""
    command = printable(shlex.join(sys.argv))
    head = {"farout": {"kind": kind, "format": FORMAT, "versions": versions(), "command": command}}
    write_json(expand_path(folder) / "config.json", {**head, **content})


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read the content of `config.json` of a farout folder of the given kind.

    Raises:
        StoreError: for a missing folder, a folder of another kind, or one of another layout version.
    """
    folder = expand_path(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; expected a farout {kind} folder")
    if not os.path.lexists(folder / "config.json"):
        hint = f"; make one with `farout {_COMMANDS[kind]}`" if kind in _COMMANDS else ""
        raise StoreError(f"{folder} is not a {kind} folder (config.json is missing){hint}")
    content = read_json(folder / "config.json")
    head = content.pop("farout", None)
    if not isinstance(head, dict) or "kind" not in head:
        raise StoreError(f"{folder} was not written by farout; expected a farout {kind} folder")
    if head["kind"] != kind:
        raise StoreError(f"{folder} contains a farout {head['kind']}, expected a {kind}")
    layout = head.get("format")
    if layout != FORMAT or isinstance(layout, (bool, float)):
        is_newer = isinstance(layout, int) and layout > FORMAT
        advice = "upgrade farout" if is_newer else f"write the {kind} again with this version"
        raise StoreError(f"{folder} has layout {layout!r:.100}, this farout reads layout {FORMAT}; {advice}")
    return content


def kind_of(folder: str | FilePath) -> str | None:
    """The kind of a farout folder according to its `config.json`; None for other folders."""
    try:
        head = read_json((folder if isinstance(folder, RemotePath) else expand_path(folder)) / "config.json").get(
            "farout"
        )
    except StoreError:  # no farout folder, or one whose kind cannot be read
        return None
    kind = head.get("kind") if isinstance(head, dict) else None
    return kind if isinstance(kind, str) else None


def resume_config(folder: str | Path, kind: str, settings: Mapping[str, Any], about: Mapping[str, Any] = {}) -> None:
    """Open a folder that is filled step by step: write its `config.json`, or check that an existing one agrees.

    Args:
        folder: the folder, which is created if it does not exist.
        kind: kind of the folder.
        settings: everything that determines its content; the entries of `config` are compared one by one.
        about: further content of `config.json`, which is not compared.

    Raises:
        StoreError: if the folder is something else, or was written with other settings, which the message lists.
    """
    folder = expand_path(folder)
    check_replaceable(folder, kind)
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, kind, {**settings, **about})
    new, old = (
        {**content, **content.get("config", {}), "config": None}
        for content in (json.loads(json.dumps(settings)), read_config(folder, kind))
    )
    differences = [
        f"{name}: {old.get(name)} before, {value} now" for name, value in new.items() if old.get(name) != value
    ]
    if differences:
        raise StoreError(
            f"{folder} contains {kind} generated with other settings ({'; '.join(differences)}); give another folder"
        )


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as safetensors, atomically."""
    plain = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(plain, temporary)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises StoreError if it is missing, cut short or altered."""
    path = expand_path(path)
    try:
        with open_regular_file(path) as file:
            # safetensors opens only paths in UTF-8
            return load_file(path) if is_utf8(path) else load(file.read())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the folder is incomplete") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(f"{path} cannot be read as safetensors ({error})") from error


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of farout and of the libraries that determine its results."""
    return {name: _version(name) for name in ("farout", "torch", "diffusers", "timm", "pytorch-ood", "numpy", "pillow")}


_version = cache(metadata.version)  # reads the package's metadata from disk
