"""Importing timm and torchvision without torch's compiler, whose import takes twice as long as that of both."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["defer_compiler_import"]

_PACKAGE = "torch._dynamo"
_NAMES = (_PACKAGE, f"{_PACKAGE}.utils")


@contextmanager
def defer_compiler_import() -> Iterator[None]:
    """Inside this context, modules that import `torch._dynamo` get it when they use it.

    torchvision imports it for one operator of detection networks, and timm for a decorator of one network. Anything
    else that is taken from it inside the context imports it at once.
    """
    if _PACKAGE in sys.modules:
        yield
        return
    finder = _SubmoduleFinder()
    sys.modules.update({name: _DeferredModule(name) for name in _NAMES})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _remove_deferred_modules()


class _DeferredModule(ModuleType):
    """Replaces a module until one of its attributes is used."""

    def __getattr__(self, attribute: str) -> Any:
        deferred: dict[tuple[str, str], Any] = {
            (_PACKAGE, "__path__"): [],  # submodules are found by `_SubmoduleFinder`
            (_PACKAGE, "disable"): _disable,
            (f"{_PACKAGE}.utils", "is_compile_supported"): _is_compile_supported,
        }
        if (self.__name__, attribute) in deferred:
            return deferred[self.__name__, attribute]
        if attribute.startswith("__"):  # requested by the import system and by `inspect`
            raise AttributeError(attribute)
        return getattr(_import_module(self.__name__), attribute)


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Imports the package when another submodule of it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        is_deferred = isinstance(sys.modules.get(_PACKAGE), _DeferredModule)
        if not (is_deferred and name.startswith(f"{_PACKAGE}.")):
            return None
        _import_module(name)
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.own_spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has replaced it


def _import_module(name: str) -> ModuleType:
    _remove_deferred_modules()
    return importlib.import_module(name)


def _remove_deferred_modules() -> None:
    for name in _NAMES:
        if isinstance(sys.modules.get(name), _DeferredModule):
            del sys.modules[name]


def _is_compile_supported(*arguments: Any) -> Any:
    return _import_module(f"{_PACKAGE}.utils").is_compile_supported(*arguments)


def _disable(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    """As `torch._dynamo.disable`, which has no effect before the compiler is imported."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        module = sys.modules.get(_PACKAGE)
        if module is None or isinstance(module, _DeferredModule):
            return function(*args, **kwargs)
        return module.disable(function, *arguments, **options)(*args, **kwargs)

    return call
