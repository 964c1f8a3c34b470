"""Checks of JSON content against type annotations: the fields of a dataclass, the arguments of a constructor, a model.

Types are strict: 1 is a number with decimals, but "1", true and 1.5 are no integers. JSON has only lists; they are
accepted where an annotation says tuple.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from reprlib import Repr
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

from farout.core.config import Configured
from farout.core.errors import FaroutError, StoreError

__all__ = ["Schema", "check_arguments", "check_content", "create_dataclass"]

T = TypeVar("T")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class Schema(BaseModel):
    """Base class of schemas: entries that are not declared are refused."""

    model_config = ConfigDict(extra="forbid")


def check_content(content: Any, schema: Any, where: str) -> None:
    """Check a JSON value.

    Args:
        content: the value.
        schema: a type annotation: a `TypedDict`, `dict[str, int]`, `list[str] | None` and so on.
        where: the file, and the entry in it, for messages.

    Raises StoreError that names the first entry that is missing, unknown, or has another type or value.
    """
    adapter = _adapter_of(schema)
    if adapter is None:
        return
    try:
        adapter.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise StoreError(_describe(error, content, where)) from None


def create_dataclass(cls: type[T], values: Any, where: str, **more: Any) -> T:
    """Create a dataclass from a JSON object of its fields.

    Args:
        cls: the dataclass.
        values: the object; lists become tuples.
        where: the file, and the entry in it, for messages.
        **more: fields that are not in the object.

    Raises StoreError for fields that are missing, unknown, of another type, or that the dataclass refuses.
    """
    known = [field for field in fields(cls) if field.init and field.name not in more]  # type: ignore[arg-type]
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    arguments = _check_values(values, get_type_hints(cls), [field.name for field in known], required, where)
    try:
        return cls(**arguments, **more)
    except (FaroutError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{where}: {error}") from error


def check_arguments(cls: type[Configured], values: Any, where: str) -> dict[str, Any]:
    """Check a JSON object of arguments of a constructor; returns them with tuples instead of lists.

    Raises StoreError for arguments that are unknown or of another type.
    """
    hints: dict[str, Any] = {}
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base) and issubclass(base, Configured):
            own = vars(base)["__init__"]
            hints = get_type_hints(own) | hints
            parameters = list(inspect.signature(own).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return _check_values(values, hints, names, [], where)


def _check_values(
    values: Any, hints: Mapping[str, Any], known: list[str], required: list[str], where: str
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise StoreError(f"{where} is {_SHORT.repr(values)}; expected an object of {', '.join(known)}")
    for name in values:
        if name not in known:
            raise StoreError(f"{where} has an unknown entry {name!r:.100}; expected {', '.join(known)}")
    for name in required:
        if name not in values:
            raise StoreError(f"{where}: {name} is missing")
    for name, value in values.items():
        check_content(value, hints.get(name, Any), f"{where}: {name}")
    return {name: _to_tuple(value) for name, value in values.items()}


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


@cache
def _adapter_of(schema: Any) -> TypeAdapter[Any] | None:
    """The validator of an annotation; None for annotations without one, which methods from outside may have."""
    try:
        return TypeAdapter(schema)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError):
        return None


def _describe(error: ValidationError, content: Any, where: str) -> str:
    """The first problem: the entry by its path in the content, its value, and what is expected."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    value, path = content, list[str]()
    for step in first["loc"]:  # may end with names of alternatives of the annotation, which are not in the content
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
        path.append(str(step))
    if first["type"] == "missing":
        return f"{where}: {'.'.join(map(str, first['loc']))} is missing"
    if first["type"] == "extra_forbidden":
        return f"{where} has an unknown entry {'.'.join(path)!r:.100}"
    path_text = [".".join(path)] if path else []
    expected = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems[:3]))
    return f"{': '.join([where, *path_text])} is {_SHORT.repr(value)}; expected {expected}"
