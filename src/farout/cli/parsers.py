"""Parsers made from signatures: flags with defaults are settings, presets lie under YAML, and YAML under flags."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from farout.classifiers.outlier_exposure import Exposure
from farout.classifiers.train import PRESETS as CLASSIFIERS
from farout.classifiers.train import ClassifierConfig, train_classifier
from farout.cli import commands, generation
from farout.cli.command_table import COMMANDS
from farout.cli.flags import Parser
from farout.cli.usage import UsageError
from farout.core.config import flat
from farout.core.errors import suggest_names
from farout.core.registry import RegisteredMethod, Registry
from farout.core.runtime import Runtime
from farout.detectors import DETECTORS
from farout.detectors.fit_settings import FitSettings
from farout.diffusion.config import PRESETS, DiffusionConfig
from farout.diffusion.train import train_diffusion
from farout.synthesis import SYNTHESIZERS
from farout.training.config import TrainingConfig

__all__ = ["function_of", "parse", "parser_of", "positional"]

_TRAININGS: dict[Callable[..., Any], tuple[dict[str, type], Mapping[str, Any]]] = {
    train_diffusion: ({"model": DiffusionConfig}, PRESETS),
    train_classifier: ({"model": ClassifierConfig, "exposure": Exposure}, CLASSIFIERS),
}
_SHORT = {"device": "training", "precision": "training", "batch_size": "training", "loss": "exposure"}
"""Settings of trainings that may be written without the part that they belong to."""
_RUNTIME = tuple(Runtime.__dataclass_fields__)
_COMPOSED = {"runtime", "settings", "arguments", "model", "training", "exposure"}
"""Keyword parameters of commands that are made of several flags."""
_NOT_FLAGS = ("network", "training", "runtime")
"""Fields of FitSettings that are flags of their own."""
_TRAINED = {
    "diffusion": ("network_preset", "model", "training"),
    "classifier": ("classifier_preset", "classifier_steps"),
}
"""Networks that `fit` trains where they are not given, and the flags that say how."""
_USAGE = {
    "evaluate": "farout evaluate DETECTOR --id SOURCE --ood SOURCE... --out DIR [settings]\n"
    "       farout evaluate --scores FILE FILE... [--out DIR]"
}


def parse(name: str, words: Sequence[str]) -> functools.partial[Any]:
    """The call that the words after a command's name ask for; what its settings alone forbid is refused here, before
    anything is loaded.

    Raises UsageError for wrong usage, FaroutError for settings out of range; exits with status 0 after --help.
    """
    if name in _METHODS:
        member = _chosen(name, words)
        return _METHODS[name].parse(member, member.load(), words[1:])
    call = function_of(name)
    return _train(name, call, words) if call in _TRAININGS else _bind(name, call, words)


def function_of(name: str) -> Callable[..., Any]:
    """The function behind a command."""
    module, _, function = COMMANDS[name].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"farout.{module}"), function)
    return found


def positional(call: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a command that are typed without a flag: those before the `*`, but `out`."""
    parameters = inspect.signature(call).parameters.values()
    return [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "out"]


def _bind(name: str, call: Callable[..., Any], words: Sequence[str]) -> functools.partial[Any]:
    """A function with the parameters that the words give it."""
    parser = _parser_for(name, call)
    values = _values(parser, parser.read(words))
    kind = _runtime_of(call)
    if kind is not None:
        runtime = {key: values.pop(key) for key in _RUNTIME if key in values}
        given = {key: value for key, value in runtime.items() if value is not None}
        values["runtime"] = Runtime(**given) if kind is Runtime else given
    if call is commands.evaluate:
        commands.what_is_rated(**values)
    return functools.partial(call, **values)


def parser_of(name: str, method: str | None = None) -> Parser:
    """The parser of a command; of one whose first word is a METHOD, that of the method's words after it.

    Raises FaroutError for an unknown method.
    """
    if name in _METHODS:
        member = _METHODS[name].registry[method or ""]
        return _METHODS[name].parser(member, member.load())
    return _parser_for(name, function_of(name))


def _parser_for(name: str, call: Callable[..., Any]) -> Parser:
    """The parser of a command by its function."""
    if call in _TRAININGS:
        return _train_parser(name, call)
    parser = _parser(name, call)
    kind = _runtime_of(call)
    if kind is Runtime:
        _add_runtime(parser)
    elif kind is not None:  # empty unless given: a detector scores with the settings it was fitted with
        parser.take(Runtime)
        parser.set_defaults(dict.fromkeys(_RUNTIME))
        owner = "the benchmark" if name == "bench" else "the detector"
        for action in (each for each in parser._actions if each.dest in _RUNTIME):
            action.help = f"{(action.help or '').removesuffix('.')}; default: {owner}'s"
    return parser


def _runtime_of(call: Callable[..., Any]) -> Any:
    """How a command takes the runtime: whole, or what was given of it; None: it takes none."""
    return typing.get_type_hints(call).get("runtime")


def _parser(name: str, call: Callable[..., Any], skip: Sequence[str] = (), about: str = "") -> Parser:
    """A parser with the parameters of a command."""
    plain, must = [p for p in positional(call) if p.name not in skip], _must(call)
    shown = [p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in plain]
    usage = _USAGE.get(name, " ".join(["farout", name, *shown, *(f"--{p.name} DIR" for p in must), "[settings]"]))
    heading = _first_line(call)
    parser = Parser(prog=f"farout {name}", usage=usage, description=about or heading, heading=heading)
    parser.add_config()
    for parameter in must:
        parser.add_argument(f"--{parameter.name}", type=str, required=True, help=_argument(call, parameter.name))
    for each in plain:
        count: dict[str, Any] = {} if each.default is each.empty else {"nargs": "?"}
        parser.add_argument(each.name, type=str, help=_argument(call, each.name), **count)
    parser.take(call, skip=[*skip, *(p.name for p in [*plain, *must]), *_composed(call)])
    return parser


def _must(call: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a command whose flags must be given."""
    typed = {*_composed(call), *(p.name for p in positional(call))}
    return [p for p in inspect.signature(call).parameters.values() if p.default is p.empty and p.name not in typed]


def _composed(call: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.name in _COMPOSED and p.kind is p.KEYWORD_ONLY]


def _first_line(call: Callable[..., Any]) -> str:
    return (inspect.getdoc(call) or "").partition("\n")[0]


def _argument(call: Callable[..., Any], name: str) -> str:
    """What the docstring says of a parameter."""
    found = re.search(rf"^ {{4}}{name}: (.+(?:\n {{8,}}.+)*)", inspect.getdoc(call) or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _add_runtime(parser: Parser) -> None:
    """The runtime's flags for what makes images; features, which are cached, are for detectors."""
    parser.take(Runtime, skip=["cache"])


def _values(parser: Parser, parsed: Any) -> dict[str, Any]:
    parsed.pop("config", None)
    _refuse_nonsense(vars(parsed.as_flat()))
    return dict(parser.instantiate_classes(parsed))


def _refuse_nonsense(settings: Mapping[str, Any]) -> None:
    """Raises UsageError for what is no number, which is neither below nor above a bound, and for a seed below 0."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if any(each != each for each in (value if isinstance(value, list | tuple) else [value])):
            raise UsageError(f"{flag} must be a number, got {value}")
        if name == "seed" and value < 0:
            raise UsageError(f"{flag} must be 0 or more, got {value}")


def _training_preset(name: str, presets: Mapping[str, Any] = PRESETS) -> dict[str, Any]:
    """Flags of a training preset."""
    if name not in presets:
        raise UsageError(f"there is no training preset {name!r}; {suggest_names(name, presets)}")
    return {f"{part}.{key}": value for part, values in presets[name].items() for key, value in values.items()}


def _method_preset(method: Any, name: str | None) -> dict[str, Any]:
    """Flags of a detector's preset."""
    if name is None:
        return {}
    if name not in method.presets:
        raise UsageError(f"{method.__name__} has no preset {name!r}; {suggest_names(name, method.presets)}")
    return flat(method.from_preset(name).config)


def _add_training(
    parser: Parser, flag: str, preset: str, configs: Mapping[str, type], presets: Mapping[str, Any] = PRESETS
) -> None:
    what = "settings to start from" if flag == "preset" else "settings of the diffusion model, if one is trained"
    text = f"{what}: {', '.join(presets)}; other flags override them"
    parser.add_argument(f"--{flag}", type=str, default=preset, help=text)
    for part, config in configs.items():
        parser.take(config, part)
    parser.take(TrainingConfig, "training", skip=["seed"])  # --seed is the command's own
    parser.set_defaults(_training_preset(preset, presets))


def _train(name: str, call: Callable[..., Any], words: Sequence[str]) -> functools.partial[Any]:
    """A training: its presets lie under YAML and flags, and may be named in either."""
    configs, presets = _TRAININGS[call]
    parser = _train_parser(name, call)
    short = _short(configs)
    words = [_long(word, short) for word in words]
    parser.set_defaults(_training_preset(parser.glance(words).preset, presets))
    if "exposure" in configs:
        _drop_idle(parser, words)
    values = _values(parser, parser.read(words))
    values.pop("preset")
    if "exposure" in values:
        values["exposure"].resolved(values["outliers"] is not None, values["reconstructions"] is not None)
    return functools.partial(call, **values)


def _train_parser(name: str, command: Callable[..., Any]) -> Parser:
    configs, presets = _TRAININGS[command]
    short = _short(configs).items()
    told = [f"--{flag.replace('_', '-')} for --{part}.{flag.replace('_', '-')}" for flag, part in short]
    parser = _parser(name, command, about=f"{_first_line(command)} Short forms: {', '.join(told)}.")
    _add_training(parser, "preset", "tiny", configs, presets)
    return parser


def _short(configs: Mapping[str, type]) -> dict[str, str]:
    """The settings of a training that may be written without the part that they belong to, and that part."""
    return {flag: part for flag, part in _SHORT.items() if part in (*configs, "training")}


def _drop_idle(parser: Parser, words: Sequence[str]) -> None:
    """Another loss than the preset's makes nothing of the preset's settings of that; what the words say stays."""
    read = _values(parser, parser.glance(words))
    idle = read["exposure"].idle(read["outliers"] is not None, read["reconstructions"] is not None)
    parser.set_defaults({f"exposure.{name}": default for name, default in idle.items()})


def _long(word: str, short: Mapping[str, str]) -> str:
    """--device, --precision and --batch-size mean the same in every command; in training they are nested."""
    flag, equals, value = word.partition("=")
    part = short.get(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else None
    return word if part is None else f"--{part}.{flag.removeprefix('--')}{equals}{value}"


@dataclass(frozen=True)
class _Methods:
    """A command whose first word is a METHOD: the constructor's arguments are flags beside the command's own."""

    registry: Registry
    call: Callable[..., Any]
    parser: Callable[[RegisteredMethod, Any], Parser]
    parse: Callable[[RegisteredMethod, Any, Sequence[str]], functools.partial[Any]]


def _chosen(name: str, words: Sequence[str]) -> RegisteredMethod:
    """The METHOD that comes first; exits after --help with the list of methods."""
    command = _METHODS[name]
    known = command.registry
    if words and not words[0].startswith("-"):
        return known[words[0]]
    wanted = " ".join(["METHOD SOURCE", *(f"--{p.name} DIR" for p in _must(command.call))])
    if {"-h", "--help"} & set(words):
        print(f"usage: farout {name} {wanted} [settings]\n\n{_first_line(command.call)}\n\nmethods:")
        print(*(f"  {each:<18}{member.description}" for each, member in known.items()), sep="\n")
        print(f"\n`farout {name} METHOD --help` shows the settings.")
        raise SystemExit(0)
    raise UsageError(f"expected `farout {name} {wanted}`; methods: {', '.join(known)}")


def _fit(member: RegisteredMethod, method: Any, words: Sequence[str]) -> functools.partial[Any]:
    parser = _fit_parser(member, method)
    chosen = parser.glance(words)
    _refuse_idle(chosen, parser.glance([]))
    network = _training_preset(chosen.network_preset) if _trains_on_images(method) else {}
    parser.set_defaults({**network, **_method_preset(method, chosen.preset)})
    values = _values(parser, parser.read(words))
    method(**{key: values[key] for key in method().config})  # refuses what is out of range
    return functools.partial(_call_fit, member.name, method, values)


def _refuse_idle(chosen: Any, plain: Any) -> None:
    """Raises UsageError for settings of a training, other than the plain ones, where the network is given."""
    given, defaults = vars(chosen.as_flat()), vars(plain.as_flat())
    for network, parts in _TRAINED.items():
        idle = [n for n in given if n.partition(".")[0] in parts and given[n] != defaults[n]]
        if given[network] is not None and idle:
            flag = idle[0].replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --{network}, which is not trained; leave one out")


def _fit_parser(member: RegisteredMethod, method: Any) -> Parser:
    parser = _method_parser(f"fit {member.name}", commands.fit, member, method)
    parser.take(FitSettings, skip=_not_flags(method))
    parser.take(Runtime)
    if _trains_on_images(method):
        _add_training(parser, "network_preset", method.network_preset, {"model": DiffusionConfig})
    return parser


def _method_parser(
    name: str, call: Callable[..., Any], member: RegisteredMethod, method: Any, skip: Sequence[str] = ()
) -> Parser:
    parser = _parser(name, call, ["method", "preset", *skip], about=member.description)
    known = ", ".join(method.presets) or "none"
    parser.add_argument("--preset", type=str, help=f"settings to start from: {known}; other flags override them")
    nested = {key: value for key, value in method().config.items() if is_dataclass(value)}
    parser.take(method, skip=list(nested))
    for key, settings in nested.items():
        parser.take(type(settings), key)
    # the method's own defaults, which need not be those of the class of settings
    parser.set_defaults(flat(nested))
    return parser


def _not_flags(method: Any) -> tuple[str, ...]:
    """Fields of FitSettings that are flags of their own, or nothing to this method."""
    return _NOT_FLAGS if "classifier" in method.needs else (*_NOT_FLAGS, "classifier_preset", "classifier_steps")


def _trains_on_images(method: Any) -> bool:
    """Whether a diffusion model of images is trained where none is given: then its settings are flags."""
    return "diffusion" in method.needs and method.diffusion_of == "images"


def _call_fit(name: str, method: Any, values: dict[str, Any]) -> Any:
    arguments = {key: values[key] for key in method().config}
    settings = {key: values[key] for key in FitSettings.__dataclass_fields__ if key not in _not_flags(method)}
    runtime = Runtime(**{key: values[key] for key in _RUNTIME})
    networks = {"network": values["model"], "training": values["training"]} if "model" in values else {}
    chosen = FitSettings(**settings, **networks, runtime=runtime)
    rest = {key: values[key] for key in ("source", "out", "diffusion", "classifier", "link", "preset")}
    source = rest.pop("source")
    return commands.fit(name, source, **rest, settings=chosen, arguments=arguments)


def _synthesize_parser(member: RegisteredMethod, method: Any) -> Parser:
    skip = ["stage"] if len(method.stages) == 1 else []
    parser = _method_parser(f"synthesize {member.name}", generation.synthesize, member, method, skip)
    _add_runtime(parser)
    return parser


def _synthesize(member: RegisteredMethod, method: Any, words: Sequence[str]) -> functools.partial[Any]:
    parser = _synthesize_parser(member, method)
    parser.set_defaults(_method_preset(method, parser.glance(words).preset))
    values = _values(parser, parser.read(words))
    arguments = {key: values.pop(key) for key in method().config}
    method(**arguments)  # refuses what is out of range
    runtime = Runtime(**{key: values.pop(key) for key in _RUNTIME if key in values})
    return functools.partial(generation.synthesize, member.name, **values, runtime=runtime, arguments=arguments)


_METHODS = {
    "fit": _Methods(DETECTORS, commands.fit, _fit_parser, _fit),
    "synthesize": _Methods(SYNTHESIZERS, generation.synthesize, _synthesize_parser, _synthesize),
}
