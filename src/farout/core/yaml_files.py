"""YAML that users write: plain values only, with limits, read by the rules of YAML 1.2.

PyYAML follows YAML 1.1, in which `no` is False, `012` is ten, `1:30` is 90, a date is an object, and `1e5` is text.
Here `true` and `false` are booleans, `null` and an empty value are None, numbers are what JSON has (also `.5`, `0x1F`,
`.inf`), and everything else is text as it is written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from farout.core.errors import FaroutError
from farout.core.file_errors import read_errors
from farout.core.files import open_regular_file

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "YAMLError", "describe_kind", "dump_yaml", "parse_yaml", "read_yaml"]

MAX_BYTES = 2**20
"""Largest file."""
MAX_DEPTH = 32
"""Deepest nesting of lists and mappings."""
MAX_VALUES = 50_000
"""Most values of one file; values that an alias (`*name`) repeats are counted each time."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_RESOLVERS = (
    (_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    (_TAG + "null", re.compile(r"(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    (
        _TAG + "int",
        re.compile(r"(?:[-+]?(?:0|[1-9][0-9]{0,999})|0x[0-9a-fA-F]{1,999}|0o[0-7]{1,999})$"),  # not of endless digits
        "-+0123456789",
    ),
    (
        _TAG + "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
    (_TAG + "merge", re.compile(r"<<$"), "<"),
)


class YAMLError(FaroutError, ValueError):
    """Text that is not YAML, or exceeds a limit; the message has the line, but not the content of the file."""


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of a user: plain values, lists and mappings.

    Raises:
        ReadError: the file is missing, cannot be read, or is not a regular file, such as a folder or a pipe.
        YAMLError: it is not YAML, or larger or deeper than the limits of this module.
    """
    with read_errors(path), open_regular_file(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise YAMLError(f"{path} has more than {MAX_BYTES:,} bytes, the limit for YAML files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YAMLError(f"{path} is not valid YAML: byte {error.start} is not UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text; see `read_yaml`.

    Args:
        text: one YAML document.
        name: what the text is, for errors.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        # the message of PyYAML would quote the text, which may be secret if the wrong file was given
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YAMLError(f"{name} is not valid YAML: {where}{_describe_problem(error)}") from error
    except yaml.YAMLError as error:  # characters that YAML does not have
        problem = f"the character {error.character!r}" if isinstance(error, yaml.reader.ReaderError) else "the text"
        raise YAMLError(f"{name} is not valid YAML: {problem} is not allowed") from error


def dump_yaml(value: Any, **options: Any) -> str:
    """YAML text from which `parse_yaml` makes the same value; also any other YAML parser makes it."""
    return yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, "allow_unicode": True, **options})


def describe_kind(value: Any) -> str:
    """What a value is, for errors, which do not quote it: it may come from a file that was given by mistake."""
    kinds = {dict: "settings by name", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _describe_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be parsed"
    if "'\\t'" in problem:
        return "a tab; YAML indents with spaces"
    if isinstance(error, yaml.composer.ComposerError) and problem.startswith("found undefined alias"):
        return "an alias (*) without its anchor (&); text that begins with * must be quoted"
    if isinstance(error, yaml.composer.ComposerError) and problem.startswith("but found another document"):
        return "a second document (---); expected one"
    return problem


class _Loader(yaml.SafeLoader):
    """Plain values by the rules of YAML 1.2, with limits that hold before anything is built."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in PyYAML

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.count = 0  # values so far, with what aliases repeat
        self.sizes: dict[int, int] = {}  # of complete nodes, by id
        self.nodes: list[yaml.Node] = []  # keeps the ids unique

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self.count
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _create_error("an alias inside of its own anchor", event)
            self.count += self.sizes[id(node)]
        else:
            if getattr(event, "tag", None) not in (None, "!", *_PLAIN_TAGS):
                raise _create_error(
                    "a tag (!); only plain values are allowed, and text that begins with ! must be quoted", event
                )
            self.depth += 1
            self.count += 1
            if self.depth > MAX_DEPTH:
                raise _create_error(f"lists and mappings are nested more than {MAX_DEPTH} deep", event)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
            if node is not None:
                self.sizes[id(node)] = self.count - before
                self.nodes.append(node)
        if self.count > MAX_VALUES:
            raise _create_error(f"more than {MAX_VALUES:,} values, counting what aliases (*) repeat", event)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _create_error("a list or a mapping as a key; expected text", key)
            if key.value in keys:
                raise _create_error(f"the key {key.value[:80]!r} is given twice", key)
            keys.add(key.value)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        try:
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        except ValueError as error:  # an explicit !!int
            raise _create_error("a whole number was expected", node) from error

    def construct_number(self, node: yaml.ScalarNode) -> float:
        try:
            return float(self.construct_yaml_float(node))
        except ValueError as error:  # an explicit !!float
            raise _create_error("a number was expected", node) from error

    def construct_boolean(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node)).lower()
        if text not in ("true", "false"):  # an explicit !!bool
            raise _create_error("true or false was expected", node)
        return text == "true"


def _create_error(text: str, node: Any) -> yaml.MarkedYAMLError:
    """The error for an event or a node of the parser."""
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
_Loader.add_constructor(_TAG + "int", _Loader.construct_integer)
_Loader.add_constructor(_TAG + "float", _Loader.construct_number)
_Loader.add_constructor(_TAG + "bool", _Loader.construct_boolean)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in PyYAML
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = ".nan" if value != value else ".inf" if value == float("inf") else "-.inf" if value == -float("inf") else ""
    if not text:
        text = repr(value)
        if "." not in text:  # 1e+20: YAML 1.1 has no number without a point
            text = text.replace("e", ".0e")
    return dumper.represent_scalar(_TAG + "float", text)


for _tag, _pattern, _first in _RESOLVERS[2:4]:
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_Dumper.add_representer(float, _represent_float)
