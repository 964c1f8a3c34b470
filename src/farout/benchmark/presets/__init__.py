"""The built-in benchmarks, a YAML file each; this module is imported by `farout list` and imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["describe_preset", "preset_file", "preset_names"]


def preset_names() -> list[str]:
    """Names of the built-in benchmarks, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The file of a benchmark."""
    return Path(__file__).parent / f"{name}.yaml"


def describe_preset(name: str) -> str:
    """The description in the file, one line."""
    found = re.search(r"^about: *(.+)$", preset_file(name).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip("\"'") if found else ""
