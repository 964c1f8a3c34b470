"""Folders and files on disk: written to a temporary name, then renamed; hashed; loaded without executing anything."""

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
from safetensors.torch import load_file, save_file

from farout.core.errors import StoreError

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

FORMAT = 1
"""Version of the folder layout; a folder of a newer one is refused."""


def _mode(folder: bool) -> int:
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


@contextmanager
def atomic_file(path: str | Path, working: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` at the end; after an error nothing is left.

    working: that path instead, which is always the same: killed runs leave one file at most, and it is found again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path) if working is None else working
    try:
        yield temporary
        if working is None:
            temporary.chmod(_mode(folder=False))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new file beside `path`, for its owner's eyes only."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def check_replaceable(path: str | Path, kind: str) -> None:
    """Raises StoreError unless `path` is free, an empty folder, or a folder of that kind that farout wrote.

    Called before long work starts, so that nobody's files are lost and no work is done in vain.
    """
    path = Path(path)
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
    """Yields a temporary folder beside `path` and renames it to `path` at the end; after an error nothing is left.

    Raises StoreError where something else than an older folder of the same kind stands at `path`; None: whatever
    stands there is the caller's own to replace.
    """
    path = Path(os.path.abspath(path))  # `.` has a name, too
    if kind is not None:
        check_replaceable(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(_mode(folder=True))
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Puts folder `new` at `path`; an old folder there is removed only after the new one stands."""
    if not path.exists():
        os.replace(new, path)
        return
    old = new.with_name(f"{new.name}.old")  # a free name: Windows puts no folder over another, not even an empty one
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON, atomically; a value that JSON lacks (NaN included) is an error."""
    text = json.dumps(content, indent=2, allow_nan=False, sort_keys=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object; raises StoreError when the file is missing or is not one."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the folder is incomplete or is not one that farout wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_hashes(path: str | Path, hashes: Collection[str]) -> None:
    """Writes content hashes of images, sorted, one a line."""
    Path(path).write_text("".join(f"{line}\n" for line in sorted(hashes)), encoding="utf-8")


def read_hashes(path: str | Path) -> frozenset[str]:
    """Reads what `write_hashes` wrote; raises StoreError when it is missing, as images seen would pass for new ones."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path} is missing, which lists the images that were seen; the folder is incomplete")
    return frozenset(path.read_text(encoding="utf-8").split())


def write_config(folder: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes `config.json` of a model or score folder: its kind, layout version, library versions, and `content`."""
    head = {"farout": {"kind": kind, "format": FORMAT, "versions": versions(), "command": shlex.join(sys.argv)}}
    write_json(Path(folder) / "config.json", {**head, **content})


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Reads `config.json` of a folder of the given kind, without its head.

    Raises StoreError for a missing folder, a folder of another kind, or one written by a newer layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; expected a farout {kind} folder")
    content = read_json(folder / "config.json")
    head = content.pop("farout", None)
    if not isinstance(head, dict) or "kind" not in head:
        raise StoreError(f"{folder} was not written by farout; expected a farout {kind} folder")
    if head["kind"] != kind:
        raise StoreError(f"{folder} holds a farout {head['kind']}, expected a {kind}")
    if head.get("format", 0) > FORMAT:
        raise StoreError(f"{folder} has layout {head['format']}, this farout reads up to {FORMAT}; upgrade farout")
    return content


def kind_of(folder: str | Path) -> str | None:
    """The kind of a folder that farout wrote, as its `config.json` says; None for any other."""
    path = Path(folder) / "config.json"
    try:
        head = read_json(path).get("farout") if path.is_file() else None
    except StoreError:  # JSON of another program
        return None
    return head.get("kind") if isinstance(head, dict) else None


def resume_config(folder: str | Path, kind: str, settings: Mapping[str, Any], about: Mapping[str, Any] = {}) -> None:
    """Opens a folder that is filled bit by bit: writes its `config.json`, or sees that the one there says the same.

    Args:
        folder: made where it is not there.
        kind: of the folder.
        settings: all that decides what is put into it; those within `config` are compared one by one.
        about: written beside them and not compared.

    Raises StoreError where something else is in the folder, or what was made with other settings; it lists these.
    """
    folder = Path(folder)
    check_replaceable(folder, kind)
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, kind, {**settings, **about})
    now, known = _flat(json.loads(json.dumps(settings))), _flat(read_config(folder, kind))
    differing = [
        f"{name}: {known.get(name)} before, {value} now" for name, value in now.items() if known.get(name) != value
    ]
    if differing:
        raise StoreError(
            f"{folder} holds {kind} made with other settings ({'; '.join(differing)}); give another folder"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **settings.get("config", {}), "config": None}


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], note: Mapping[str, str] | None = None) -> None:
    """Writes named tensors as safetensors, atomically."""
    plain = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(plain, temporary, metadata=dict(note or {}))


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; raises StoreError when it is missing, cut short or altered."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path} is missing; the folder is incomplete")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read as safetensors ({error})") from error


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names: the identity of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of farout and of the libraries that decide its numbers."""
    return {name: _version(name) for name in ("farout", "torch", "diffusers", "timm", "pytorch-ood", "numpy", "pillow")}


_version = cache(metadata.version)  # reads the package's metadata from disk
