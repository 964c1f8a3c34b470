"""Classes as prompts: templates, and the words that stand for classes in them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from farout.core.errors import FaroutError

__all__ = [
    "TABLES",
    "TEMPLATE",
    "Pieces",
    "Prompts",
    "Word",
    "check_template",
    "read_word_table",
    "resolve_class_words",
]

Pieces = Literal["refuse", "first"]
"""What becomes of a word that the tokenizer splits."""

TEMPLATE = "An image of a {}"
"""The prompt of a class; {} stands for its name."""

TABLES: dict[str, dict[str, str]] = {
    # the first six as published with NCIS; the set's own page calls its trees maple, oak, palm, pine and willow; its
    # copy on the hub has cra for crab
    "cifar100": {
        "aquarium fish": "fish",
        "chimpanzee": "chimp",
        "computer keyboard": "keyboard",
        "lawn mower": "mower",
        "pickup truck": "truck",
        "sweet peppers": "peppers",
        "sweet pepper": "peppers",
        "cra": "crab",
        **{f"{tree} tree": tree for tree in ("maple", "oak", "palm", "pine", "willow")},
    },
}
"""Ready-made tables of words, by name."""


class Word(NamedTuple):
    """What a class is called in prompts: one word, and what follows it (`kite`, `bird`)."""

    word: str
    suffix: str = ""

    def prompt(self, template: str) -> str:
        """The prompt of the class."""
        return template.replace("{}", f"{self.word} {self.suffix}".strip())


@dataclass(frozen=True)
class Prompts:
    """Prompts for a Stable Diffusion folder. Raises FaroutError for values out of range.

    Args:
        template: prompt of a class; {} is replaced by its name.
        generation: template used for generation, such as the published A high-quality image of the {}; default: same as
            `template`.
        vector: class vector: `token` (input embedding of the name, as published) or `context` (output of the text
            encoder for the whole prompt).
        words: words for classes whose names have several tokens: a .csv file (columns class, word and optionally
            suffix), a .yaml file (class: word suffix), or `cifar100`; default: the names.
        pieces: what to do with a word that the tokenizer splits: `refuse` it, or use its `first` token as class vector
            (as published).
        context_noise: standard deviation of Gaussian noise added to the output of the text encoder in generation.
    """

    template: str = TEMPLATE
    generation: str | None = None
    vector: Literal["token", "context"] = "token"
    words: dict[str, str] | str | None = None
    pieces: Pieces = "refuse"
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        for template in (self.template, self.generation):
            if template is not None:
                check_template(template)
        if self.vector not in ("token", "context"):
            raise FaroutError(f"the class vector of a prompt is its token or its context, got {self.vector!r}")
        if self.pieces not in ("refuse", "first"):
            raise FaroutError(f"pieces of a split word are 'refuse' or 'first', got {self.pieces!r}")
        if self.vector == "context" and self.generation is not None:
            raise FaroutError(
                f"a context is made of the whole prompt {self.template!r}, so that a template of generation "
                f"({self.generation!r}) has no effect; leave it out (None), or give vector='token'"
            )
        if not 0 <= self.context_noise < math.inf:
            raise FaroutError(f"context_noise must be 0 or more, got {self.context_noise}")

    @property
    def changed(self) -> tuple[str, ...]:
        """The settings that are not at their defaults."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


def check_template(template: str) -> None:
    """Raises FaroutError for a template without exactly one {}."""
    if template.count("{}") != 1:
        raise FaroutError(f"a prompt template holds one {{}} for the class name, got {template!r}")


def resolve_class_words(names: Sequence[str], table: Mapping[str, str] | str | None = None) -> tuple[Word, ...]:
    """What classes are called in prompts; those that are not in the table by their names.

    Case, `_` and `-` make no difference in the table. Raises FaroutError for a table that holds none of the classes,
    and for two classes that are called the same.
    """
    known = {} if table is None else read_word_table(table)
    found = {name: known[_plain(name)] for name in names if _plain(name) in known}
    if table is not None and not found:
        shown, told = ", ".join(list(known)[:5]), ", ".join(names[:5])
        raise FaroutError(f"the table of words {_called(table)} has none of the classes {told}, …; it has {shown}, …")
    words = tuple(found.get(name, Word(name)) for name in names)
    _check_different(names, words)
    return words


def _check_different(names: Sequence[str], words: Sequence[Word]) -> None:
    first: dict[str, str] = {}
    for name, word in zip(names, words, strict=True):
        said = word.prompt("{}")
        other = first.setdefault(said.casefold(), name)
        if other != name:
            raise FaroutError(f"the classes {other!r} and {name!r} are both {said!r} in prompts; call them differently")


def read_word_table(table: Mapping[str, str] | str) -> dict[str, Word]:
    """Words by plain class name (small letters, no `_` or `-`), from a mapping, a file or a name of `TABLES`.

    The first word of an entry stands for the class, what follows it is the suffix: `{"kite": "kite bird"}`; a CSV file
    has columns `class`, `word` and, where wanted, `suffix`.

    Raises FaroutError for what is none of these, empty entries, and a class that comes twice.
    """
    entries = list(table.items()) if isinstance(table, Mapping) else _entries(table)
    words: dict[str, Word] = {}
    for name, text in entries:
        plain = _plain(str(name))
        if not isinstance(name, str | int) or not isinstance(text, str) or not text.split():
            raise FaroutError(
                f"the table of words {_called(table)} requires a word for a class, got {name!r}: {text!r}"
            )
        if plain in words:
            raise FaroutError(f"the table of words {_called(table)} has the class {name!r} twice")
        word, _, suffix = text.strip().partition(" ")
        words[plain] = Word(word, suffix.strip())
    return words


def _entries(table: str) -> list[tuple[Any, Any]]:
    kind = Path(table).suffix.lower()
    if kind not in (".csv", ".yaml", ".yml"):
        if table in TABLES:
            return list(TABLES[table].items())
        raise FaroutError(f"words requires a table .csv or .yaml, or one of {', '.join(TABLES)}; got {table!r}")
    try:
        text = Path(table).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FaroutError(f"the table of words {table} cannot be read ({error})") from error
    return _csv(table, text) if kind == ".csv" else _yaml(table, text)


def _csv(table: str, text: str) -> list[tuple[Any, Any]]:
    reader = csv.DictReader(text.splitlines())
    columns = set(reader.fieldnames or ())
    if not {"class", "word"} <= columns <= {"class", "word", "suffix"}:
        raise FaroutError(
            f"{table} requires the columns class, word and perhaps suffix, got {', '.join(sorted(columns))}"
        )
    rows = list(reader)
    for row in rows:
        if None in row or not row["class"] or len((row["word"] or "").split()) != 1:
            raise FaroutError(f"{table} requires one word for each class, got {list(row.values())}")
    return [(row["class"], f"{row['word']} {row.get('suffix') or ''}") for row in rows]


def _yaml(table: str, text: str) -> list[tuple[Any, Any]]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FaroutError(f"{table} is not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise FaroutError(f"{table} requires lines `class: word`, got a {type(content).__name__}")
    return list(content.items())


def _called(table: Mapping[str, str] | str) -> str:
    return "that was given" if isinstance(table, Mapping) else table


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
