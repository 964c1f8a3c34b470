"""`farout list`: what there is, without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from farout.benchmark.presets import about, preset_names
from farout.cli.tables import new_table, print_table
from farout.cli.usage import UsageError
from farout.cli.words import flags
from farout.core.errors import suggest_names
from farout.core.registry import Registry
from farout.data import catalog
from farout.detectors import DETECTORS
from farout.synthesis import SYNTHESIZERS

__all__ = ["presets", "show_list"]

_WHAT = ("detectors", "synthesizers", "sets", "presets")


def show_list(words: Sequence[str]) -> int:
    """List detectors, synthesizers, named sets (and which are on this machine) or presets."""
    if not words or set(words) & {"-h", "--help"}:
        print(f"usage: farout list {{{','.join(_WHAT)}}}\n\n{show_list.__doc__}")
        return 0
    what = words[0]
    if what not in _WHAT or len(words) > 1:
        raise UsageError(f"there is no list {' '.join(words)!r}; {suggest_names(what, _WHAT)}")
    listings: dict[str, Callable[[], list[dict[str, str]]]] = {
        "detectors": lambda: _methods(DETECTORS),
        "synthesizers": lambda: _methods(SYNTHESIZERS),
        "sets": _sets,
        "presets": presets,
    }
    _print(listings[what](), what)
    return 0


def _sets() -> list[dict[str, str]]:
    """What a reader wants for a spec, and where the set comes from."""
    return [
        {
            "name": row["name"],
            "description": f"{row['title']}, {row['size']}, {row['licence']}",
            "splits": row["splits"],
            "location": _where(row),
        }
        for row in catalog.list_sets()
    ]


def _where(row: dict[str, str]) -> str:
    if row["where"] != "-":
        return row["where"]
    return f"hub: {row['hub']}" if row["hub"] != "-" else row["by_hand"]


def _methods(registry: Registry) -> list[dict[str, str]]:
    return [{"name": method.name, "description": method.description} for method in registry.values()]


def presets() -> list[dict[str, str]]:
    """Presets of every detector, every synthesizer and of training, which are read from the classes themselves;
    benchmarks and chains.
    """
    from farout.classifiers.train import PRESETS as CLASSIFIERS
    from farout.cli.steps import builtin_chains, list_commands
    from farout.diffusion.config import PRESETS

    owners = {f"fit {name}": member.load().presets for name, member in DETECTORS.items()}
    owners |= {f"synthesize {name}": member.load().presets for name, member in SYNTHESIZERS.items()}
    owners |= {"train diffusion": PRESETS, "train classifier": CLASSIFIERS}
    rows = [
        {"command": owner, "preset": name, "settings": _flags(settings)}
        for owner, owned in owners.items()
        for name, settings in owned.items()
    ]
    rows += [{"command": "bench", "preset": name, "settings": about(name)} for name in preset_names()]
    return rows + [
        {"command": "chain", "preset": name, "settings": "steps: " + ", ".join(list_commands(name))}
        for name in builtin_chains()
    ]


def _flags(settings: dict[str, Any]) -> str:
    """Settings as flags; of settings of settings those that differ from their class's defaults."""
    return " ".join(word for name, value in settings.items() for word in flags(name, _changed(value)))


def _changed(value: Any) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        return value
    plain = type(value)()
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: each for name, each in named.items() if each != getattr(plain, name)}


def _print(rows: list[dict[str, str]], what: str) -> None:
    if not rows:
        print(f"there are no {what} yet")
        return
    table = new_table()
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    print_table(table)
