"""jsonargparse with the spelling of flags that is usual on a command line: `--batch-size 4`, `--maps`, `--ood A B`."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse._actions import _ActionConfigLoad

from farout.core.errors import UsageError, suggest_names
from farout.core.names import encode_file_name, find_path
from farout.core.yaml_files import YAMLError, describe_kind, dump_yaml, parse_yaml, read_yaml

__all__ = ["Parser", "format_default", "format_usage", "list_item_type"]

_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_VALUE_NAMES = {int: "N", float: "X"}
_LIST_TYPES = (tuple, list, abc.Sequence)


_PARSER_MODE = "farout"
_IMPORTING_KEYS = frozenset({"class_path", "init_args", "dict_kwargs", "__path__"})
"""Keys with a meaning for jsonargparse, which imports the object that a class_path names."""


def _parse_value(text: str) -> Any:
    """The value of a word on the command line, by the same rules as in YAML files."""
    value = parse_yaml(text, "the value")
    # `#x`, `&x` and `x:` are empty in YAML, but here more likely the name of something
    return text if value is None and text != "null" else value


jsonargparse.set_loader(_PARSER_MODE, _parse_value, (YAMLError,))


class Parser(jsonargparse.ArgumentParser):
    """A parser whose flags are the parameters of functions and classes; wrong usage raises UsageError.

    Args:
        command: what is typed before the settings, such as `farout fit knn`.
        arguments: the arguments for the usage line.
        description: one line about the command.
    """

    def __init__(self, command: str, arguments: str, description: str) -> None:
        super().__init__(
            parser_mode=_PARSER_MODE,
            prog=command,
            usage=f"{command} {arguments}",
            description=description,
            formatter_class=_HelpFormatter,
            exit_on_error=False,
            allow_abbrev=False,
            print_config="--print-config",
        )
        self.add_argument("--config", action="config", help="YAML file of settings; flags override it")
        self.action_of("print_config").help = "print all settings as a YAML file for --config, and exit"

    # jsonargparse uses this method also for its groups of arguments
    def add_argument(self, *names: str, **options: Any) -> Any:
        """Adds an argument: `--batch-size` for batch_size, `--maps` and `--no-maps` for a bool."""
        if names and names[0].startswith("--") and names[0] != "--print_shtab":
            names = tuple(name.replace("_", "-") for name in names)
            if options.get("type") is bool:
                del options["type"]
                options["action"] = jsonargparse.ActionYesNo(no_prefix="no-")
        return super().add_argument(*names, **options)

    def add_parameters(self, function: Callable[..., Any], skip: Collection[str] = (), prefix: str = "") -> None:
        """Adds the keyword parameters of a function, or the parameters of a class.

        Args:
            function: a function, or a class, whose parameters have type hints and are described in its docstring.
            skip: names of parameters that are not flags.
            prefix: `training` adds `--training.steps` for the parameter `steps`.
        """
        if isinstance(function, type):
            self.add_class_arguments(function, prefix or None, skip=set(skip))
        else:
            self.add_function_arguments(function, skip=set(skip))
            self._action_groups[-1].title = "settings"
        if prefix and prefix in {action.dest for action in self._actions}:
            self.action_of(prefix).help = argparse.SUPPRESS  # `--training FILE.yaml`; `--config` does the same
        # docstrings may describe several parameters together (`low, high: …`), which jsonargparse does not read
        described = re.findall(r"^ +(\w+(?:, \w+)+): (.+(?:\n {8,}.+)*)", inspect.getdoc(function) or "", re.MULTILINE)
        for names, text in described:
            for name in names.split(", "):
                action = self.action_of(f"{prefix}.{name}" if prefix else name)
                action.help = action.help or " ".join(text.split())

    def add_short_form(self, name: str, short: str) -> None:
        """Adds a second flag for the same setting: `--device` for `--training.device`."""
        action = self.action_of(name)
        flag = f"--{short.replace('_', '-')}"
        action.option_strings = [*action.option_strings, flag]
        self._option_string_actions[flag] = action

    def action_of(self, name: str) -> argparse.Action:
        """The action that sets a setting."""
        return next(action for action in self._actions if action.dest == name)

    def parse(self, given: Sequence[str] | Mapping[str, Any], *, partial: bool = False) -> jsonargparse.Namespace:
        """Parses words, or settings as in a YAML file; raises UsageError.

        Args:
            given: words of the command line, or settings by name.
            partial: for settings that others depend on, such as a preset: required ones may be missing, and nothing
                is printed.
        """
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = not partial
        try:
            if isinstance(given, Mapping):
                parsed = self.parse_object(self._check_types(_normalize_keys(given)))
            else:
                words = [word for word in given if not (partial and word.startswith("--print-config"))]
                parsed = self.parse_args(self._rewrite_words(words))
            self._refuse_nothing(vars(parsed.as_flat()))
            return parsed
        except argparse.ArgumentError as error:
            raise UsageError(f"{self._explain(str(error))} (see `{self.prog} --help`)") from error
        finally:
            for action in required:
                action.required = True

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ArgumentError instead of printing the usage and exiting."""
        raise argparse.ArgumentError(None, message) from ex

    def flags(self) -> Iterator[tuple[str, argparse.Action]]:
        """The actions that `--help` shows, each with the title of its group."""
        for group in self._action_groups:
            for action in group._group_actions:
                if action.help != argparse.SUPPRESS:
                    yield (group.title or "").partition(". ")[0], action

    def _rewrite_words(self, words: Sequence[str]) -> list[str]:
        """Writes lists as jsonargparse reads them, `--ood A B` as `--ood=["A","B"]`, None as `null`, and `--config`
        first, because what comes later overrides.
        """
        rest, files, joined = list(words), list[str](), list[str]()
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            is_group = isinstance(action, _ActionConfigLoad)
            if (flag == "--config" or is_group) and (equals or rest):
                settings = _read_settings(value if equals else rest.pop(0))
                settings = settings if is_group else self._check_types(settings)
                line = dump_yaml(settings, default_flow_style=True, width=math.inf).strip()
                (joined if is_group else files).append(f"{flag}={line}")
                continue
            item = None if action is None else list_item_type(action)
            if item is None:
                is_none = value == "None" if equals else rest[:1] == ["None"]
                if is_none and action is not None and type(None) in typing.get_args(_type_of(action)):
                    joined.append(f"{flag}=null")  # descriptions say None, YAML says null
                    del rest[: 0 if equals else 1]
                elif action is not None and not equals and re.match(r"-[0-9.]", rest[0] if rest else ""):
                    joined.append(f"{flag}={rest.pop(0)}")  # argparse takes -1000:3000 for a flag
                else:
                    joined.append(word)
                continue
            values = [value] if equals else []
            while not equals and rest and not re.match(r"--?[A-Za-z]", rest[0]):
                if values and item is not str and not re.match(r"-?[0-9.]", rest[0]):
                    break  # `--levels 50 200 images/`: the folder is not a level
                values.append(rest.pop(0))
            if len(values) == 1 and (re.fullmatch(r"\[.*\]", values[0], re.DOTALL) or values[0] == "null"):
                joined.append(f"{flag}={values[0]}")
            elif values:
                items = map(_quote_text, values) if item is str else values
                joined.append(f"{flag}=[{','.join(items)}]")
            else:
                joined.append(flag)
        return files + joined

    def _check_types(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a file, with a whole number as text where text is expected, such as a folder called 2024.

        Raises UsageError for text instead of nested settings: jsonargparse would take it for a class or a file.
        """
        checked = dict(settings)
        for action in self._actions:
            value = settings.get(action.dest)
            if value is None:
                continue
            if isinstance(action, _ActionConfigLoad) and not isinstance(value, Mapping):
                raise UsageError(f"{action.dest} must be settings by name, got {describe_kind(value)}")
            if type(value) is int and _union_members(_type_of(action)) == [str]:
                checked[action.dest] = str(value)
            elif isinstance(value, list) and list_item_type(action) is str:
                checked[action.dest] = [str(each) if type(each) is int else each for each in value]
        return checked

    def _refuse_nothing(self, parsed: Mapping[str, Any]) -> None:
        """Raises UsageError for `alpha:` without a value, which YAML reads as None and jsonargparse accepts."""
        for action in self._actions:
            expected = _type_of(action)
            has_value = parsed.get(action.dest, action.default) is not None or action.default is None
            if not has_value and expected is not None and type(None) not in typing.get_args(expected):
                flag = next(iter(action.option_strings), action.dest)
                raise UsageError(f"{flag} must be {_describe_type(expected)}, got nothing (see `{self.prog} --help`)")

    def _explain(self, message: str) -> str:
        """Shortens a message of jsonargparse to one line."""
        flags = {action.dest: next(iter(action.option_strings), action.dest) for action in self._actions}
        if missing := re.match(r"the following arguments are required: (.*)", message):
            names = [name.strip("-") for name in missing[1].split(", ")]
            return "missing " + ", ".join(f if (f := flags.get(n, n)).startswith("-") else f.upper() for n in names)
        unknown = re.match(r"[Uu]nrecognized arguments: --([\w.-]+)", message)
        unknown = unknown or re.match(r"(?:Group '(?P<group>.+)' does not accept option|Option) '(.+?)'", message)
        if unknown:
            name = ".".join(filter(None, unknown.groups())).replace("_", "-")
            shown = [flag for flag in flags.values() if flag.startswith("--") and flag != "--print_shtab"]
            return f"there is no flag --{name}; {suggest_names(f'--{name}', shown)}"
        invalid = re.match(r'(?:Parser key|.*?key) "([^"]+)"', message)
        expected = None if invalid is None or invalid[1] not in flags else _type_of(self.action_of(invalid[1]))
        if invalid is None or expected is None:
            return " ".join(message.split())
        value = re.findall(r"(?:Got value|Given value): (.*)", message)
        return f"{flags[invalid[1]]} must be {_describe_type(expected)}{f', got {value[-1]}' if value else ''}"


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Shows flags as they are typed, their descriptions and defaults, but not the Python spelling of types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = (action.help or "").removesuffix("."), format_default(action)
        return f"{text} (default: {default})" if default and action.option_strings else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return format_usage(action)

    def start_section(self, heading: str | None) -> None:
        """Starts a group; its heading is the first sentence of a docstring."""
        super().start_section(heading and heading.partition(". ")[0])


def _read_settings(path: str) -> dict[str, Any]:
    """The settings in a YAML file; raises UsageError if it has something else."""
    try:
        content = read_yaml(find_path(path))
    except YAMLError as error:
        raise UsageError(str(error)) from error
    if not isinstance(content, dict | None):
        raise UsageError(f"{path} contains {describe_kind(content)}; expected lines of settings, such as `alpha: 0.1`")
    return _normalize_keys(content or {})


def _quote_text(text: str) -> str:
    """A text as YAML has it; file names that are not UTF-8, which YAML cannot contain, are encoded like keys."""
    if re.search("[\ud800-\udfff]", text):
        text = encode_file_name(text)
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\ufeff\ufffe\uffff]", lambda sign: f"\\u{ord(sign[0]):04x}", quoted)


def _normalize_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `batch-size` as batch_size."""
    for key in settings:
        if key in _IMPORTING_KEYS:
            raise UsageError(f"there is no setting {key!r}")
    return {
        str(key).replace("-", "_"): _normalize_keys(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
    }


def format_usage(action: argparse.Action) -> str:
    """How an argument is typed: `source`, `--batch-size N`, `--levels A B …`, `--[no-]cache`."""
    if not action.option_strings:
        return action.dest
    flags = [flag for flag in action.option_strings if not flag.endswith("+") and not flag.startswith("--no-")]
    if isinstance(action, jsonargparse.ActionYesNo):
        return flags[0] if action.default is False else f"--[no-]{flags[0].removeprefix('--')}"
    if action.nargs == 0 or action.dest == "print_config":
        return ", ".join(flags)
    first = _union_members(_type_of(action))[0]
    if list_item_type(action) is not None:
        value = "A B …"
    elif typing.get_origin(first) is Literal:
        value = f"{{{','.join(map(str, typing.get_args(first)))}}}"
    else:
        value = _VALUE_NAMES.get(first, action.dest.rpartition(".")[2].upper())
    return f"{', '.join(flags)} {value}"


def format_default(action: argparse.Action) -> str:
    """The default of an argument as it would be typed; empty if there is none."""
    default = action.default
    if isinstance(default, bool):
        return "on" if default else ""
    if default is None or default == () or default == argparse.SUPPRESS:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def list_item_type(action: argparse.Action) -> Any:
    """The type of the items if an argument takes a list, else None."""
    first, *others = _union_members(_type_of(action))
    return typing.get_args(first)[0] if not others and typing.get_origin(first) in _LIST_TYPES else None


def _type_of(action: argparse.Action) -> Any:
    if isinstance(action, jsonargparse.ActionYesNo):
        return bool
    return getattr(action, "_typehint", action.type)


def _union_members(hint: Any) -> list[Any]:
    """The members of a union other than None, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [member for member in typing.get_args(hint) if member is not type(None)] if is_union else [hint]


def _describe_type(hint: Any) -> str:
    """A type in an error message: `a whole number or auto`."""
    parts = []
    for member in _union_members(hint):
        if typing.get_origin(member) is Literal:
            parts += [str(value) for value in typing.get_args(member)]
        elif typing.get_origin(member) in _LIST_TYPES:
            parts.append(f"a list of {_TYPE_NAMES.get(typing.get_args(member)[0], 'values').split()[-1]}s")
        else:
            parts.append(_TYPE_NAMES.get(member, str(member)))
    return " or ".join(parts)
