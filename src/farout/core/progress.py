"""Progress of long work: silent in the library, shown once a front end calls `show`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

__all__ = ["Progress", "Task", "current", "show", "task"]


class Progress(Protocol):
    """What a front end offers: a bar per task, with an estimate of the time left."""

    def open(self, description: str, total: int | None) -> int:
        """Starts a bar of `total` units (None: unknown) and returns its number."""

    def advance(self, number: int, units: int, note: str) -> None:
        """Moves bar `number` on; `note` is a short text beside it."""

    def close(self, number: int) -> None:
        """Ends bar `number`."""


class Task:
    """One bar; does nothing where no front end is shown."""

    def __init__(self, front: Progress | None, number: int) -> None:
        self._front, self._number = front, number

    def advance(self, units: int = 1, note: str = "") -> None:
        """Moves the bar on by `units`."""
        if self._front is not None:
            self._front.advance(self._number, units, note)


_front: ContextVar[Progress | None] = ContextVar("farout_progress", default=None)


def current() -> Progress | None:
    """The front end that progress is shown on; None: it is not shown."""
    return _front.get()


@contextmanager
def show(front: Progress) -> Iterator[None]:
    """Sends the progress of all work inside the block to `front`."""
    token = _front.set(front)
    try:
        yield
    finally:
        _front.reset(token)


@contextmanager
def task(description: str, total: int | None = None) -> Iterator[Task]:
    """A bar for the work inside the block: `with task("scoring", n) as bar: bar.advance()`."""
    front = _front.get()
    number = front.open(description, total) if front is not None else -1
    try:
        yield Task(front, number)
    finally:
        if front is not None:
            front.close(number)
