"""Progress of long work: log lines at intervals, or the progress bars of a front end.

Work reports its progress through `task`. By default it goes to the logger `farout.core.progress` at level INFO; a front
end, such as the command line on a terminal, replaces the log lines by bars with `show`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

__all__ = ["LogDisplay", "ProgressDisplay", "Task", "current_display", "show", "task"]

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 30.0
"""Seconds between two log lines of a task; there is also one after its first and one after its last unit."""
MIN_LOGGED_S = 1.0
"""A task is logged once it takes this many seconds."""


class ProgressDisplay(Protocol):
    """Shows the progress of tasks, for instance as bars."""

    def open(self, description: str, total: int | None, unit: str) -> int:
        """Start a task of `total` units (None: unknown) and return its number."""

    def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
        """Add completed units; `note` has the latest values and the rate, such as "loss 0.1, 20 images/s"."""

    def close(self, number: int) -> None:
        """End a task."""


@dataclass
class _LoggedTask:
    description: str
    total: int | None
    unit: str
    started: float
    completed: int = 0
    note: str = ""
    logged_time: float = -math.inf
    logged_count: int = 0


class LogDisplay:
    """Writes the progress to the log: a line every `LOG_INTERVAL_S` seconds, and after the first and the last unit."""

    def __init__(self) -> None:
        self._tasks: dict[int, _LoggedTask] = {}
        self._opened = 0

    def open(self, description: str, total: int | None, unit: str) -> int:
        """Start a task."""
        self._opened += 1
        self._tasks[self._opened] = _LoggedTask(description, total, unit, time.monotonic())
        return self._opened

    def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
        """Add completed units; log them if a line is due."""
        task = self._tasks[number]
        task.completed += units
        task.note = note
        if task.completed == task.total or time.monotonic() - task.logged_time >= LOG_INTERVAL_S:
            self._log(task, seconds_left)

    def close(self, number: int) -> None:
        """End a task; log what has been completed since its last line."""
        self._log(self._tasks.pop(number), None)

    def _log(self, task: _LoggedTask, seconds_left: float | None) -> None:
        now = time.monotonic()
        if task.completed == task.logged_count or now - task.started < MIN_LOGGED_S:
            return
        task.logged_count, task.logged_time = task.completed, now
        line = f"{task.description}: {task.completed}{'' if task.total is None else f'/{task.total}'} {task.unit}"
        if task.completed == task.total:
            last = f"took {_format_seconds(now - task.started)}"
        else:
            last = "" if seconds_left is None else f"{_format_seconds(seconds_left)} left"
        logger.info("%s", ", ".join(filter(None, [line, task.note, last])))


def _format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Task:
    """Work of several units, whose progress is shown; see `task`."""

    def __init__(
        self, display: ProgressDisplay, number: int, total: int | None, item: str | None, items_per_unit: int
    ) -> None:
        self._display, self._number, self._total = display, number, total
        self._item, self._items_per_unit = item, items_per_unit
        self._completed = self._processed = 0
        self._started = time.monotonic()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Add completed units; `note` is a short text to show, such as the loss."""
        self._completed += units
        self._processed += units
        seconds = time.monotonic() - self._started
        seconds_left = None
        if self._item is not None and self._processed and seconds > 0:
            rate = self._processed / seconds
            items = rate * self._items_per_unit
            note = ", ".join(filter(None, [note, f"{items:.{1 if items < 100 else 0}f} {self._item}/s"]))
            seconds_left = None if self._total is None else (self._total - self._completed) / rate
        self._display.advance(self._number, units, note, seconds_left)

    def skip(self, units: int) -> None:
        """Add units that an earlier run completed; they do not count for the rate."""
        self._completed += units
        self._display.advance(self._number, units, "", None)


_display: ContextVar[ProgressDisplay] = ContextVar("farout_progress_display", default=LogDisplay())  # noqa: B039


def current_display() -> ProgressDisplay:
    """The display that tasks are shown on."""
    return _display.get()


@contextmanager
def show(display: ProgressDisplay) -> Iterator[None]:
    """Show the tasks that begin inside this context on `display`."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def task(
    description: str,
    total: int | None = None,
    *,
    unit: str = "images",
    item: str | None = "images",
    items_per_unit: int = 1,
) -> Iterator[Task]:
    """Show the progress of the work inside this context: `with task("scoring", n) as bar: bar.advance()`.

    Args:
        description: name of the work.
        total: number of units; None: unknown.
        unit: what is counted, in the plural.
        item: what the rate counts, in the plural; None: no rate and no time left, because the units take different
            times.
        items_per_unit: number of items of one unit, for instance the batch size if the units are training steps.
    """
    display = _display.get()
    number = display.open(description, total, unit)
    try:
        yield Task(display, number, total, item, items_per_unit)
    finally:
        display.close(number)
