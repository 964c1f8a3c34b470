"""The parser of each command, made from the signature of its function.

Presets override defaults, a YAML file overrides presets, and flags override the file. The parameters of a function are

- positional arguments, if they are before the `*` of the signature;
- `settings`, `reading`, `ray` and `runtime`: dataclasses whose fields are flags (`--device`). A `runtime` that is a
  dict has only the fields that are given, and the others are taken from a fitted detector;
- `model`, `training` and `exposure`: dataclasses whose fields are flags with a prefix (`--training.steps`);
- `arguments`: the parameters of the constructor of a detector or synthesizer, which are flags;
- else flags.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import docstring_parser

from farout.cli.argument_parser import Parser
from farout.cli.command_table import COMMANDS, import_object
from farout.cli.terminal import print_text
from farout.core.config import flatten_config
from farout.core.errors import FaroutError, UsageError, suggest_names
from farout.core.names import expand_path
from farout.core.registry import RegisteredMethod
from farout.core.remote_files import is_url
from farout.core.runtime import Runtime

__all__ = [
    "CommandParser",
    "ParsedCommand",
    "command_parameters",
    "is_list",
    "parse",
    "parse_settings",
    "positional_parameters",
]

_PREFIXED = ("model", "training", "exposure")
_SHORT_FORMS = {
    "training.device": "device",
    "training.precision": "precision",
    "training.batch_size": "batch_size",
    "exposure.loss": "loss",
}
"""Flags of `farout train` that may be written without their prefix."""
_NETWORK_FLAGS = {
    "diffusion": ("diffusion_preset", "model", "training"),
    "classifier": ("classifier_preset", "classifier_steps"),
}
"""Networks that `farout fit` trains if they are not given, and the flags of that training."""
_PRESET_HELP = "{what}: {names}; other flags override them"


@dataclass(frozen=True)
class ParsedCommand:
    """A command with all its settings; calling it runs the command.

    Attributes:
        function: the function behind the command.
        arguments: its keyword arguments.
        settings: the value of every flag by its name, presets and defaults included, as JSON values.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __call__(self) -> Any:
        """Runs the command and returns its result."""
        return self.function(**self.arguments)


def parse(name: str, words: Sequence[str]) -> ParsedCommand:
    """Parses the words after a command's name; no model or image is loaded.

    Raises UsageError for wrong usage, FaroutError for settings out of range or that exclude each other; exits with
    status 0 after --help.
    """
    if not COMMANDS[name].methods:
        return CommandParser(name).parse(words)
    methods = import_object(COMMANDS[name].methods)
    if words and not words[0].startswith("-"):
        try:
            method = methods[words[0]]
        except FaroutError as error:
            raise UsageError(str(error)) from error
        return CommandParser(name, method).parse(words[1:])
    usage = f"farout {name} METHOD {_usage(command_parameters(name))}"
    if {"-h", "--help"} & set(words):
        print_text(f"usage: {usage}\n\n{COMMANDS[name].summary}\n\nmethods:")
        print_text(*(f"  {method.name:<18}{method.description}" for method in methods.values()), sep="\n")
        print_text(f"\n`farout {name} METHOD --help` shows the settings.")
        raise SystemExit(0)
    raise UsageError(f"expected `{usage}`; `farout {name} --help` lists the methods")


def parse_settings(name: str, settings: Mapping[str, Any], method: str | None = None) -> ParsedCommand:
    """Parses settings as in a YAML file for `--config` instead of words; see `parse`."""
    chosen = None if method is None else import_object(COMMANDS[name].methods)[method]
    return CommandParser(name, chosen).parse(settings)


def command_parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the function behind a command."""
    return inspect.signature(import_object(COMMANDS[name].function)).parameters


def positional_parameters(parameters: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters of a command that are typed without a flag; METHOD is part of the command."""
    return [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("method", "out")]


def is_list(parameter: inspect.Parameter) -> bool:
    """Whether a positional parameter takes one or more words."""
    return str(parameter.annotation).startswith("Sequence[")


def _required_flags(parameters: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    composed = {"arguments", "settings", "ray", "reading", "runtime"}
    flags = [p for p in parameters.values() if (p.kind is p.KEYWORD_ONLY or p.name == "out") and p.name not in composed]
    return [p for p in flags if p.default is p.empty]


def _usage(parameters: Mapping[str, inspect.Parameter]) -> str:
    positional = [
        f"{p.name.upper()}{'...' * is_list(p)}" if p.default is p.empty else f"[{p.name.upper()}]"
        for p in positional_parameters(parameters)
    ]
    return " ".join([*positional, *(f"--{p.name} DIR" for p in _required_flags(parameters)), "[settings]"])


class CommandParser:
    """The parser of one command, and of one method if the command has methods."""

    def __init__(self, name: str, method: RegisteredMethod | None = None) -> None:
        self.name, self.command = name, COMMANDS[name]
        self.function: Callable[..., Any] = import_object(self.command.function)
        self.parameters = inspect.signature(self.function).parameters
        self.hints = typing.get_type_hints(self.function)
        self.method = _load_class(method)
        self.method_name = None if method is None else method.name
        self.presets: Mapping[str, Any] = (
            import_object(self.command.presets) if self.command.presets else getattr(self.method, "presets", {})
        )
        requires = self.method.requirements if name == "fit" else None
        self.trains_images = requires is not None and requires.diffusion == "images"
        self.skipped_parameters = {"preset"}  # `_build` adds --preset itself, with the names of the presets
        if requires is not None:
            self.skipped_parameters |= set() if requires.diffusion is not None else {"diffusion", "link"}
            self.skipped_parameters |= set() if self.trains_images else {"model", "training"}
            self.skipped_parameters |= set() if requires.classifier else {"classifier", *_NETWORK_FLAGS["classifier"]}
        elif self.method is not None and len(self.method.stages) == 1:
            self.skipped_parameters |= {"stage"}
        self.groups = {
            key: config
            for key in self.parameters
            if key not in self.skipped_parameters and (config := self._dataclass_of(key))
        }
        self.parser = self._build(method)
        defaults = self.parser.get_defaults()
        self.network_defaults = {
            name: value for name, value in vars(defaults.as_flat()).items() if name.partition(".")[0] in _PREFIXED
        }
        self._apply_presets(defaults)

    def _dataclass_of(self, parameter: str) -> type | None:
        """The dataclass whose fields are the flags of a parameter; None: the parameter is a flag."""
        if parameter == "runtime":
            return Runtime
        hint = self.hints[parameter]
        types = [each for each in (hint, *typing.get_args(hint)) if isinstance(each, type)]
        return next((each for each in types if is_dataclass(each)), None)

    def _build(self, method: RegisteredMethod | None) -> Parser:
        name = self.name if method is None else f"{self.name} {method.name}"
        description = self.command.summary if method is None else method.description
        parser = Parser(f"farout {name}", self.command.usage or _usage(self.parameters), description)
        docs = docstring_parser.parse(inspect.getdoc(self.function) or "").params
        help_of = {entry.arg_name: " ".join((entry.description or "").split()) for entry in docs}
        required, positional = _required_flags(self.parameters), positional_parameters(self.parameters)
        for parameter in required:
            parser.add_argument(f"--{parameter.name}", type=str, required=True, help=help_of.get(parameter.name))
        for parameter in positional:
            count = {} if parameter.default is parameter.empty else {"nargs": "?"}
            count = {"nargs": "+"} if is_list(parameter) else count
            parser.add_argument(parameter.name, type=str, help=help_of.get(parameter.name), **count)
        if self.presets:
            text = _PRESET_HELP.format(what="settings to start from", names=", ".join(self.presets))
            default = "tiny" if self.command.presets else None
            parser.add_argument("--preset", type=str, default=default, help=text)
        if self.trains_images:
            names = ", ".join(import_object(COMMANDS["train diffusion"].presets))
            text = _PRESET_HELP.format(what="settings of the diffusion model, if one is trained", names=names)
            preset = self.method.requirements.diffusion_preset
            parser.add_argument("--diffusion-preset", type=str, default=preset, help=text)
        added = {each.name for each in (*required, *positional)}
        parser.add_parameters(
            self.function, skip=added | self.skipped_parameters | {"method", "arguments", *self.groups}
        )
        if self.method is not None:
            nested = {key: value for key, value in self.method().config.items() if is_dataclass(value)}
            parser.add_parameters(self.method, skip=nested)
            for key, value in nested.items():
                parser.add_parameters(type(value), prefix=key)
            parser.set_defaults(flatten_config(nested))  # a method may have other defaults than the dataclass
        for key, config in self.groups.items():
            parser.add_parameters(config, skip=self._skipped_fields(key), prefix=key if key in _PREFIXED else "")
        if self.hints.get("runtime") not in (None, Runtime):
            owner = "benchmark" if self.name == "bench" else "detector"
            for name in self._flags_of("runtime"):
                action, default = parser.action_of(name), self.command.other_defaults.get(name, f"that of the {owner}")
                action.default = argparse.SUPPRESS
                action.help = f"{(action.help or '').removesuffix('.')}; default: {default}"
        if self.name.startswith("train "):
            for setting, short in _SHORT_FORMS.items():
                if setting.partition(".")[0] in self.groups:
                    parser.add_short_form(setting, short)
        return parser

    def _skipped_fields(self, key: str) -> set[str]:
        """The fields of a group that are not flags of the command."""
        if key == "settings":
            return {"diffusion_config", "training", "runtime", "reading"} | (
                self.skipped_parameters & set(_NETWORK_FLAGS["classifier"])
            )
        return {"training": {"seed"}, "runtime": set(self.command.unused_runtime)}.get(key, set())

    def _flags_of(self, key: str) -> list[str]:
        """The fields of a group without prefix that are flags."""
        names = [each.name for each in fields(self.groups[key])]
        return [name for name in names if name not in self._skipped_fields(key)]

    def parse(self, given: Sequence[str] | Mapping[str, Any]) -> ParsedCommand:
        """Parses words, or settings by name."""
        defaults = self.parser.get_defaults()
        # the partial passes only read --preset and --loss, which decide the defaults of the final pass
        chosen = self.parser.parse(given, partial=True)
        if self.name == "fit":
            _check_network_flags(vars(chosen.as_flat()), vars(defaults.as_flat()))
        self._apply_presets(chosen)
        if "exposure" in self.groups:
            # settings of the preset that the chosen loss does not use
            values = self.parser.instantiate(self.parser.parse(given, partial=True))
            unused = values["exposure"].unused_settings(
                values["outliers"] is not None, values["reconstructions"] is not None
            )
            self.parser.set_defaults({f"exposure.{name}": default for name, default in unused.items()})
        parsed = self.parser.parse(given)
        parsed.pop("config", None)
        settings = vars(parsed.as_flat())
        _check_numbers(settings)
        values = {name: _expand_home(value) for name, value in self.parser.instantiate(parsed).items()}
        arguments = self._arguments(values)
        if self.method is not None:
            self.method(**arguments["arguments"])  # raises for values out of range
        if is_url(arguments.get("out")) and arguments.get("engine") != "ray":
            raise UsageError(
                f"--out {arguments['out']} is a URL, to which only `farout score --engine ray` writes; give a folder"
            )
        if self.command.check:
            import_object(self.command.check)(**arguments)
        return ParsedCommand(self.function, arguments, {name: _to_json(value) for name, value in settings.items()})

    def _apply_presets(self, chosen: Any) -> None:
        """Makes the settings of the chosen presets the defaults.

        The default preset was applied before another one is chosen, so that a training preset first restores the
        defaults of all settings that it does not name.
        """
        if self.trains_images:
            presets = import_object(COMMANDS["train diffusion"].presets)
            self.parser.set_defaults({**self.network_defaults, **_preset_flags(presets, chosen["diffusion_preset"])})
        if self.command.presets:
            self.parser.set_defaults({**self.network_defaults, **_preset_flags(self.presets, chosen["preset"])})
        elif self.presets and chosen["preset"] is not None:
            if chosen["preset"] not in self.presets:
                hint = suggest_names(chosen["preset"], self.presets)
                raise UsageError(f"{self.method.__name__} has no preset {chosen['preset']!r}; {hint}")
            self.parser.set_defaults(flatten_config(self.method.from_preset(chosen["preset"]).config))

    def _arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the function from the values of the flags."""
        arguments: dict[str, Any] = {}
        for key in self.groups:
            if key in _PREFIXED:
                arguments[key] = values.pop(key)
                continue
            given = {name: values.pop(name) for name in self._flags_of(key) if name in values}
            arguments[key] = self.groups[key](**given) if is_dataclass(self.hints[key]) else given
        if self.method is not None:
            arguments["method"] = self.method_name
            arguments["arguments"] = {key: values.pop(key) for key in self.method().config}
        values.pop("diffusion_preset", None)
        if "preset" not in self.parameters:
            values.pop("preset", None)
        return {**arguments, **values}


def _expand_home(value: Any) -> Any:
    """Replaces `~` in paths and image sources; shells do so only at the beginning of a word, and YAML files never."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expand_home, value))
    is_below_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return str(expand_path(value)) if is_below_home else value


def _load_class(method: RegisteredMethod | None) -> Any:
    return None if method is None else method.load()


def _preset_flags(presets: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a training preset by flag."""
    if name not in presets:
        raise UsageError(f"there is no training preset {name!r}; {suggest_names(name, presets)}")
    return {f"{part}.{key}": value for part, values in presets[name].items() for key, value in values.items()}


def _check_network_flags(chosen: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of the training of a network that is given."""
    for network, parts in _NETWORK_FLAGS.items():
        changed = [key for key in chosen if key.partition(".")[0] in parts and chosen[key] != defaults.get(key)]
        if chosen.get(network) is not None and changed:
            flag = changed[0].replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --{network}, which is not trained; leave one out")


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UsageError for NaN, which is neither below nor above a bound, and for a negative seed."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if any(each != each for each in (value if isinstance(value, list | tuple) else [value])):
            raise UsageError(f"{flag} must be a number, got {value}")
        if name == "seed" and value < 0:
            raise UsageError(f"{flag} must be 0 or more, got {value}")


def _to_json(value: Any) -> Any:
    """A value as JSON has it; JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.loads(json.dumps(value, default=str))
