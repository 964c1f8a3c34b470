"""Registered methods: detectors and synthesizers by name, imported when one is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from farout.core.errors import FaroutError, suggest_names

__all__ = ["RegisteredMethod", "Registry"]


@dataclass(frozen=True)
class RegisteredMethod:
    """A method by name: the module and the class that implement it, and one line that describes it."""

    name: str
    module: str
    class_name: str
    description: str

    def load(self) -> Any:
        """Imports the module and returns the class."""
        return getattr(importlib.import_module(self.module), self.class_name)


class Registry(Mapping[str, RegisteredMethod]):
    """The registered methods of one kind, those of other packages included.

    Args:
        kind: what error messages call a method, such as "detector".
        group: the group of entry points by which other packages register methods: `name = "package.module:Class"`.
        methods: name -> ("module:Class", one line that describes it).
    """

    def __init__(self, kind: str, group: str, methods: Mapping[str, tuple[str, str]]) -> None:
        self.kind, self.group = kind, group
        self._own = {name: _make_method(name, target, about) for name, (target, about) in methods.items()}

    def _all_methods(self) -> dict[str, RegisteredMethod]:
        others = (_make_method(e.name, e.value, f"from {e.module}") for e in entry_points(group=self.group))
        return {**{method.name: method for method in others}, **self._own}

    def __iter__(self) -> Iterator[str]:
        return iter(self._all_methods())

    def __len__(self) -> int:
        return len(self._all_methods())

    def __getitem__(self, name: str) -> RegisteredMethod:
        """The method of this name; raises FaroutError that suggests similar names."""
        if name in self._own:  # reading the entry points of all installed packages takes time
            return self._own[name]
        methods = self._all_methods()
        if name not in methods:
            raise FaroutError(f"there is no {self.kind} {name!r}; {suggest_names(name, methods)}")
        return methods[name]

    def find_name(self, cls: type) -> str | None:
        """The name that a class is registered under; None for a class that is not registered."""
        for method in self.values():
            if method.class_name == cls.__name__ and (method.module == cls.__module__ or method.load() is cls):
                return method.name
        return None

    def name_of(self, cls: type) -> str:
        """The name that a class is registered under; raises FaroutError for a class that is not registered."""
        name = self.find_name(cls)
        if name is not None:
            return name
        raise FaroutError(
            f"{cls.__name__} is not registered as a {self.kind}: it can be used, but not saved and loaded; add it to "
            f"the package's table, or register an entry point of the group {self.group}"
        )


def _make_method(name: str, target: str, description: str) -> RegisteredMethod:
    module, _, class_name = target.partition(":")
    return RegisteredMethod(name, module, class_name, description)
