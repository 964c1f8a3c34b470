"""Tables as the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["plain_table", "print_rows"]


def plain_table(title: str | None = None) -> Table:
    """Bold heads and two spaces between columns, without lines."""
    return Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=title, title_justify="left")


def print_rows(heads: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str | None = None) -> None:
    """A table whose cells are broken where they have no room."""
    table = plain_table(title)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
