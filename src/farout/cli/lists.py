"""`farout list`: what there is, without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from farout import registry
from farout.images import catalog

__all__ = ["show_list"]


def show_list(words: Sequence[str]) -> int:
    """List detectors, synthesisers, sets (and which are on this machine) or presets."""
    parser = argparse.ArgumentParser(prog="farout list", description=show_list.__doc__)
    parser.add_argument("what", choices=["detectors", "synthesisers", "sets", "presets"])
    rows = {"sets": catalog.list_sets, "presets": _presets}
    what = parser.parse_args(list(words)).what
    _print(rows[what]() if what in rows else _members({"synthesisers": "outliers"}.get(what, what)), what)
    return 0


def _members(room: str) -> list[dict[str, str]]:
    return [{"name": member.name, "what": member.description} for member in registry.members(room).values()]


def _presets() -> list[dict[str, str]]:
    """Presets of every detector and of training; these are read from the classes themselves."""
    from farout.diffusion.train import PRESETS

    owners = {f"fit {name}": member.load().presets for name, member in registry.members("detectors").items()}
    owners["train diffusion"] = PRESETS
    return [
        {"command": owner, "preset": name, "settings": str(settings)}
        for owner, presets in owners.items()
        for name, settings in presets.items()
    ]


def _print(rows: list[dict[str, str]], what: str) -> None:
    if not rows:
        Console().print(f"there are no {what} yet")
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    Console().print(table)
