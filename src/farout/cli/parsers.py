"""Parsers made from signatures: parameters without default are positional, the others flags; YAML in, flags override."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jsonargparse

from farout import registry
from farout.cli import commands
from farout.detectors._fitting import FitSettings
from farout.detectors.base import Runtime
from farout.diffusion.train import PRESETS, DiffusionConfig
from farout.errors import FaroutError
from farout.training_config import TrainingConfig

__all__ = ["parse"]

_RUNTIME = tuple(Runtime.__dataclass_fields__)
_COMPOSED = {"runtime", "settings", "arguments", "model", "training"}
"""Parameters of commands that are made of several flags."""


class _Parser(jsonargparse.ArgumentParser):
    """Shows flags with dashes; both spellings are taken."""

    def format_help(self) -> str:
        return re.sub(r"--[a-z_.]+", lambda flag: flag[0].replace("_", "-"), super().format_help())


def parse(name: str, function: str, words: Sequence[str]) -> Callable[[], Any]:
    """The call that the words ask for. Exits with status 2 and a message for wrong usage, 0 after --help."""
    words = [_underscored(word) for word in words]
    if name == "fit":
        return _fit(words)
    if name == "train diffusion":
        return _train_diffusion(words)
    call = getattr(commands, function)
    parser = _parser(name, call)
    composed = "runtime" in inspect.signature(call).parameters
    if composed:
        _add_runtime(parser)
    values = _values(parser, words)
    runtime = {key: values.pop(key) for key in _RUNTIME} if composed else {}
    changes = {"runtime": {key: value for key, value in runtime.items() if value is not None}} if composed else {}
    return functools.partial(call, **values, **changes)


def _underscored(word: str) -> str:
    """--batch-size=4 -> --batch_size=4; values stay."""
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _parser(name: str, call: Callable[..., Any], skip: Sequence[str] = ()) -> _Parser:
    parser = _Parser(prog=f"farout {name}", description=(inspect.getdoc(call) or "").partition("\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags override it")
    parameters = inspect.signature(call).parameters.values()
    left_out = {*skip, *(p.name for p in parameters if p.name in _COMPOSED)}
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and parameter.name == "out":
            parser.add_argument("--out", type=str, required=True, help="folder of the results")
            left_out.add("out")
    parser.add_function_arguments(call, as_positional=True, skip=left_out, fail_untyped=False)
    return parser


def _add_runtime(parser: _Parser) -> None:
    """The runtime's flags, empty unless given: a detector scores with the settings it was fitted with."""
    parser.add_class_arguments(Runtime, None)
    parser.set_defaults(dict.fromkeys(_RUNTIME))


def _values(parser: _Parser, words: Sequence[str]) -> dict[str, Any]:
    parsed = parser.parse_args(list(words))
    parsed.pop("config", None)
    return dict(parser.instantiate_classes(parsed))


def _preset(words: Sequence[str], flag: str) -> str | None:
    """The value of a preset's flag: presets are applied before YAML and flags, so they are looked for first."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _set_training_preset(parser: _Parser, name: str | None) -> None:
    chosen = name or "tiny"
    if chosen not in PRESETS:
        raise FaroutError(f"there is no training preset {chosen!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[chosen]
    nested = {f"{part}.{key}": value for part, values in preset.items() for key, value in values.items()}
    parser.set_defaults(nested)


def _add_training(parser: _Parser, flag: str) -> None:
    parser.add_class_arguments(DiffusionConfig, "model")
    parser.add_class_arguments(TrainingConfig, "training")
    parser.add_argument(f"--{flag}", type=str, default="tiny", help=f"one of {', '.join(PRESETS)}")


def _train_diffusion(words: Sequence[str]) -> Callable[[], Any]:
    parser = _parser("train diffusion", commands.train_diffusion)
    _add_training(parser, "preset")
    _set_training_preset(parser, _preset(words, "--preset"))
    values = _values(parser, words)
    values.pop("preset")
    return functools.partial(commands.train_diffusion, **values)


def _fit(words: Sequence[str]) -> Callable[[], Any]:
    """METHOD comes first: its constructor's arguments are flags beside those of the fit."""
    if not words or words[0].startswith("-"):
        known = ", ".join(registry.members("detectors"))
        _parser("fit METHOD", commands.fit, skip=["method"]).parse_args([w for w in words if w in ("-h", "--help")])
        raise FaroutError(f"farout fit wants METHOD SOURCE --out DIR; methods: {known}")
    method = registry.find("detectors", words[0]).load()
    parser = _parser(f"fit {words[0]}", commands.fit, skip=["method"])
    parser.add_class_arguments(method, None)
    settings = set(FitSettings.__dataclass_fields__) - {"network", "training", "runtime"}
    parser.add_class_arguments(FitSettings, None, skip={"network", "training", "runtime"})
    parser.add_class_arguments(Runtime, None)
    _add_training(parser, "network_preset")
    parser.add_argument("--preset", type=str, help=f"one of {', '.join(method.presets) or 'none'}")
    _set_training_preset(parser, _preset(words, "--network_preset"))
    preset = _preset(words, "--preset")
    if preset is not None:
        parser.set_defaults(method.from_preset(preset).config)
    values = _values(parser, words[1:])
    return functools.partial(_call_fit, words[0], method, settings, values)


def _call_fit(name: str, method: Any, settings: set[str], values: dict[str, Any]) -> Any:
    arguments = {key: values[key] for key in inspect.signature(method.__init__).parameters if key != "self"}
    runtime = Runtime(**{key: values[key] for key in _RUNTIME})
    chosen = FitSettings(
        **{key: values[key] for key in settings}, network=values["model"], training=values["training"], runtime=runtime
    )
    rest = {key: values[key] for key in ("source", "out", "diffusion", "classifier", "link")}
    source = rest.pop("source")
    return commands.fit(name, source, **rest, settings=chosen, arguments=arguments)
