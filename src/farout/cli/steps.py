"""The steps of a chain: read from YAML, and parsed as the commands that they are before any is run."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from farout.cli import parsers
from farout.cli.command_table import COMMANDS, named_command
from farout.cli.words import flags, settings_of, text
from farout.core.errors import FaroutError, suggest_names
from farout.data import catalog
from farout.data.sources import open_source

__all__ = ["NAMING", "Step", "chains", "read_steps", "step_names"]

_IMAGES = frozenset({"source", "generated", "id", "ood", "reference", "outliers", "reconstructions"})
_FILES = frozenset({"detector", "model", "diffusion", "classifier", "scores"})
NAMING = _IMAGES | _FILES | {"weights"}
"""Settings that may name what an earlier step has made."""

_NO_SETTINGS = ("config", "help", "print_config")
_EXAMPLE = "`- fit semantic: {source: good/, out: detector}`"


@dataclass(frozen=True)
class Step:
    """One command of a chain.

    Attributes:
        number: from 1 on.
        name: as written, such as `fit posthoc`.
        command: the part of it that is a command, `fit`.
        body: its settings, as in a file for `--config`; what earlier steps have made stands there by its name.
        made: the names of what earlier steps make.
    """

    number: int
    name: str
    command: str
    body: Mapping[str, Any]
    made: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.number} ({self.name})"

    @property
    def out(self) -> str:
        """The name of what it makes."""
        return str(self.body["out"])

    @property
    def uses(self) -> set[str]:
        """The names of earlier steps' work that it goes on from."""
        return {name for _, given in _naming(self.body) if (name := _parted(given, self.made)[0]) is not None}

    def words(self, folder: Path | None = None) -> list[str]:
        """What is typed after `farout`; with `folder`, what steps make is within it."""
        body = {key: value if folder is None else self._within(folder, key, value) for key, value in self.body.items()}
        typed = [p.name for p in _typed(self.command) if body.get(p.name) is not None]
        rest = [word for key, value in body.items() if key not in typed for word in flags(key, value)]
        return [*self.name.split(), *(text(body[name]) for name in typed), *rest]

    def _within(self, folder: Path, key: str, value: Any) -> Any:
        if key == "out":
            return str(folder / str(value))
        if key not in NAMING:
            return value
        if isinstance(value, list):
            return [self._within(folder, key, each) for each in value]
        name, rest = _parted(value, self.made) if isinstance(value, str) else (None, "")
        return value if name is None else f"{folder / name}{rest}"

    def call(self, folder: Path | None = None, *more: str) -> functools.partial[Any]:
        """Its command, parsed, with `more` words; see `words`. Raises FaroutError as typing it would."""
        words = self.words(folder)[len(self.command.split()) :]
        return parsers.parse(self.command, [*words, *more])

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All its settings, see `settings_of`."""
        return settings_of(self.call())


def chains() -> dict[str, Path]:
    """The built-in chains by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "chains").glob("*.yaml"))}


def step_names(given: str) -> list[str]:
    """The commands of a chain, as its file has them, unchecked."""
    return [str(next(iter(item))) for item in _content(given)["steps"]]


def read_steps(given: str) -> list[Step]:
    """The steps of a chain.

    Args:
        given: the name of a built-in chain, or a YAML file.

    Raises FaroutError that names the step: for what is no command, settings that it has not or that are out of range,
    an `out` that is missing or used twice, the name of what a later step makes, and images and models that are neither
    there nor made before.
    """
    content = _content(given)
    steps: list[Step] = []
    for number, item in enumerate(content["steps"], 1):
        steps.append(_step(number, item, content.get("source"), steps))
    for step in steps:
        _check(step, [each.out for each in steps])
    return steps


def _content(given: str) -> dict[str, Any]:
    path = chains().get(given, Path(given))
    if not path.is_file():
        raise FaroutError(f"{given!r} is neither a file nor a built-in chain; {suggest_names(given, chains())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FaroutError(f"{given} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list) or not content["steps"]:
        raise FaroutError(f"{given} has no steps; expected YAML with `steps:`, and in that list e.g. {_EXAMPLE}")
    unknown = [key for key in content if key not in ("source", "steps")]
    if unknown:
        raise FaroutError(f"{given} has the unknown key {unknown[0]!r}; expected source and steps")
    return content


def _step(number: int, item: Any, source: Any, before: Sequence[Step]) -> Step:
    """One item of the list, with the source that all share where it wants one and names none."""
    if not isinstance(item, dict) or len(item) != 1:
        raise FaroutError(f"step {number} is {item!r}; expected one command with its settings, such as {_EXAMPLE}")
    name, given = str(next(iter(item))), next(iter(item.values()))
    title = f"step {number} ({name})"
    command = _command(name, title)
    if not isinstance(given, dict):
        raise FaroutError(f"{title} holds {given!r}; expected settings, such as {_EXAMPLE}")
    body = {str(key).replace("-", "_"): value for key, value in given.items()}
    typed = _typed(command)
    if source is not None and any(p.name == "source" for p in typed):
        body = {"source": source, **body}
    _check_body(title, body, typed)
    for step in before:
        if step.out.casefold() == str(body["out"]).casefold():
            raise FaroutError(f"{title} has the same out {body['out']!r} as {step}; give each step its own")
    return Step(number, name, command, body, tuple(step.out for step in before))


def _command(name: str, title: str) -> str:
    """The command that a step's name begins with; raises FaroutError for what is none, or makes nothing."""
    found = named_command(name.split())
    able = [each for each in COMMANDS if each not in ("list", "chain") and "out" in _parameters(each)]
    if found is None:
        raise FaroutError(f"{title}: there is no command {name!r}; {suggest_names(name, able)}")
    if found not in able:
        raise FaroutError(f"{title}: {found} has no out and cannot be a step; possible steps: {', '.join(able)}")
    method = "method" in _parameters(found)
    if len(name.split()) != len(found.split()) + method:
        raise FaroutError(f"{title}: there is no command {name!r}; expected {found}{' METHOD' * method}")
    return found


def _parameters(command: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(parsers.function_of(command)).parameters


def _typed(command: str) -> list[inspect.Parameter]:
    """What is typed without a flag; the method is part of the step's name."""
    return [p for p in parsers.positional(parsers.function_of(command)) if p.name != "method"]


def _check_body(title: str, body: Mapping[str, Any], typed: Sequence[inspect.Parameter]) -> None:
    for name in _NO_SETTINGS:
        if name in body:
            raise FaroutError(f"{title}: {name} is not a setting of a step; leave it out")
    wanted = [*(p.name for p in typed if p.default is p.empty), "out"]
    missing = [name for name in wanted if body.get(name) is None]
    if missing:
        raise FaroutError(f"{title} lacks {' and '.join(missing)}; it requires {', '.join(wanted)}")
    for name in (p.name for p in typed):
        if isinstance(body.get(name), list | dict):
            raise FaroutError(f"{title}: {name} is {body[name]!r}; expected a single string")
    if not re.fullmatch(r"\w[\w.+ -]*", str(body["out"])):
        raise FaroutError(f"{title} has the out {body['out']!r}; expected a plain name, such as detector")


def _check(step: Step, outs: Sequence[str]) -> None:
    """Parses a step, and looks for what it names."""
    for key, given in _naming(step.body):
        name = _parted(given, outs[step.number - 1 :])[0]
        if name is not None:
            later = f"step {outs.index(name) + 1}, which runs later"
            raise FaroutError(f"{step}: {key} names {name!r}, the out of {later}; for a path write ./{given}")
    try:
        _ = step.settings
        for key, given in _naming(step.body):
            if _parted(given, step.made)[0] is None:
                _look_for(key, given)
    except FaroutError as error:
        raise FaroutError(f"{step}: {error}") from error


def _look_for(key: str, given: str) -> None:
    """Raises FaroutError for what is not on this machine; what a hub may have is left to the step."""
    if key in _FILES and not given.startswith("hf://") and not Path(given).exists():
        raise FaroutError(f"{key} is {given!r}, which neither exists nor is the out of an earlier step")
    if key in _IMAGES and not catalog.on_a_hub(given):
        open_source(given)


def _naming(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that may name what steps make, one text after the other."""
    for key in (key for key in body if key in NAMING):
        values = body[key] if isinstance(body[key], list) else [body[key]]
        yield from ((key, value) for value in values if isinstance(value, str))


def _parted(given: str, names: Sequence[str]) -> tuple[str | None, str]:
    """One of the names, and what follows it: a path or a variant, `again@vflip`; None where it begins otherwise."""
    found = re.fullmatch(r"([^/\\@]+)(.*)", given)
    return (found[1], found[2]) if found and found[1] in names else (None, "")
