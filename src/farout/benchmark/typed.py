"""Settings as YAML writes them, checked against the signatures that they are for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

import jsonargparse

from farout.core.config import flat
from farout.core.errors import FaroutError, suggest_names

__all__ = ["build", "known_only", "plain"]

T = TypeVar("T")


def known_only(values: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping that has known names only; None is an empty one. Raises FaroutError for anything else."""
    if not isinstance(values, Mapping | None) or not all(isinstance(name, str) for name in values or {}):
        raise FaroutError(f"{where} requires settings by name, got {values!r}")
    known = list(known)
    for name in values or {}:
        if name not in known:
            raise FaroutError(f"{where} has no setting {name!r}; {suggest_names(name, known)}")
    return dict(values or {})


def build(
    kind: type[T], values: Any, where: str, *, base: Mapping[str, Any] | None = None, beside: Mapping[str, Any] = {}
) -> T:
    """An instance of a data class, or of a method whose constructor's arguments are its configuration.

    Args:
        kind: the class.
        values: settings by name. Lists become tuples where these are wanted, texts numbers (YAML reads 1e-3 as a text);
            settings that are data classes may be given in part.
        where: what errors begin with.
        base: settings that lie under the given ones, over the defaults.
        beside: arguments that are passed as they are.

    Raises FaroutError for unknown names, wrong types, and what the constructor refuses.
    """
    defaults = _defaults(kind, beside)
    nested: dict[str, Any] = {name: value for name, value in defaults.items() if is_dataclass(value)}
    given = known_only(values, defaults, where)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={*nested, *beside})
    for name, value in nested.items():
        parser.add_class_arguments(type(value), name)
        given[name] = known_only(given.get(name), vars(value), f"{where}.{name}")
    parser.set_defaults({**flat(nested), **flat(base or {})})
    try:
        found = parser.parse_object(given)
        made = {name: type(value)(**vars(found[name])) for name, value in nested.items()}
        arguments = {name: found[name] for name in defaults} | made | dict(beside)
        return kind(**arguments)
    except (argparse.ArgumentError, FaroutError) as error:
        raise FaroutError(f"{where}: {_in_words(str(error))}") from error


def _in_words(message: str) -> str:
    """One line of jsonargparse's several."""
    line = re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(message.split()))
    line = re.sub(r"Does not validate .* Subtypes: \[(.*?)\] Errors:.*Given value: ", r"expected one of \1; got ", line)
    return re.sub(r"<class '(\w+)'>|typing\.", lambda found: found[1] or "", line)


def _defaults(kind: Any, beside: Collection[str]) -> dict[str, Any]:
    if not is_dataclass(kind):
        return dict(kind().config)
    own = [field for field in fields(kind) if field.name not in beside]
    return {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in own}


def plain(value: Any) -> Any:
    """As YAML and JSON know it: data classes as mappings, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
