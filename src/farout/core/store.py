"""Files and folders on disk: written to a temporary name and then renamed, hashed, loaded without executing code."""

from __future__ import annotations

import hashlib
import json
import os
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

from farout.core.errors import StoreError
from farout.core.file_errors import write_errors
from farout.core.interruption import defer_interruption
from farout.core.names import expand_path, is_utf8, printable

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_replaceable",
    "hash_tensors",
    "kind_of",
    "load_tensors",
    "read_config",
    "read_hashes",
    "read_json",
    "resume_config",
    "save_tensors",
    "versions",
    "write_config",
    "write_hashes",
    "write_json",
]

_COMMANDS = {"detector": "fit", "diffusion model": "train diffusion", "classifier": "train classifier"}
"""Command that writes a folder of a kind."""
FORMAT = 1
"""Version of the folder layout; folders of a newer version are refused."""


def _default_mode(folder: bool) -> int:
    """The permissions of new files and folders, which temporary ones do not have."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def _temporary_prefix(path: Path) -> str:
    """The beginning of temporary names; short, because the name itself may be as long as the file system allows."""
    return f".{path.name[:40]}."


@contextmanager
def atomic_file(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path` and rename it to `path` at the end; after an error nothing is left.

    Args:
        path: the file to write.
        temporary: the temporary path; with a fixed one, killed runs leave at most one file. None: a new name.
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
            os.replace(working, path)
        finally:
            working.unlink(missing_ok=True)


def check_replaceable(path: str | Path, kind: str) -> None:
    """Raise StoreError unless `path` does not exist, is an empty folder, or is a farout folder of that kind.

    Called before long work starts, so that no files are lost and no work is wasted.
    """
    path = expand_path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        read_config(path, kind)
    except StoreError as error:
        raise StoreError(
            f"{path} exists and is not a farout {kind}, so it is not replaced; give another folder"
        ) from error


@contextmanager
def atomic_folder(path: str | Path, kind: str | None) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and rename it to `path` at the end; after an error nothing is left.

    Args:
        path: the folder to write.
        kind: kind of the folder; None: do not check what is replaced.

    Raises:
        StoreError: if `path` is something else than a folder of that kind.
    """
    path = Path(os.path.abspath(expand_path(path)))  # so that `.` has a name
    if kind is not None:
        check_replaceable(path, kind)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), dir=path.parent))
        try:
            yield temporary
            temporary.chmod(_default_mode(folder=True))
            with defer_interruption():  # between two renames, neither the old nor the new folder is in place
                _replace_folder(path, temporary)
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
    text = json.dumps(content, indent=2, allow_nan=False, sort_keys=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises StoreError if the file is missing or is not one."""
    path = expand_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the folder is incomplete or is not one that farout wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} contains a {type(content).__name__}, expected a JSON object")
    return content


def write_hashes(path: str | Path, hashes: Collection[str]) -> None:
    """Write content hashes of images, sorted, one per line."""
    expand_path(path).write_text("".join(f"{line}\n" for line in sorted(hashes)), encoding="utf-8")


def read_hashes(path: str | Path) -> frozenset[str]:
    """Read content hashes. Raises StoreError if the file is missing, because seen images would count as unseen."""
    path = expand_path(path)
    if not path.is_file():
        raise StoreError(f"{path} is missing, which lists the images that were seen; the folder is incomplete")
    return frozenset(path.read_text(encoding="utf-8").split())


def write_config(folder: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `config.json` of a farout folder: its kind, layout version, library versions, command, and `content`."""
    command = printable(shlex.join(sys.argv))
    head = {"farout": {"kind": kind, "format": FORMAT, "versions": versions(), "command": command}}
    write_json(expand_path(folder) / "config.json", {**head, **content})


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read the content of `config.json` of a farout folder of the given kind.

    Raises:
        StoreError: for a missing folder, a folder of another kind, or one of a newer layout version.
    """
    folder = expand_path(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; expected a farout {kind} folder")
    if not (folder / "config.json").is_file():
        hint = f"; make one with `farout {_COMMANDS[kind]}`" if kind in _COMMANDS else ""
        raise StoreError(f"{folder} is not a {kind} folder (config.json is missing){hint}")
    content = read_json(folder / "config.json")
    head = content.pop("farout", None)
    if not isinstance(head, dict) or "kind" not in head:
        raise StoreError(f"{folder} was not written by farout; expected a farout {kind} folder")
    if head["kind"] != kind:
        raise StoreError(f"{folder} contains a farout {head['kind']}, expected a {kind}")
    if head.get("format", 0) > FORMAT:
        raise StoreError(f"{folder} has layout {head['format']}, this farout reads up to {FORMAT}; upgrade farout")
    return content


def kind_of(folder: str | Path) -> str | None:
    """The kind of a farout folder according to its `config.json`; None for other folders."""
    path = expand_path(folder) / "config.json"
    try:
        head = read_json(path).get("farout") if path.is_file() else None
    except StoreError:  # JSON of another program
        return None
    return head.get("kind") if isinstance(head, dict) else None


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
    if not path.is_file():
        raise StoreError(f"{path} is missing; the folder is incomplete")
    try:
        # safetensors opens only paths in UTF-8
        return load_file(path) if is_utf8(path) else load(path.read_bytes())
    except SafetensorError as error:
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
