"""Settings from YAML, validated by pydantic against the constructor that they are for."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

import pydantic

from farout.core.errors import FaroutError, suggest_names

__all__ = ["build", "require_mapping", "to_plain_values"]

T = TypeVar("T")


def require_mapping(values: Any, where: str) -> dict[str, Any]:
    """A mapping of names to values; None is an empty one. Raises FaroutError for anything else."""
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise FaroutError(f"{where} requires settings by name, got {values!r}")
    return dict(values)


def build(constructor: Callable[..., T], values: Any, where: str, *, base: Mapping[str, Any] | None = None) -> T:
    """Construct a dataclass, or a method whose constructor's arguments are its configuration, from YAML values.

    Args:
        constructor: the class.
        values: settings by name, as YAML gives them: lists become tuples and text becomes numbers where the constructor
            expects these. A setting that is a dataclass may be given in part; the rest keeps its default.
        where: the YAML key of the settings, which errors name.
        base: settings of a preset, which `values` override.

    Raises FaroutError for unknown names, wrong types, and values that the constructor refuses.
    """
    hints, defaults = _parameters(constructor)
    given = {**(base or {}), **require_mapping(values, where)}
    for name, default in defaults.items():
        if is_dataclass(default) and isinstance(given.get(name), Mapping):
            given[name] = {**{field.name: getattr(default, field.name) for field in fields(default)}, **given[name]}
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    parameters: dict[str, Any] = {name: (hint, defaults.get(name, ...)) for name, hint in hints.items()}
    model = pydantic.create_model("Settings", __config__=config, **parameters)
    try:
        validated = model.model_validate(given)
        return constructor(**{name: getattr(validated, name) for name in validated.model_fields_set})
    except pydantic.ValidationError as error:
        raise FaroutError(_explain(error, where, given, list(hints))) from error
    except FaroutError as error:
        raise FaroutError(f"{where}: {error}" if where else str(error)) from error


def _parameters(constructor: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Type hints and defaults of the parameters of a constructor, by name."""
    if is_dataclass(constructor):
        hints = typing.get_type_hints(constructor)
        defaults = {
            field.name: field.default if field.default_factory is MISSING else field.default_factory()
            for field in fields(constructor)
            if field.default is not MISSING or field.default_factory is not MISSING
        }
        return {field.name: hints[field.name] for field in fields(constructor)}, defaults
    # a subclass may pass **arguments on to its base: collect the parameters of all constructors
    defaults = dict(constructor().config)
    hints = {}
    for base in reversed(constructor.__mro__):
        if "__init__" in vars(base):
            hints |= typing.get_type_hints(base.__init__)
    return {name: hints[name] for name in defaults}, defaults


def _explain(error: pydantic.ValidationError, where: str, given: Mapping[str, Any], names: list[str]) -> str:
    """One line with the YAML key of every mistake, what is expected and what was given."""
    expected: dict[str, list[str]] = {}
    inputs: dict[str, Any] = {}
    for detail in error.errors():
        # a location also names the members of unions, which are not keys of the YAML file
        path, value = [where] if where else [], given
        for part in detail["loc"]:
            if not ((isinstance(value, Mapping) and part in value) or isinstance(value, list | tuple)):
                break
            value = value[part]  # type: ignore[index]
            path.append(str(part))
        key, last = ".".join(path), str(detail["loc"][-1])
        if detail["type"] == "missing":
            return f"{key or 'the benchmark'} lacks {last}"
        if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            parent = ".".join(path[:-1]) or "the benchmark"
            siblings = (
                names if len(detail["loc"]) == 1 else [name for name in _siblings(given, detail["loc"]) if name != last]
            )
            return f"{parent} has no setting {last!r}; {suggest_names(last, siblings)}"
        expected.setdefault(key, []).append(
            detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        )
        inputs[key] = detail["input"]
    return "; ".join(f"{key} must be {' or '.join(texts)}, got {inputs[key]!r}" for key, texts in expected.items())


def _siblings(given: Mapping[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """The keys next to a nested one: all fields of its dataclass, because `build` has filled in the defaults."""
    value: Any = given
    for part in location[:-1]:
        value = value[part]
    return list(value)


def to_plain_values(value: Any) -> Any:
    """As YAML and JSON represent it: dataclasses as mappings, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain_values(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): to_plain_values(each) for name, each in value.items()}
    return [to_plain_values(each) for each in value] if isinstance(value, list | tuple) else value
