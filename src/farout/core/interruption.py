"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM (kill, time limits) and SIGHUP (a closed terminal).

The command line calls `handle_signals`; as a library, farout installs no handlers, and Ctrl-C raises KeyboardInterrupt
as usual. All long work ends cleanly on a KeyboardInterrupt, of which `Interruption` is a kind: a training writes a
checkpoint, and finished parts of a table are kept.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption", "defer_interruption", "end_with_parent", "handle_signals", "received_interruption"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAME_EVENT_S = 0.5
"""A signal that comes so soon after the first one belongs to the same event: `timeout` and terminals send several."""
_SAME_EVENT_OF_LAUNCHER_S = 10.0
"""The same under a launcher of several processes, which passes a signal on that the processes have received already."""


class Interruption(KeyboardInterrupt):
    """A signal that ends the command.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """What shells report for a process that this signal ends: 130, 143 or 129."""
        return 128 + self.number

    def __str__(self) -> str:
        if self.number == signal.SIGINT:
            return "interrupted"
        return f"ended by {signal.Signals(self.number).name}"


class _Handler:
    """The handler of this process; Python calls it in the main thread."""

    process_id = 0  # 0: not installed; forked processes inherit the handler
    deferred = 0  # depth of the contexts that defer
    received: Interruption | None = None
    received_at = 0.0
    is_pending = False  # received, but not raised yet

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process_id:  # a worker: its parent decides what happens
            raise KeyboardInterrupt
        if self.received is not None:
            several = os.environ.get("WORLD_SIZE", "1") != "1"
            if time.monotonic() - self.received_at > (_SAME_EVENT_OF_LAUNCHER_S if several else _SAME_EVENT_S):
                os._exit(128 + number)
            return
        self.received, self.received_at, self.is_pending = Interruption(number), time.monotonic(), True
        if not self.deferred:
            self.raise_pending()

    def raise_pending(self) -> None:
        """Raise the signal that was received, unless it has been raised already."""
        if self.is_pending and self.received is not None:
            self.is_pending = False
            raise self.received


_handler = _Handler()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside this context the first signal raises an `Interruption`, and a second one ends the process at once.

    Signals that are ignored stay ignored (`nohup`), and handlers of an embedding program stay in place. Outside the
    main thread, where Python cannot install handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or _handler.process_id == os.getpid():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) in defaults}
    _handler.received, _handler.is_pending, _handler.process_id = None, False, os.getpid()
    try:
        for number in previous:
            signal.signal(number, _handler)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _handler.process_id = 0


@contextmanager
def defer_interruption() -> Iterator[None]:
    """What is inside this context happens completely: a signal that arrives meanwhile raises at its end.

    For steps that are short and must not be done by half. Only the signals of `handle_signals` are deferred.
    """
    if threading.current_thread() is not threading.main_thread():  # signals raise in the main thread only
        yield
        return
    _handler.deferred += 1
    try:
        yield
    finally:
        _handler.deferred -= 1
    if not _handler.deferred:
        _handler.raise_pending()


def end_with_parent() -> None:
    """Send SIGTERM to this process when the one that started it with `multiprocessing` has ended.

    A parent that is killed cannot end its workers: they would wait for work for ever, and hold their memory and GPUs.
    """
    from multiprocessing import parent_process  # only workers need it

    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="farout parent", daemon=True).start()


def received_interruption() -> Interruption | None:
    """The signal that was received inside `handle_signals`, also if it is deferred or its exception was lost."""
    return _handler.received
