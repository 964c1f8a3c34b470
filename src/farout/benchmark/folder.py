"""The folder of a benchmark: its specification, which later runs must keep to and may add to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from farout.benchmark.reading import as_yaml
from farout.benchmark.spec import HEAD, SECTIONS, Spec
from farout.core import store
from farout.core.errors import StoreError

__all__ = ["SPEC", "check_folder", "differences", "open_folder"]

SPEC = "bench.yaml"
_FREE = ("name", "about", "seeds")
"""Settings that may change, or be added to."""
_DECIDING = ("device", "precision")
"""Settings of the runtime that results depend on."""


def open_folder(out: Path, spec: Spec) -> None:
    """Writes `bench.yaml` into the folder of a benchmark, after `check_folder`."""
    check_folder(out, spec)
    with store.atomic_file(out / SPEC) as temporary:
        temporary.write_text(as_yaml(spec), encoding="utf-8")


def check_folder(out: Path, spec: Spec) -> None:
    """Sees that a folder is free, or that of a benchmark with the same settings; nothing is written.

    Detectors, networks, sets and seeds may have been added. Raises StoreError where something else is in the folder,
    and for other settings than those there; it lists them.
    """
    path = out / SPEC
    if out.exists() and not path.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} exists and is not the folder of a benchmark; give another one")
    now = yaml.safe_load(as_yaml(spec))
    if path.is_file():
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = list(differences(known, now))
        if found:
            raise StoreError(f"{out} holds a benchmark with other settings ({'; '.join(found)}); give another folder")


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two specifications as YAML has them, other than what was added, in words."""
    old, new = ({name: each.get(name) for name in HEAD if name not in _FREE} for each in (known, now))
    yield from _changed(old, new)
    old, new = ({f"runtime.{name}": each["runtime"].get(name) for name in _DECIDING} for each in (known, now))
    yield from _changed(old, new)
    yield from _removed("seeds", known["seeds"], now["seeds"])
    for group, sources in known["ood"].items():
        yield from _removed(f"ood.{group}", sources, now["ood"].get(group, []))
    for section in SECTIONS:
        old, new = _entries(known, section), _entries(now, section)
        yield from _removed(section, old, new)
        for name in old.keys() & new.keys():
            yield from _changed(_flat(old[name], f"{section}.{name}"), _flat(new[name], f"{section}.{name}"))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} before, {new.get(name)} now"


def _removed(what: str, old: Any, new: Any) -> Iterator[str]:
    gone = [str(each) for each in old if each not in new]
    if gone:
        yield f"{what}: {', '.join(gone)} before, not now"


def _entries(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = content.get(section) or {}
    return {entry["name"]: entry for entry in found} if isinstance(found, list) else dict(found)


def _flat(entry: Any, where: str) -> dict[str, Any]:
    """Nested settings by the path to them."""
    if not isinstance(entry, Mapping):
        return {where: entry}
    return {key: value for name, each in entry.items() for key, value in _flat(each, f"{where}.{name}").items()}
