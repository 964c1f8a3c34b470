"""The steps of a chain: read from YAML, and parsed as commands before the first one runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farout.benchmark.job_graph import Job
from farout.cli.command_parser import (
    ParsedCommand,
    command_parameters,
    is_list,
    parse_settings,
    positional_parameters,
)
from farout.cli.command_table import COMMANDS, find_command
from farout.cli.flags import format_flags, format_value
from farout.core.errors import FaroutError, suggest_names
from farout.core.names import find_path
from farout.core.yaml_files import read_yaml
from farout.data import catalog
from farout.data.sources import open_source

__all__ = ["INPUT_SETTINGS", "ChainStep", "builtin_chains", "list_commands", "read_steps"]

_IMAGE_SETTINGS = frozenset({"source", "generated", "id", "ood", "baseline_images", "outliers", "reconstructions"})
_FILE_SETTINGS = frozenset({"detector", "model", "diffusion", "classifier", "scores", "results"})
INPUT_SETTINGS = _IMAGE_SETTINGS | _FILE_SETTINGS | {"weights", "parts"}
"""Settings whose value may be the `out` of an earlier step."""

_IRRELEVANT_SETTINGS = frozenset(
    {"resume", "batch_size", "workers", "training.workers", "training.tensorboard", "cache"}
)
"""Settings that do not change a result."""
_FORBIDDEN_SETTINGS = ("config", "help", "print_config")
_EXAMPLE = "`- fit semantic: {source: images/, out: detector}`"


@dataclass(frozen=True)
class ChainStep:
    """One command of a chain.

    Attributes:
        number: position in the chain, from 1.
        name: the command as written, such as `fit posthoc`.
        command: the part of the name that is a command, such as `fit`.
        body: the settings as in a file for `--config`; results of earlier steps are given by their `out`.
        earlier_outs: the `out` of every earlier step.
    """

    number: int
    name: str
    command: str
    body: Mapping[str, Any]
    earlier_outs: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.number} ({self.name})"

    @property
    def out(self) -> str:
        """The name of the result."""
        return str(self.body["out"])

    @property
    def inputs(self) -> tuple[str, ...]:
        """The `out` of the earlier steps whose results this step reads."""
        names = {_split_name(value, self.earlier_outs)[0] for _, value in _input_values(self.body)}
        return tuple(name for name in self.earlier_outs if name in names)

    def job(self, folder: Path) -> Job:
        """The step as a job of a chain in `folder`."""
        return Job(
            name=self.out,
            kind=self.name,
            output=folder / self.out,
            settings={
                "command": self.name,
                **{name: value for name, value in self.settings.items() if name not in _IRRELEVANT_SETTINGS},
            },
            inputs=self.inputs,
            title=str(self),
        )

    def command_line(self, folder: Path | None = None) -> list[str]:
        """The words to type after `farout`; with `folder`, names of results become paths in it."""
        body = self._resolve_body(folder)
        typed = [p.name for p in positional_parameters(command_parameters(self.command)) if p.name in body]
        rest = [word for key, value in body.items() if key not in typed for word in format_flags(key, value)]
        given = [body[name] if isinstance(body[name], list) else [body[name]] for name in typed]
        values = [format_value(value) for each in given for value in each]
        # a path that begins like a flag would be read as one
        return [*self.name.split(), *(f"./{value}" if value.startswith("-") else value for value in values), *rest]

    def parse(self, folder: Path | None = None, **more: Any) -> ParsedCommand:
        """The parsed command, with `more` settings; with `folder`, names of results become paths in it."""
        method = self.name.removeprefix(self.command).strip() or None
        return parse_settings(self.command, {**self._resolve_body(folder), **more}, method)

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """The value of every flag."""
        return self.parse().settings

    def _resolve_body(self, folder: Path | None) -> dict[str, Any]:
        body = {key: value for key, value in self.body.items() if value is not None}
        return body if folder is None else {key: self._resolve_names(folder, key, each) for key, each in body.items()}

    def _resolve_names(self, folder: Path, key: str, value: Any) -> Any:
        if key == "out":
            return str(folder / str(value))
        if key in INPUT_SETTINGS and isinstance(value, list):
            return [self._resolve_names(folder, key, each) for each in value]
        if key in INPUT_SETTINGS and isinstance(value, str):
            name, rest = _split_name(value, self.earlier_outs)
            return value if name is None else f"{folder / name}{rest}"
        return value


def builtin_chains() -> dict[str, Path]:
    """The built-in chains by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "chains").glob("*.yaml"))}


def list_commands(chain: str) -> list[str]:
    """The commands of a chain as written in its file, unchecked."""
    return [str(next(iter(item))) for item in _read_chain(chain)["steps"]]


def read_steps(chain: str) -> list[ChainStep]:
    """Read and check the steps of a chain.

    Args:
        chain: the name of a built-in chain, or a YAML file.

    Raises FaroutError that names the step: for an unknown command, settings that it does not have or that are out of
    range, an `out` that is missing or used twice, the result of a later step, and images and models that neither exist
    nor are results of earlier steps.
    """
    content = _read_chain(chain)
    steps: list[ChainStep] = []
    for number, item in enumerate(content["steps"], 1):
        steps.append(_read_step(number, item, content.get("source"), steps))
    for step in steps:
        _check_step(step, [each.out for each in steps])
    return steps


def _read_chain(chain: str) -> dict[str, Any]:
    path = builtin_chains().get(chain) or find_path(chain)
    if not path.exists():
        raise FaroutError(f"{chain!r} is neither a file nor a built-in chain; {suggest_names(chain, builtin_chains())}")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list) or not content["steps"]:
        raise FaroutError(f"{chain} has no steps; expected YAML with `steps:`, and in that list e.g. {_EXAMPLE}")
    unknown = [key for key in content if key not in ("source", "steps")]
    if unknown:
        raise FaroutError(f"{chain} has the unknown key {unknown[0]!r}; expected source and steps")
    return content


def _read_step(number: int, item: Any, shared_source: Any, earlier: Sequence[ChainStep]) -> ChainStep:
    if not isinstance(item, dict) or len(item) != 1:
        raise FaroutError(f"step {number} is {item!r}; expected one command with its settings, such as {_EXAMPLE}")
    name, settings = str(next(iter(item))), next(iter(item.values()))
    title = f"step {number} ({name})"
    command = _find_command(name, title)
    if not isinstance(settings, dict):
        raise FaroutError(f"{title} has the settings {settings!r}; expected settings by name, such as {_EXAMPLE}")
    body = {str(key).replace("-", "_"): value for key, value in settings.items()}
    positional = positional_parameters(command_parameters(command))
    if shared_source is not None and any(p.name == "source" for p in positional):
        body = {"source": shared_source, **body}

    for key in _FORBIDDEN_SETTINGS:
        if key in body:
            raise FaroutError(f"{title}: {key} is not a setting of a step; leave it out")
    required = [*(p.name for p in positional if p.default is p.empty), "out"]
    missing = [key for key in required if body.get(key) is None]
    if missing:
        raise FaroutError(f"{title} lacks {' and '.join(missing)}; it requires {', '.join(required)}")
    for parameter in positional:
        key, value = parameter.name, body.get(parameter.name)
        if isinstance(value, dict) or (isinstance(value, list) and not is_list(parameter)):
            raise FaroutError(f"{title}: {key} is {value!r}; expected a single string")
        if isinstance(value, str) and is_list(parameter):
            body[key] = [value]
    if not re.fullmatch(r"\w[\w.+ -]*", str(body["out"])):
        raise FaroutError(f"{title} has the out {body['out']!r}; expected a plain name, such as detector")
    for step in earlier:
        if step.out.casefold() == str(body["out"]).casefold():
            raise FaroutError(f"{title} has the same out {body['out']!r} as {step}; give each step its own")
    return ChainStep(number, name, command, body, tuple(step.out for step in earlier))


def _find_command(name: str, title: str) -> str:
    """The command that a step's name starts with; raises FaroutError if there is none, or if it has no `out`."""
    command = find_command(name.split())
    allowed = [each for each in COMMANDS if each not in ("list", "chain") and "out" in command_parameters(each)]
    if command is None:
        raise FaroutError(f"{title}: there is no command {name!r}; {suggest_names(name, allowed)}")
    if command not in allowed:
        raise FaroutError(f"{title}: {command} has no out and cannot be a step; possible steps: {', '.join(allowed)}")
    takes_method = "method" in command_parameters(command)
    if len(name.split()) != len(command.split()) + takes_method:
        raise FaroutError(f"{title}: there is no command {name!r}; expected {command}{' METHOD' * takes_method}")
    return command


def _check_step(step: ChainStep, outs: Sequence[str]) -> None:
    """Parse a step, and check that its inputs exist or are results of earlier steps."""
    for key, value in _input_values(step.body):
        name = _split_name(value, outs[step.number - 1 :])[0]
        if name is not None:
            later = f"step {outs.index(name) + 1}, which runs later"
            raise FaroutError(f"{step}: {key} names {name!r}, the out of {later}; for a path write ./{value}")
    try:
        _ = step.settings
        for key, value in _input_values(step.body):
            if _split_name(value, step.earlier_outs)[0] is not None:
                continue
            # what is on a hub is checked by the command itself
            if key in _FILE_SETTINGS and not value.startswith("hf://") and not find_path(value).exists():
                raise FaroutError(f"{key} is {value!r}, which neither exists nor is the out of an earlier step")
            if key in _IMAGE_SETTINGS and not catalog.needs_hub(value):
                open_source(value)
    except FaroutError as error:
        raise FaroutError(f"{step}: {error}") from error


def _input_values(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that may name results of other steps, with each of their values."""
    for key in (key for key in body if key in INPUT_SETTINGS):
        values = body[key] if isinstance(body[key], list) else [body[key]]
        yield from ((key, value) for value in values if isinstance(value, str))


def _split_name(value: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Split `again@vflip` or `again/a` into one of the names and the rest; None if it starts with no name."""
    match = re.fullmatch(r"([^/\\@]+)(.*)", value)
    return (match[1], match[2]) if match and match[1] in names else (None, "")
