"""Base class of detectors and synthesizers: the arguments of the constructor are the configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self

from farout.core.errors import FaroutError, UnknownArgumentError, suggest_names

__all__ = ["Configured", "flatten_config"]


class Configured:
    """Records the arguments of the constructor as `config`.

    The constructor of a subclass takes keyword arguments with defaults only. They are at once the configuration that is
    saved with a fitted method, the flags of the command line and the keys of YAML files. A subclass may pass
    `**arguments` on to the constructor of its base class; these are recorded by the base class.

    Attributes:
        config: name -> value of every constructor argument.
        provenance: origin of the object, such as the preset that it started from.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named configurations: name -> arguments of the constructor."""

    config: dict[str, Any]
    provenance: dict[str, Any]

    def __init__(self) -> None:
        self._record_arguments({})

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__init__" in cls.__dict__:
            cls.__init__ = _record_before(cls.__init__)  # type: ignore[method-assign]

    def _record_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Adds arguments to `config`; the first call, by the constructor of the most derived class, creates it."""
        if not hasattr(self, "config"):
            self.config = {}
            self.provenance = {}
        self.config |= arguments

    def get_changed_arguments(self) -> dict[str, Any]:
        """The arguments of the constructor that are not the default."""
        return {name: value for name, value in self.config.items() if value != _default_of(type(self), name)}

    def _check_unused(self, use: str, *names: str) -> None:
        """Raises FaroutError for arguments that have no effect but were changed.

        A value is unchanged if it is the default, or the value of one of the presets.

        Args:
            use: when the arguments have an effect, for the message, such as "in mode fast".
            names: names of the arguments.
        """
        for name in names:
            value, default = self.config[name], _default_of(type(self), name)
            if value not in (default, *(preset.get(name, default) for preset in self.presets.values())):
                raise FaroutError(f"{name} is {value!r}, but is only used {use}; leave it out (default {default!r})")

    @classmethod
    def from_preset(cls, name: str, **arguments: Any) -> Self:
        """Creates an object with the configuration of a preset; `arguments` override it.

        Raises FaroutError for an unknown preset.
        """
        if name not in cls.presets:
            raise FaroutError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(cls.presets) or 'none'}")
        created = cls(**{**cls.presets[name], **arguments})
        created.provenance["preset"] = name
        return created


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the fields of nested dataclasses as `name.field`, as they are named on the command
    line.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if is_dataclass(value):
            flat |= {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
        else:
            flat[name] = value
    return flat


def _record_before(init: Callable[..., None]) -> Callable[..., None]:
    """Wraps a constructor so that it records its arguments, defaults included, before its body runs."""
    signature = inspect.signature(init)
    # `**arguments` are recorded under their names by the constructor that they are passed on to
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "self"]

    @functools.wraps(init)
    def wrapped_init(self: Configured, *args: Any, **kwargs: Any) -> None:
        known = _argument_names(type(self))
        for name in kwargs:
            if name not in known:
                raise UnknownArgumentError(
                    f"{type(self).__name__}() has no argument {name!r}; {suggest_names(name, known)}"
                )
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self._record_arguments({name: bound.arguments[name] for name in named})
        init(self, *args, **kwargs)

    return wrapped_init


def _argument_names(cls: type) -> list[str]:
    """The arguments of the constructor, with those that `**arguments` pass on to base classes."""
    names: list[str] = []
    for base in cls.__mro__:
        if issubclass(base, Configured) and "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _default_of(cls: type, name: str) -> Any:
    """The default of a constructor argument, from the most derived class whose constructor names it."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            if name in parameters:
                return parameters[name].default
    raise AttributeError(f"the constructor of {cls.__name__} has no argument {name}")
