"""Writes docs/commands.md, the reference of the command line, from the signatures behind it: `make docs`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from farout.cli import parsers
from farout.cli.command_table import COMMANDS
from farout.cli.flags import Flag, Parser
from farout.cli.lists import presets, show_list
from farout.detectors import DETECTORS
from farout.synthesis import SYNTHESIZERS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Generated from the code by `make docs`; do not edit by hand. `farout COMMAND --help` shows the same texts.

Every command but `list` takes `--config FILE` (settings from YAML; flags override them), `--print-config` (prints all
settings as such a file and exits) and `--help`. Lists are written `--levels 20 80` or `--levels [20,80]`; a flag
`--[no-]x` is on unless `--no-x` is given. Where `--device`, `--precision`, `--batch-size`, `--workers` and
`--cache` have no default, the setting of the fit or of the benchmark is used. The pages of the [methods](index.md)
explain when to change a setting.

Exit status: 0: success; 1: error in the input; 2: wrong usage; 130: interrupted.
"""
METHODS = {"fit": DETECTORS, "synthesize": SYNTHESIZERS}
"""Commands whose first word is a METHOD, and the registry that it is looked up in."""
NETWORK = ("network_preset", "model", "training")
"""Settings of a network that is trained where none is given."""
TRAINED = (
    "Without `--diffusion`, a diffusion model is trained with the settings of `--network-preset` (default:\n"
    "{default}), which `--model.…` and `--training.…` override as in [train diffusion](#train-diffusion)."
)
EVERYWHERE = ("help", "config", "print_config")
Sections = dict[str, list[Flag]]


def reference() -> str:
    """The whole page."""
    settings = {(row["command"], row["preset"]): row["settings"] for row in presets()}
    parts = [HEAD, "\n".join(f"- [{name}](#{name.replace(' ', '-')})" for name in COMMANDS)]
    for name in COMMANDS:
        if name == "list":
            parts.append(f"## list\n\n    farout list detectors | synthesizers | sets | presets\n\n{show_list.__doc__}")
        elif name in METHODS:
            parts += _of_methods(name, settings)
        else:
            parser = parsers.parser_of(name)
            parts.append(_section(f"## {name}", parser, _shown(parser), _presets(name, settings)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _of_methods(name: str, settings: dict[tuple[str, str], str]) -> list[str]:
    """The sections of a command whose first word is a METHOD: what all methods share, then each one's own."""
    members = METHODS[name]
    made = {method: parsers.parser_of(name, method) for method in members}
    own = {method: {*members[method].load()().config, *NETWORK, "preset"} for method in members}
    shared: Sections = {}
    for method, parser in made.items():
        for title, flags in _chosen(_shown(parser), own[method], inside=False).items():
            there = shared.setdefault(title, [])
            there += [flag for flag in flags if flag.name not in {each.name for each in there}]
    usage = next(iter(made.values())).usage.replace(f" {next(iter(made))} ", " METHOD ")
    told = f"METHOD: {', '.join(f'[{m}](#{name}-{m})' for m in made)}. Settings of all methods:"
    parts = [f"## {name}\n\n    {usage}\n\n{_wrapped(told)}\n\n{_tables(shared)}"]
    for method, parser in made.items():
        flags = _chosen(_shown(parser), own[method] - {*NETWORK, "preset"}, inside=True)
        found = _presets(f"{name} {method}", settings)
        network = [flag for rows in parser.sections().values() for flag in rows if flag.name == "network_preset"]
        trained = [TRAINED.format(default=flag.default) for flag in network]
        parts.append(_section(f"### {name} {method}", parser, flags, "\n\n".join(filter(None, [found, *trained]))))
    return parts


def _shown(parser: Parser) -> Sections:
    """The parser's flags but those of every command and those that only name a group."""
    sections = parser.sections()
    names = [flag.name for flags in sections.values() for flag in flags]
    heads = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    return {title: [f for f in flags if f.name not in {*EVERYWHERE, *heads}] for title, flags in sections.items()}


def _chosen(sections: Sections, own: set[str], *, inside: bool) -> Sections:
    """The flags that are the method's own, or the others."""
    return {
        title: [flag for flag in flags if (flag.name.partition(".")[0] in own) is inside]
        for title, flags in sections.items()
    }


def _section(heading: str, parser: Parser, flags: Sections, more: str) -> str:
    usage = "\n    ".join(line.strip() for line in parser.usage.splitlines())
    parts = [heading, f"    {usage}", _wrapped(parser.description), more, _tables(flags)]
    return "\n\n".join(filter(None, parts))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _tables(sections: Sections) -> str:
    """One table; a row in bold where another group of settings begins."""
    filled = {title: flags for title, flags in sections.items() if flags}
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for number, (title, flags) in enumerate(filled.items()):
        rows += [f"| **{title}** | | |"] if number and "." in flags[0].name else []
        rows += [_row([f"`{flag.written}`", flag.default, flag.meaning]) for flag in flags]
    return "\n".join(rows) if filled else "No settings of its own."


def _presets(command: str, settings: dict[tuple[str, str], str]) -> str:
    owned = {preset: flags for (of, preset), flags in settings.items() if of == command}
    found = [[preset, f"`{flags}`" if flags else "the defaults"] for preset, flags in owned.items()]
    return "\n".join(["| preset | settings |", "| --- | --- |", *map(_row, found)]) if found else ""


def _row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
