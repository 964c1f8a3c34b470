"""A parser whose flags read as people write them: `--batch-size 4`, `--link`, `--no-controls`, `--ood A B`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse

from farout.cli.usage import UsageError
from farout.core.errors import suggest_names

__all__ = ["Flag", "Parser"]

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_METAVARS = {int: "N", float: "X"}
_LISTS = (tuple, list, abc.Sequence)
_PRINT = "print all settings as a YAML file for --config, and exit"


def _hints(what: Callable[..., Any]) -> dict[str, Any]:
    """The types of the parameters of a function, of a data class or of a class's constructor; what a constructor takes
    as `**arguments` is named by the one that they go on to.
    """
    if dataclasses.is_dataclass(what) or not isinstance(what, type):
        return typing.get_type_hints(what)
    found: dict[str, Any] = {}
    for each in what.__mro__:
        if "__init__" in vars(each) and each is not object:
            found = {**typing.get_type_hints(vars(each)["__init__"]), **found}
            if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(vars(each)["__init__"]).parameters.values()):
                break
    return found


def _choices(hint: Any) -> list[Any]:
    """The members of a union other than None, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for part in typing.get_args(hint) if part is not type(None)] if union else [hint]


def _item(hint: Any) -> Any:
    """The type of the items where a flag takes a list, else None."""
    first, *others = _choices(hint)
    return typing.get_args(first)[0] if not others and typing.get_origin(first) in _LISTS else None


def _wanted(hint: Any) -> str:
    """A type in words."""
    parts = []
    for part in _choices(hint):
        if typing.get_origin(part) is Literal:
            parts += [str(value) for value in typing.get_args(part)]
        elif typing.get_origin(part) in _LISTS:
            parts.append(f"a list of {_NAMES.get(typing.get_args(part)[0], 'values').split()[-1]}s")
        else:
            parts.append(_NAMES.get(part, str(part)))
    return " or ".join(parts)


class _Help(jsonargparse.DefaultHelpFormatter):
    """Descriptions and defaults, without the types' Python spelling."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if getattr(action, "_jsonargparse_preexpanded_help", False):
            return action.help or ""
        text = (action.help or "").removesuffix(".")
        default = _shown(action.default)
        return f"{text} (default: {default})".strip() if default and action.option_strings else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        if _item(hint) is not None:
            return "A B …"
        return _METAVARS.get(_choices(hint)[0], super()._get_default_metavar_for_optional(action))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The flag once: with dashes, without jsonargparse's appending twin, a switch without its value."""
        kept = (action.option_strings, action.metavar, action.nargs)
        action.option_strings = [flag for flag in kept[0] if not flag.endswith("+")]
        if getattr(action, "_typehint", None) is bool:
            action.nargs = 0
            if action.default is not False:
                action.option_strings = [f"--[no-]{flag[2:]}" for flag in action.option_strings]
        elif str(action.metavar).startswith("["):
            action.metavar = None
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings, action.metavar, action.nargs = kept

    def start_section(self, heading: str | None) -> None:
        """Headings are first sentences."""
        super().start_section(heading and heading.partition(". ")[0])


def _shown(default: Any) -> str:
    """A default as it would be written; empty for none."""
    if isinstance(default, bool):
        return "on" if default else ""
    if default is None or default == () or default == argparse.SUPPRESS:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag or an argument in words: its name, how it is written, what it is unless given, and what it means."""

    name: str
    written: str
    default: str
    meaning: str


def _told(action: argparse.Action) -> Flag:
    """An action in words."""
    hint = getattr(action, "_typehint", None)
    meaning = " ".join((action.help or "").split()).removesuffix(".")
    if not action.option_strings:
        return Flag(action.dest, action.dest.upper(), "", meaning)
    flag = _dashed(action.option_strings[0])
    if hint is bool:
        # without a default it is as something else says, such as a fitted detector, and may be turned off
        written = flag if action.default is False else f"--[no-]{flag[2:]}"
        default = "" if action.default is None else "on" if action.default else "off"
    else:
        written, default = f"{flag} {_value(hint, action.dest)}", _shown(action.default)
    return Flag(action.dest, written, default, meaning)


def _value(hint: Any, name: str) -> str:
    """What follows a flag of this type."""
    first = _choices(hint)[0]
    if typing.get_origin(first) is Literal:
        return f"{{{','.join(map(str, typing.get_args(first)))}}}"
    return "A B …" if _item(hint) is not None else _METAVARS.get(first, name.rpartition(".")[2].upper())


def _dashed(text: str) -> str:
    """Flags with dashes."""
    return re.sub(r"--[][a-z_.-]+", lambda flag: flag[0].replace("_", "-"), text)


class Parser(jsonargparse.ArgumentParser):
    """Flags made from signatures; wrong usage raises `UsageError` with one line."""

    def __init__(self, *, heading: str = "", **settings: Any) -> None:
        fixed: dict[str, Any] = {"formatter_class": _Help, "exit_on_error": False, "allow_abbrev": False}
        super().__init__(**{**fixed, **settings})
        self.heading = heading
        self.hints: dict[str, Any] = {}

    def take(self, what: Callable[..., Any], prefix: str | None = None, skip: Sequence[str] = ()) -> None:
        """Adds the parameters of a function (those without default are positional) or of a class."""
        if isinstance(what, type):
            self.add_class_arguments(what, prefix, skip=set(skip))
            for action in (each for each in self._actions if prefix and each.dest == prefix):
                action.help = "YAML file of the settings below"
        else:
            self.add_function_arguments(what, as_positional=True, skip=set(skip), fail_untyped=False)
        start = f"{prefix}." if prefix else ""
        self.hints |= {start + name: hint for name, hint in _hints(what).items() if name not in {*skip, "return"}}
        self._describe(inspect.getdoc(what) or "", start)

    def _describe(self, text: str, start: str) -> None:
        """Help of parameters that a docstring describes together: `low, high: use levels between them`."""
        found = re.findall(r"^ +(\w+(?:, \w+)+): (.+(?:\n {8,}.+)*)", text, re.MULTILINE)
        helps = {start + name: " ".join(words.split()) for names, words in found for name in names.split(", ")}
        for action in self._actions:
            if action.dest in helps and action.help is None:
                action.help = helps[action.dest]

    def add_config(self) -> None:
        """`--config` and `--print-config`."""
        self.add_argument("--config", action="config", help="YAML file of settings; flags override it")
        for action in self._actions:
            if "--print_config" in action.option_strings:
                action.help, action.metavar = _PRINT, ""

    def read(self, words: Sequence[str]) -> jsonargparse.Namespace:
        """Parses; raises UsageError."""
        try:
            return self.parse_args(self._spelled(list(words)))
        except argparse.ArgumentError as error:
            raise UsageError(f"{self._explained(str(error))} (see `{self.prog} --help`)") from error

    def glance(self, words: Sequence[str]) -> jsonargparse.Namespace:
        """As `read`, for settings that others depend on: nothing is printed, and what must be given may be missing."""
        must = [action for action in self._actions if action.required]
        for action in must:
            action.required = False
        try:
            return self.read([word for word in words if not word.replace("_", "-").startswith("--print-config")])
        finally:
            for action in must:
                action.required = True

    def format_help(self, *arguments: Any, **settings: Any) -> str:  # a formatter, in newer versions
        """Flags with dashes; the command's own parameters under a plain heading."""
        text = (
            super()
            .format_help(*arguments, **settings)
            .replace(f"\n{self.heading.removesuffix('.')}:\n", "\narguments:\n")
        )
        return _dashed(text)

    def sections(self) -> dict[str, list[Flag]]:
        """What `--help` shows, by its headings."""
        return {
            (group.title or "").partition(". ")[0]: [
                _told(action) for action in group._group_actions if action.help != argparse.SUPPRESS
            ]
            for group in self._action_groups
        }

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Argparse's own way out, which prints the usage, is not taken."""
        raise argparse.ArgumentError(None, message) from ex

    def _spelled(self, words: list[str]) -> list[str]:
        """The words as jsonargparse wants them: files of settings first, for what comes later overrides."""
        files: list[str] = []
        spelled: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--config" and words:
                files.append(f"--config={words.pop(0)}")
            elif word.startswith("--config="):
                files.append(word)
            elif word.startswith("--") and word != "--":
                spelled += self._flag(word, words)
            else:
                spelled.append(word)
        return files + spelled

    def _flag(self, word: str, words: list[str]) -> list[str]:
        """One flag; takes its values from the front of `words` where they need another spelling."""
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        hint = self.hints.get(name)
        if type(None) in typing.get_args(hint):  # descriptions say None, YAML says null
            value = "null" if value == "None" else value
            words[:1] = ["null"] if words[:1] == ["None"] else words[:1]
        if _item(hint) is not None:
            return self._listed(name, [value] if equals else _taken(words, numbers=_item(hint) is not str))
        if not equals and hint is bool:
            return [f"--{name}={words.pop(0) if words[:1] in (['true'], ['false']) else 'true'}"]
        if not equals and name.startswith("no_") and self.hints.get(name[3:]) is bool:  # --no-controls
            return [f"--{name[3:]}=false"]
        return [f"--{name}{equals}{value}"]

    def _listed(self, name: str, values: list[str]) -> list[str]:
        """`A B` becomes one JSON list; `[A,B]` and null stay."""
        if not values:
            return [f"--{name}"]
        if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
            return [f"--{name}={values[0]}"]
        plain = _item(self.hints[name]) is not str
        return [f"--{name}={'[' + ','.join(values) + ']' if plain else json.dumps(values)}"]

    def _explained(self, message: str) -> str:
        """One line out of jsonargparse's several."""
        found = re.match(r'Parser key "([^"]+)":', message)
        hint = self.hints.get(found[1]) if found else None
        missing = re.match(r"the following arguments are required: (.*)", message)
        if missing:
            flags = {action.dest for action in self._actions if action.option_strings}
            return "missing " + ", ".join(f"--{n}" if n in flags else n.upper() for n in missing[1].split(", "))
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        if unknown:
            word, known = unknown[1].replace("_", "-"), [name.replace("_", "-") for name in self.hints]
            return f"there is no flag --{word}; {suggest_names(word, known)}"
        if found is None or hint is None:
            return " ".join(message.split())
        given = re.findall(r"(?:Got value|Given value): (.*)", message)
        flag = found[1].replace("_", "-")
        return f"--{flag} must be {_wanted(hint)}{f', got {given[-1]}' if given else ''}"


def _taken(words: list[str], *, numbers: bool) -> list[str]:
    """Takes the values that follow a flag from the front of `words`: up to the next flag, or word where numbers end."""
    taken: list[str] = []
    while words and not re.match(r"--?[A-Za-z]", words[0]):
        if numbers and taken and not re.match(r"-?[0-9.]", words[0]):
            break
        taken.append(words.pop(0))
    return taken
