"""Members of a room (detectors, synthesisers): found by reading files, imported only when one is used."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from farout.errors import FaroutError, meant

__all__ = ["Member", "find", "members", "name_of"]

_TITLES = {"outliers": "synthesisers"}
"""What the members of a room are called, where not as the room."""


@dataclass(frozen=True)
class Member:
    """One class of a room: its name (the file's), where it is, and the first line of its file's docstring."""

    name: str
    module: str
    class_name: str
    description: str

    def load(self) -> Any:
        """Imports and returns the class."""
        return getattr(importlib.import_module(self.module), self.class_name)


def members(room: str) -> dict[str, Member]:
    """The members of `farout.<room>` by name, and those that other packages register as entry points of that group.

    A member is a file or package without leading underscore, other than base.py, whose literal `__all__` names one
    class. Nothing is imported.
    """
    folder = Path(__file__).parent / room
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()]
    found = [_read(path, room) for path in files if not path.name.startswith("_") and path.stem != "base"]
    outside = [Member(e.name, e.module, e.attr, f"from {e.module}") for e in entry_points(group=f"farout.{room}")]
    return {member.name: member for member in [*outside, *found] if member is not None}


@cache  # a command looks members up several times, and parsing every file costs more than the rest of the look-up
def _read(path: Path, room: str) -> Member | None:
    source = path if path.suffix == ".py" else path / "__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = next((_literal(node) for node in tree.body if _assigns_all(node)), [])
    if len(names) != 1 or not names[0][:1].isupper():
        return None
    description = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Member(path.stem, f"farout.{room}.{path.stem}", names[0], description)


def _assigns_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)


def _literal(node: ast.stmt) -> list[str]:
    assert isinstance(node, ast.Assign)
    return list(ast.literal_eval(node.value))


def name_of(room: str, kind: type) -> str:
    """The name under which a class is found again; raises FaroutError for a class that is no member of the room."""
    for member in members(room).values():
        if member.class_name == kind.__name__ and (member.module == kind.__module__ or member.load() is kind):
            return member.name
    raise FaroutError(f"{kind.__name__} is no member of farout.{room}: it can be used, but not saved and loaded")


def find(room: str, name: str) -> Member:
    """The member called `name`; raises FaroutError that lists near matches."""
    known = members(room)
    if name in known:
        return known[name]
    raise FaroutError(f"there is no {_TITLES.get(room, room).removesuffix('s')} {name!r}; {meant(name, known)}")
