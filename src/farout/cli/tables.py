"""Tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farout.core.names import printable

__all__ = ["new_table", "print_table"]

_LOG = 200
"""Columns of a log or a file, which no window bounds."""


class _Table(Table):
    """A table whose texts are shown as they are; rich would take `[b]` in a name for its markup."""

    def add_column(self, header: Any = "", *others: Any, **options: Any) -> None:
        super().add_column(_plain(header), *others, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    if isinstance(cell, Text):
        cell.plain = printable(cell.plain, multiline=True)
        return cell
    return Text(printable(cell, multiline=True)) if isinstance(cell, str) else cell


def new_table(title: str | None = None) -> Table:
    """A table without rules, with a title over its left edge."""
    shown = None if title is None else _plain(title)
    return _Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=shown, title_justify="left")


def print_table(table: Table) -> None:
    """Prints it, as wide as the terminal is."""
    console = Console()
    (console if console.is_terminal else Console(width=_LOG)).print(table)
