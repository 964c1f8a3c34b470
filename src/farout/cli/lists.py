"""`farout list`: the names that commands take, without importing torch, except for presets."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from farout.benchmark.presets import describe_preset, preset_names
from farout.cli.command_table import COMMANDS, import_object
from farout.cli.flags import format_flags
from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.core.errors import UsageError, suggest_names
from farout.core.registry import Registry
from farout.data import catalog
from farout.detectors import DETECTORS
from farout.synthesis import SYNTHESIZERS

__all__ = ["list_presets", "show_list"]


def show_list(words: Sequence[str]) -> int:
    """List detectors, synthesizers, named sets (and which are on this machine) or presets."""
    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "detectors": lambda: _list_methods(DETECTORS),
        "synthesizers": lambda: _list_methods(SYNTHESIZERS),
        "sets": _list_sets,
        "presets": list_presets,
    }
    if not words or set(words) & {"-h", "--help"}:
        print_text(f"usage: farout list {{{','.join(listings)}}}\n\n{show_list.__doc__}")
        return 0
    if words[0] not in listings or len(words) > 1:
        raise UsageError(f"there is no list {' '.join(words)!r}; {suggest_names(words[0], listings)}")
    rows = listings[words[0]]()
    table = new_table()
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    print_table(table)
    return 0


def _list_sets() -> list[dict[str, Any]]:
    """How each named set is written as a source, and where it comes from."""
    return [
        {
            "name": row["name"],
            "description": f"{row['title']}, {row['size']}, {row['license']}",
            "splits": row["splits"],
            "location": row["location"] or (f"hub: {row['hub']}" if row["hub"] else row["download_hint"]),
        }
        for row in catalog.list_sets()
    ]


def _list_methods(registry: Registry) -> list[dict[str, str]]:
    return [{"name": method.name, "description": method.description} for method in registry.values()]


def list_presets() -> list[dict[str, str]]:
    """Presets of detectors, synthesizers and trainings, benchmarks, and chains."""
    from farout.cli.steps import builtin_chains, list_commands  # imports torch

    owners: dict[str, Mapping[str, Mapping[str, Any]]] = {
        **{f"fit {name}": method.load().presets for name, method in DETECTORS.items()},
        **{f"synthesize {name}": method.load().presets for name, method in SYNTHESIZERS.items()},
        **{name: import_object(command.presets) for name, command in COMMANDS.items() if command.presets},
    }
    rows = [
        {"command": command, "preset": name, "settings": _format_preset(settings)}
        for command, presets in owners.items()
        for name, settings in presets.items()
    ]
    rows += [{"command": "bench", "preset": name, "settings": describe_preset(name)} for name in preset_names()]
    return rows + [
        {"command": "chain", "preset": name, "settings": "steps: " + ", ".join(list_commands(name))}
        for name in builtin_chains()
    ]


def _format_preset(settings: Mapping[str, Any]) -> str:
    """The settings of a preset as flags; of a dataclass, the fields that differ from its defaults."""
    words: list[str] = []
    for name, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            default = type(value)()
            changed = [each.name for each in fields(value) if getattr(value, each.name) != getattr(default, each.name)]
            words += format_flags(name, {field: getattr(value, field) for field in changed})
        else:
            words += format_flags(name, value)
    return shlex.join(words) or "(the defaults)"
