"""Prompt templates, and the words that name classes in prompts."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from farout.core.errors import FaroutError
from farout.core.names import find_path
from farout.core.yaml_files import describe_kind, read_yaml

__all__ = [
    "TEMPLATE",
    "WORD_TABLES",
    "Prompts",
    "SplitWords",
    "Word",
    "check_template",
    "read_word_table",
    "resolve_class_words",
]

SplitWords = Literal["raise", "first_token"]

TEMPLATE = "An image of a {}"
"""The prompt of a class; {} is replaced by its name."""

WORD_TABLES: dict[str, dict[str, str]] = {
    # the first six as published with NCIS; the data set's own page calls its trees maple, oak, palm, pine and willow;
    # its copy on the hub has cra for crab
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
"""Built-in tables of words, by name."""


class Word(NamedTuple):
    """The name of a class in prompts: one word, and a suffix that follows it (`kite`, `bird`)."""

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
        split_words: what to do with a word that the tokenizer splits: `raise` an error, or use its `first_token` as
            class vector (as published).
        context_noise: standard deviation of Gaussian noise added to the output of the text encoder in generation.
    """

    template: str = TEMPLATE
    generation: str | None = None
    vector: Literal["token", "context"] = "token"
    words: dict[str, str] | str | None = None
    split_words: SplitWords = "raise"
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        for template in (self.template, self.generation):
            if template is not None:
                check_template(template)
        if self.vector not in ("token", "context"):
            raise FaroutError(f"vector must be 'token' or 'context', got {self.vector!r}")
        if self.split_words not in ("raise", "first_token"):
            raise FaroutError(f"split_words must be 'raise' or 'first_token', got {self.split_words!r}")
        if self.vector == "context" and self.generation is not None:
            raise FaroutError(
                f"a context is computed from the whole prompt {self.template!r}, so that a template of generation "
                f"({self.generation!r}) has no effect; leave it out (None), or give vector='token'"
            )
        if not 0 <= self.context_noise < math.inf:
            raise FaroutError(f"context_noise must be 0 or more, got {self.context_noise}")

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the settings that are not at their defaults."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


def check_template(template: str) -> None:
    """Raises FaroutError for a template without exactly one {}."""
    if template.count("{}") != 1:
        raise FaroutError(f"a prompt template must contain {{}} once, for the class name, got {template!r}")


def resolve_class_words(names: Sequence[str], table: Mapping[str, str] | str | None = None) -> tuple[Word, ...]:
    """The words of classes in prompts: those in the table, and the names of classes that are not in it.

    Case, `_` and `-` make no difference in the table. Raises FaroutError for a table with none of the classes, and for
    two classes with the same words.
    """
    known = {} if table is None else read_word_table(table)
    found = {name: known[_normalize_name(name)] for name in names if _normalize_name(name) in known}
    if table is not None and not found:
        in_table, classes = ", ".join(list(known)[:5]), ", ".join(names[:5])
        raise FaroutError(
            f"the table of words{_table_name(table)} has none of the classes {classes}, ...; it has {in_table}, ..."
        )
    words = tuple(found.get(name, Word(name)) for name in names)
    first: dict[str, str] = {}
    for name, word in zip(names, words, strict=True):
        text = word.prompt("{}")
        other = first.setdefault(text.casefold(), name)
        if other != name:
            raise FaroutError(f"the classes {other!r} and {name!r} are both {text!r} in prompts; give different words")
    return words


def read_word_table(table: Mapping[str, str] | str) -> dict[str, Word]:
    """Words by normalized class name (lower case, no `_` or `-`), from a mapping, a file or a name in `WORD_TABLES`.

    The first word of an entry names the class, the rest is the suffix: `{"kite": "kite bird"}`. A CSV file has columns
    `class`, `word` and optionally `suffix`.

    Raises FaroutError for anything else, for empty entries, and for a class that occurs twice.
    """
    if isinstance(table, Mapping):
        entries: list[tuple[Any, Any]] = list(table.items())
    elif (kind := Path(table).suffix.lower()) in (".csv", ".yaml", ".yml"):
        entries = _read_csv(table) if kind == ".csv" else _read_yaml(table)
    elif table in WORD_TABLES:
        entries = list(WORD_TABLES[table].items())
    else:
        raise FaroutError(f"words must be a table .csv or .yaml, or one of {', '.join(WORD_TABLES)}, got {table!r}")
    words: dict[str, Word] = {}
    for name, text in entries:
        normalized = _normalize_name(str(name))
        if not isinstance(name, str | int) or not isinstance(text, str) or not text.split():
            raise FaroutError(
                f"the table of words{_table_name(table)} requires a word for a class, got {name!r}: {text!r}"
            )
        if normalized in words:
            raise FaroutError(f"the table of words{_table_name(table)} has the class {name!r} twice")
        word, _, suffix = text.strip().partition(" ")
        words[normalized] = Word(word, suffix.strip())
    return words


def _read_csv(table: str) -> list[tuple[Any, Any]]:
    try:
        content = find_path(table).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FaroutError(f"the table of words {table} cannot be read ({error})") from error
    reader = csv.DictReader(content.splitlines())
    columns = set(reader.fieldnames or ())
    if not {"class", "word"} <= columns <= {"class", "word", "suffix"}:
        raise FaroutError(
            f"{table} requires the columns class, word and optionally suffix, got {', '.join(sorted(columns))}"
        )
    rows = list(reader)
    for row in rows:
        if None in row or not row["class"] or len((row["word"] or "").split()) != 1:
            raise FaroutError(f"{table} requires one word for each class, got {list(row.values())}")
    return [(row["class"], f"{row['word']} {row.get('suffix') or ''}") for row in rows]


def _read_yaml(table: str) -> list[tuple[Any, Any]]:
    entries = read_yaml(find_path(table))
    if not isinstance(entries, dict):
        raise FaroutError(f"{table} requires lines `class: word`, got {describe_kind(entries)}")
    return list(entries.items())


def _table_name(table: Mapping[str, str] | str) -> str:
    """The table's name for errors, after a space; a mapping has none."""
    return "" if isinstance(table, Mapping) else f" {table}"


def _normalize_name(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
