"""The command line: `farout COMMAND …`. The flags of a command are the parameters of its function."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from farout.cli.command_table import COMMANDS, find_command
from farout.core.errors import FaroutError, UsageError, suggest_names

__all__ = ["main"]

_HELP_FLAGS = {"-h", "--help"}
_TRAININGS = ("fit", "train diffusion", "train classifier")
_RESUMABLE = (*_TRAININGS, "synthesize", "reconstruct")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns the exit status: 0; 1 for an error in the input; 2 for wrong usage; 130 when interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    name = find_command(words)
    try:
        return _print_overview(words) if name is None else _run_command(name, words[len(name.split()) :])
    except SystemExit as end:  # after --help and --print-config
        return end.code if isinstance(end.code, int) else 0
    except UsageError as error:
        return _print_error(str(error), 2)
    except FaroutError as error:
        return _print_error(str(error), 1)
    except BrokenPipeError:  # `farout list sets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _print_error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        return _print_error(f"interrupted; {_how_to_continue(name, words)}", 130)


def _run_command(name: str, words: list[str]) -> int:
    # each branch imports only what its command uses: torch takes seconds, and `farout list` does not need it
    if name == "list":
        from farout.cli.lists import show_list

        return show_list(words)
    from farout.cli import output
    from farout.cli.command_parser import parse

    output.configure_logging()
    call = parse(name, words)
    if name == "chain":  # shows the progress of each step itself
        call()
    else:
        with output.progress():
            result = call()
        output.print_result(name, result, call.arguments)
    return 0


def _how_to_continue(name: str | None, words: Sequence[str]) -> str:
    """What to do after an interruption; a command that has begun to write checkpoints or images needs `--resume`."""
    again = "run the same command again to continue"
    if name not in _RESUMABLE or "--resume" in words:
        return again
    out = next((word.partition("=")[2] or after for word, after in pairwise([*words, ""]) if _is_out(word)), "")
    begun = Path(f"{out.rstrip('/')}.training", "checkpoints") if name in _TRAININGS else Path(out, "config.json")
    return "add --resume to the same command to continue" if begun.exists() or not out else again


def _is_out(word: str) -> bool:
    return word.partition("=")[0] == "--out"


def _print_error(message: str, status: int) -> int:
    print(f"farout: {' '.join(message.split())}", file=sys.stderr)
    return status


def _print_overview(words: Sequence[str]) -> int:
    """Prints the list of commands, or of those that start with a word; an unknown word is wrong usage."""
    if words[:1] == ["--version"]:
        from farout import __version__

        print(f"farout {__version__}")
        return 0
    first, *rest = words or ["--help"]
    group = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if first not in _HELP_FLAGS and not (group and set(rest) <= _HELP_FLAGS):
        return _print_error(f"there is no command {' '.join(words[:2])!r}; {suggest_names(first, COMMANDS)}", 2)
    lines = [f"  {name:<18}{COMMANDS[name].summary}" for name in group or COMMANDS]
    print("usage: farout COMMAND [settings]    (`farout COMMAND --help` describes the settings)\n", *lines, sep="\n")
    return 0
