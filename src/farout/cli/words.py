"""Settings as the words that one would type, and calls as the settings that they were given."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["flags", "settings_of", "text"]

_COMPOSED = ("arguments", "runtime")
"""Parameters of commands that are made of several flags, which do not bear the parameter's name."""


def flags(name: str, value: Any) -> list[str]:
    """A setting from YAML as flags: `training: {steps: 300}` is --training.steps 300."""
    if isinstance(value, Mapping):
        return [word for key, each in value.items() for word in flags(f"{name}.{key}", each)]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, list | tuple):
        items = [text(each) for each in value]
        alike = {isinstance(each, str) for each in value} in ({True}, {False})
        if alike and not any(item.startswith(("-", "[", "{")) for item in items):
            return [flag, *items]
        return [f"{flag}={json.dumps(value, default=str)}"]
    word = text(value)
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def text(value: Any) -> str:
    """A value from YAML as a word: null, true, false, or as it is printed."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def settings_of(call: functools.partial[Any]) -> dict[str, Any]:
    """Every setting of a parsed command by the name of its flag, defaults and presets resolved, as JSON has them."""
    given: dict[str, Any] = {}
    for part in (*call.args, call.keywords):
        given |= part if isinstance(part, Mapping) else {}
    for name in _COMPOSED:
        given |= dict(_parts(given.pop(name, {})))
    return json.loads(json.dumps(dict(_leaves(given)), default=str))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of settings of settings."""
    if isinstance(value, Mapping):
        yield from ((str(key), each) for key, each in value.items())
    else:
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def _leaves(values: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of settings by both names with a dot between them; numbers that JSON lacks as text."""
    for name, value in _parts(values):
        if isinstance(value, Mapping) or is_dataclass(value):
            yield from _leaves(value, f"{start}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{start}{name}", str(value)
        else:
            yield f"{start}{name}", value
