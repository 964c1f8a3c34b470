"""Printing that never fails and escapes control characters in names, whatever the terminal is."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any, TextIO

from farout.core.names import printable

__all__ = ["configure_streams", "print_text", "print_traceback"]


def configure_streams() -> None:
    r"""Lets the output and error streams write what their encoding lacks as `\xe9`, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # other programs may have put an object of their own there
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def print_text(*values: object, sep: str = " ", file: TextIO | None = None, flush: bool = False) -> None:
    """Prints like `print`; control characters and undecodable bytes in names are shown as escapes."""
    print(printable(sep.join(map(str, values)), multiline=True), file=file, flush=flush)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    """Prints the traceback of an error in the program, as `sys.excepthook`."""
    print_text("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), file=sys.stderr)
