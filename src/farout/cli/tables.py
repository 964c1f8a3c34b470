"""Tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["new_table", "print_table"]

_LOG = 200
"""Columns of a log or a file, which no window bounds."""


def new_table(title: str | None = None) -> Table:
    """A table without rules, with a title over its left edge."""
    return Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=title, title_justify="left")


def print_table(table: Table) -> None:
    """Prints it, as wide as the terminal is."""
    console = Console()
    (console if console.is_terminal else Console(width=_LOG)).print(table)
