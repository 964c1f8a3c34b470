"""What every command prints: warnings, progress bars, and its result."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from farout.cli.command_table import COMMANDS, import_object
from farout.cli.terminal import print_text
from farout.core import progress as core_progress
from farout.core.devices import is_main_process
from farout.core.errors import FaroutWarning
from farout.core.names import printable
from farout.core.remote_files import FilePath

__all__ = ["configure_logging", "print_existing", "print_result", "progress"]


def configure_logging() -> None:
    """Writes warnings and the progress of farout to the error stream, one line each, and silences other libraries."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler())
    if is_main_process():
        logging.getLogger("farout").setLevel(logging.INFO)
    for name in ("diffusers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def show_on_one_line(message: Any, category: type[Warning], *location: Any, **options: Any) -> None:
        if issubclass(category, FaroutWarning) and is_main_process():
            print_text(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show_on_one_line


class _StderrHandler(logging.Handler):
    """Prints records to the current error stream, which rich replaces while it shows bars."""

    def __init__(self) -> None:
        super().__init__()
        is_terminal = sys.stderr.isatty()
        self.setFormatter(logging.Formatter("%(message)s" if is_terminal else "%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        print_text(self.format(record), file=sys.stderr)


class _RichBars:
    """Implements the progress interface of `farout.core.progress` with bars of rich."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def open(self, description: str, total: int | None, unit: str) -> int:
        """Adds a bar and returns its number."""
        return self.bars.add_task(printable(description), total=total, note="")

    def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
        """Advances a bar."""
        self.bars.update(TaskID(number), advance=units, note=printable(note))

    def close(self, number: int) -> None:
        """Stops the clock of a bar."""
        self.bars.stop_task(TaskID(number))


@contextmanager
def progress() -> Iterator[None]:
    """Shows progress bars with the time left on the error stream, if it is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or not is_main_process():  # in a log file, bars would be blank lines
        yield
        return
    # on a narrow terminal the description and the note are cut off, not the numbers
    number, text = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    with (
        Progress(
            TextColumn("{task.description}", table_column=text, markup=False),  # a name may contain `[b]`
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=number),
            TimeElapsedColumn(table_column=number),
            TimeRemainingColumn(elapsed_when_finished=False, table_column=number),
            TextColumn("{task.fields[note]}", table_column=text, markup=False),
            console=console,
            redirect_stdout=sys.stdout.isatty(),  # else what is printed would go to the error stream
        ) as bars,
        core_progress.show(_RichBars(bars)),
    ):
        yield


def print_result(command: str, result: Any, arguments: Mapping[str, Any]) -> None:
    """Prints the result of a command with these arguments; of several processes, the first one does."""
    printer: Callable[..., None] = import_object(COMMANDS[command].printer)
    if not is_main_process():
        return
    if COMMANDS[command].prints_folder:
        printer(result, arguments)
    else:
        printer(result)


def print_existing(folder: FilePath, *names: str) -> None:
    """Prints the paths of those files of a folder that exist."""
    for name in names:
        path = folder / name
        if path.exists():
            print_text(f"  {path}")
