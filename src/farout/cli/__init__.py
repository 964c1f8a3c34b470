"""The command line: `farout COMMAND …`. The flags of a command are the parameters of its function."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from farout.cli.command_table import COMMANDS, find_command
from farout.cli.terminal import configure_streams, print_text, print_traceback
from farout.core.errors import FaroutError, ReadError, UsageError, suggest_names
from farout.core.file_errors import describe_system_error
from farout.core.interruption import Interruption, handle_signals, received_interruption
from farout.core.names import expand_path

__all__ = ["main"]

_ISSUES = "https://github.com/farout/farout/issues"
_HELP_FLAGS = {"-h", "--help"}
_TRAININGS = ("fit", "train diffusion", "train classifier")
_RESUMABLE = (*_TRAININGS, "synthesize", "reconstruct")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns the exit status: 0; 1 for an error in the input or of the system; 2 for wrong usage; 3 for an alarm with
    `farout monitor --fail-on-alarm`; 130, 143 or 129 when SIGINT, SIGTERM or SIGHUP ended the command. Other exceptions
    are errors in the program: they are raised.
    """
    configure_streams()
    if arguments is None:
        sys.excepthook = print_traceback
    words = sys.argv[1:] if arguments is None else list(arguments)
    name = find_command(words)
    _open_missing_streams()
    with handle_signals():
        try:
            status = _print_overview(words) if name is None else _run_command(name, words[len(name.split()) :])
            if sys.stdout is not None:
                sys.stdout.flush()  # an error is reported here; at the end of the process it would be a traceback
            return status
        except SystemExit as end:  # after --help, --print-config and an alarm
            return end.code if isinstance(end.code, int) else 0
        except UsageError as error:
            return _print_error(str(error), 2)
        except FaroutError as error:
            return _print_error(str(error), 1)
        except KeyboardInterrupt as error:
            return _end_interrupted(received_interruption() or error, name, words)
        except Exception as error:
            signal = received_interruption()
            if signal is not None:  # it may also have ended worker processes, whose end is reported first
                return _end_interrupted(signal, name, words)
            if isinstance(error, BrokenPipeError):  # `farout list sets | head`
                return 0
            message = describe_system_error(error, _find_out(words))
            if message is None:
                error.add_note(f"This is an error in farout or one of its libraries; please report it at {_ISSUES}")
                raise
            return _print_error(message, 1)
        finally:
            _discard_broken_output()


def _end_interrupted(error: KeyboardInterrupt, name: str | None, words: Sequence[str]) -> int:
    interruption = error if isinstance(error, Interruption) else Interruption()
    if os.environ.get("RANK", "0") != "0":  # one of several processes gives the message
        return interruption.exit_status
    return _print_error(f"{interruption}; {_how_to_continue(name, words)}", interruption.exit_status)


def _discard_broken_output() -> None:
    """Redirect output that cannot be written to the null device, so that Python does not fail again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing_streams() -> None:
    """Connect closed standard streams to nothing; else the next file that is opened would become one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _run_command(name: str, words: list[str]) -> int:
    # each branch imports only what its command uses: torch takes seconds, and `farout list` does not need it
    if name == "list":
        from farout.cli.lists import show_list

        return show_list(words)
    try:
        os.getcwd()  # without one, torch ends the process
    except OSError as error:
        raise ReadError("the current folder", "it no longer exists", error.errno, "change to another one") from error
    from farout.cli import output
    from farout.cli.command_parser import parse
    from farout.cli.stages import print_profile, run_with_profile

    output.configure_logging()
    call = parse(name, words)
    if name == "chain":  # shows the progress of each step itself
        call()
    else:
        with output.progress():
            result, profile = run_with_profile(call)
        output.print_result(name, result, call.arguments)
        if profile is not None:
            print_profile(profile, call.arguments)
    return 0


def _how_to_continue(name: str | None, words: Sequence[str]) -> str:
    """What to do after an interruption; a command that has begun to write checkpoints or images needs `--resume`."""
    again = "run the same command again to continue"
    if name not in _RESUMABLE or "--resume" in words:
        return again
    out = _find_out(words)
    begun = Path(f"{out.rstrip('/')}.training", "checkpoints") if name in _TRAININGS else Path(out, "config.json")
    return "add --resume to the same command to continue" if begun.exists() or not out else again


def _find_out(words: Sequence[str]) -> str:
    """What is given as `--out`; empty if it is not among the words."""
    pairs = pairwise([*words, ""])
    out = next((word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--out"), "")
    return str(expand_path(out)) if out else ""


def _print_error(message: str, status: int) -> int:
    with suppress(OSError, ValueError):  # the error stream may be closed
        if sys.stderr is not None:
            print_text(f"farout: {' '.join(message.split())}", file=sys.stderr, flush=True)
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
