"""The command line: `farout COMMAND …`, made from the signatures in `commands.py`."""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from farout.cli.command_table import COMMANDS, named_command
from farout.cli.usage import UsageError
from farout.core.errors import FaroutError, suggest_names

__all__ = ["main"]

_HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns the exit status: 0; 1 for a mistake in the input; 2 for wrong usage; 130 when interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    name = named_command(words)
    try:
        return _overview(words) if name is None else _run(name, words[len(name.split()) :])
    except SystemExit as done:  # after --help and --print-config
        return done.code if isinstance(done.code, int) else 0
    except UsageError as error:
        return _failed(str(error), 2)
    except FaroutError as error:
        return _failed(str(error), 1)
    except BrokenPipeError:  # `farout list sets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        how = "" if name in ("chain", "bench") else ", where possible (training: with --resume)"
        return _failed(f"interrupted; run the same command again to continue{how}", 130)


def _run(name: str, words: list[str]) -> int:
    if name == "list":
        from farout.cli.lists import show_list

        return show_list(words)
    from farout.cli import output, parsers

    output.quiet_libraries()
    call = parsers.parse(name, words)
    if name == "chain":  # whose steps show what they do themselves
        call()
        return 0
    with output.progress():
        output.show(name, call())
    return 0


def _failed(message: str, status: int) -> int:
    print(f"farout: {' '.join(message.split())}", file=sys.stderr)
    return status


def _overview(words: Sequence[str]) -> int:
    """The list of commands, or of those that begin with a word; an unknown one is wrong usage."""
    if words[:1] == ["--version"]:
        from farout import __version__

        print(f"farout {__version__}")
        return 0
    first, *rest = words or ["--help"]
    family = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if first not in _HELP and not (family and set(rest) <= _HELP):
        return _failed(f"there is no command {' '.join(words[:2])!r}; {suggest_names(first, COMMANDS)}", 2)
    lines = [f"  {name:<18}{_described(COMMANDS[name])}" for name in family or COMMANDS]
    print("usage: farout COMMAND [settings]    (`farout COMMAND --help` describes the settings)\n", *lines, sep="\n")
    return 0


def _described(place: str) -> str:
    """The first docstring line of a command's function."""
    module, _, function = place.partition(":")
    return next((ast.get_docstring(each) or "").partition("\n")[0] for each in _read(module) if each.name == function)


@functools.cache
def _read(module: str) -> list[ast.FunctionDef]:
    """The functions of a module, which is not imported: importing torch takes seconds."""
    file = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    return [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
