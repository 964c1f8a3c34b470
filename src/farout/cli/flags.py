"""Settings written as flags, for `farout list presets` and `farout chain --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["format_flags", "format_value"]


def format_flags(name: str, value: Any) -> list[str]:
    """Writes a setting from YAML as flags: `training: {steps: 300}` is --training.steps 300."""
    if isinstance(value, Mapping):
        return [word for key, each in value.items() for word in format_flags(f"{name}.{key}", each)]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        items = [format_value(each) for each in value]
        same_type = {isinstance(each, str) for each in value} in ({True}, {False})
        if same_type and not any(item.startswith(("-", "[", "{")) for item in items):
            return [f"--{flag}", *items]
        return [f"--{flag}={json.dumps(value, default=str)}"]
    word = format_value(value)
    return [f"--{flag}={word}"] if word.startswith("-") else [f"--{flag}", word]


def format_value(value: Any) -> str:
    """Writes a value from YAML as a word."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
