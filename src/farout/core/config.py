"""The constructor's arguments are the configuration: what detectors and synthesizers have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self

from farout.core.errors import FaroutError

__all__ = ["Configured", "flatten_config"]


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


class Configured:
    """A method whose constructor's arguments, all with defaults, are its configuration, its flags and its docs.

    Attributes:
        config: the constructor's arguments.
        provenance: how it came about: the preset that it started from and the like.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings: arguments of the constructor."""

    config: dict[str, Any]
    provenance: dict[str, Any]

    def __init__(self) -> None:
        """Without settings; a method that has some has a constructor of its own."""
        self._remember({})

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Keeps the arguments of the constructor as `config`."""
        super().__init_subclass__(**arguments)
        if "__init__" in cls.__dict__:
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    def _remember(self, arguments: Mapping[str, Any]) -> None:
        """Adds a constructor's arguments to `config`; of several constructors the first one to come starts it."""
        if not hasattr(self, "config"):
            self.config = {}
            self._start()
        self.config |= arguments

    def _start(self) -> None:
        """Called before the first constructor's own lines."""
        self.provenance = {}

    def _refuse_idle(self, where: str, *names: str) -> None:
        """Raises FaroutError for settings that are of no use and neither at their default nor as a preset has them.

        where: they are of no use, and what would change that, in words.
        """
        for name in names:
            given, default = self.config[name], _default(type(self), name)
            if given not in (default, *(preset.get(name, default) for preset in self.presets.values())):
                raise FaroutError(
                    f"{name} is {given!r}, which has no effect {where}, or leave {name} out (its default is "
                    f"{default!r})"
                )

    @classmethod
    def from_preset(cls, name: str, **arguments: Any) -> Self:
        """One with the settings of a preset; `arguments` override them. Raises FaroutError for an unknown preset."""
        if name not in cls.presets:
            raise FaroutError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(cls.presets) or 'none'}")
        made = cls(**{**cls.presets[name], **arguments})
        made.provenance["preset"] = name
        return made


def _default(kind: type, name: str) -> Any:
    """Of an argument of the constructor, or of one that its `**arguments` go on to."""
    known = (inspect.signature(vars(each)["__init__"]).parameters for each in kind.__mro__ if "__init__" in vars(each))
    return next(parameters[name].default for parameters in known if name in parameters)


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which first adds its arguments to `config`; `**arguments` are named by the one they go on to."""
    open_ended = {p.name for p in inspect.signature(init).parameters.values() if p.kind is p.VAR_KEYWORD}

    @functools.wraps(init)
    def remembering(self: Configured, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self._remember({name: value for name, value in list(bound.arguments.items())[1:] if name not in open_ended})
        init(self, *args, **kwargs)

    return remembering
