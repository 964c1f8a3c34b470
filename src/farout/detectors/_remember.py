"""The constructor's arguments are the configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farout.detectors.base import Detector

__all__ = ["remembering"]


def remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Adds a constructor's arguments to `config`; `**arguments` are named by the constructor that they go on to."""
    open_ended = {p.name for p in inspect.signature(init).parameters.values() if p.kind is p.VAR_KEYWORD}

    @functools.wraps(init)
    def wrapped(self: Detector, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        known = {name: value for name, value in list(bound.arguments.items())[1:] if name not in open_ended}
        if not hasattr(self, "config"):
            self.config = {}
            self._start()
        self.config |= known
        init(self, *args, **kwargs)

    return wrapped
