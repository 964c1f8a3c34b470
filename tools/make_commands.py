"""Writes docs/commands.md, the reference of the command line, from the parsers of the commands: `make docs`."""

from __future__ import annotations

import argparse
import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from farout.cli.argument_parser import Parser, format_default, format_usage
from farout.cli.command_parser import CommandParser
from farout.cli.command_table import COMMANDS, import_object
from farout.cli.lists import list_presets, show_list

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Generated from the code by `make docs`; do not edit by hand. `farout COMMAND --help` shows the same texts.

Every command except `list` takes `--config FILE` (settings from YAML; flags override them), `--print-config` (prints
all settings as such a file and exits) and `--help`. Lists are written `--levels 20 80` or `--levels [20,80]`. A switch
is turned on by `--x` and off by `--no-x`. Where `--device`, `--precision`, `--batch-size`, `--workers` and `--cache`
have no default, the setting of the fit or of the benchmark is used. The pages of the [methods](index.md) explain when
to change a setting.

Exit status: 0: success; 1: a value or an input is refused; 2: wrong usage (an unknown
command, method or flag, a missing argument, a value of the wrong type); 3: `farout monitor --fail-on-alarm` found an
alarm; 130, 143, 129: ended by SIGINT (Ctrl-C),
SIGTERM (kill, time limits) or SIGHUP (a closed terminal). At these signals, a training writes a checkpoint, other work
that is finished is kept, and one line says how to continue; a second signal ends the command at once.

Errors of the system are one line: `cannot write PATH: REASON` or `cannot read PATH: REASON`. A traceback is an error in
farout or in a library: please report it.

Files for `--config`, chains and benchmarks follow YAML 1.2: `true` and `false` are booleans, and `no`, `012`, `1:30`
and dates are text. At most 1 MiB, 32 levels and 50,000 values are read; tags and repeated keys are refused. Nothing in
a value is expanded by a shell.
"""
TRAINING_FLAGS = {"diffusion_preset", "model", "training"}
"""Settings of a network that is trained if none is given; they are described once, under `train diffusion`."""
TRAINING_NOTE = (
    "Without `--diffusion`, a diffusion model is trained with the settings of `--diffusion-preset` (default:\n"
    "{default}), which `--model.…` and `--training.…` override as in [train diffusion](#train-diffusion)."
)
COMMON_FLAGS = ("help", "config", "print_config")
Sections = dict[str, list[argparse.Action]]


def reference() -> str:
    """Returns the whole page."""
    parts = [HEAD, "\n".join(f"- [{name}](#{name.replace(' ', '-')})" for name in COMMANDS)]
    for name, command in COMMANDS.items():
        if name == "list":
            parts.append(f"## list\n\n    farout list detectors | synthesizers | sets | presets\n\n{show_list.__doc__}")
        elif command.methods:
            parts += describe_methods(name)
        else:
            parser = CommandParser(name).parser
            presets = preset_table(name) if command.presets else ""
            parts.append(describe_command(f"## {name}", parser, flags_by_group(parser), presets))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def describe_methods(name: str) -> list[str]:
    """The settings that all methods of a command share, then those of each method."""
    methods = import_object(COMMANDS[name].methods)
    parsers = {method.name: CommandParser(name, method).parser for method in methods.values()}
    own = {method.name: set(method.load()().config) for method in methods.values()}
    shared: Sections = {}
    for method, parser in parsers.items():
        for title, actions in flags_by_group(parser).items():
            group = shared.setdefault(title, [])
            excluded = own[method] | TRAINING_FLAGS | {"preset"} | {action.dest for action in group}
            group += [action for action in actions if action.dest.partition(".")[0] not in excluded]
    first = next(iter(parsers))
    usage = str(parsers[first].usage).replace(f" {first} ", " METHOD ")
    links = f"METHOD: {', '.join(f'[{method}](#{name}-{method})' for method in parsers)}. Settings of all methods:"
    parts = [f"## {name}\n\n    {usage}\n\n{wrap(links)}\n\n{flag_table(shared)}"]
    for method, parser in parsers.items():
        sections = {
            title: [action for action in actions if action.dest.partition(".")[0] in own[method]]
            for title, actions in flags_by_group(parser).items()
        }
        notes = [preset_table(f"{name} {method}")]
        notes += [TRAINING_NOTE.format(default=a.default) for _, a in parser.flags() if a.dest == "diffusion_preset"]
        parts.append(describe_command(f"### {name} {method}", parser, sections, "\n\n".join(filter(None, notes))))
    return parts


def flags_by_group(parser: Parser) -> Sections:
    """The flags of a parser by group, without those of every command."""
    sections: Sections = {}
    for title, action in parser.flags():
        if action.dest not in COMMON_FLAGS:
            sections.setdefault(title, []).append(action)
    return sections


def describe_command(heading: str, parser: Parser, sections: Sections, notes: str) -> str:
    """A section of the page."""
    usage = "\n    ".join(line.strip() for line in str(parser.usage).splitlines())
    parts = [heading, f"    {usage}", wrap(str(parser.description)), notes, flag_table(sections)]
    return "\n\n".join(filter(None, parts))


def wrap(text: str) -> str:
    """The text in lines of up to 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def flag_table(sections: Sections) -> str:
    """One table, with a bold row before each group of flags with a prefix."""
    filled = {title: actions for title, actions in sections.items() if actions}
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for number, (title, actions) in enumerate(filled.items()):
        rows += [f"| **{title}** | | |"] if number and "." in actions[0].dest else []
        for action in actions:
            usage = format_usage(action) if action.option_strings else action.dest.upper()
            default = "off" if action.default is False else format_default(action)
            rows.append(table_row([f"`{usage}`", default, " ".join((action.help or "").split()).removesuffix(".")]))
    return "\n".join(rows) if filled else "No settings of its own."


@functools.cache
def preset_table(command: str) -> str:
    """The presets of a command as a table; empty if it has none."""
    rows = [row for row in list_presets() if row["command"] == command]
    cells = [[row["preset"], f"`{row['settings']}`" if row["settings"] else "the defaults"] for row in rows]
    return "\n".join(["| preset | settings |", "| --- | --- |", *map(table_row, cells)]) if rows else ""


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
