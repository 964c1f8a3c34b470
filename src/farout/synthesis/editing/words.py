"""Lists of words that a text-to-image generator can be given as targets, without names of in-distribution classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional
from torchvision.models import ResNet18_Weights

from farout.core.errors import FaroutError
from farout.core.names import find_path
from farout.diffusion.conditioning.prompts import read_word_table

__all__ = ["filter_words", "find_nearest_words", "format_name", "read_word_list"]


def read_word_list(words: str) -> tuple[str, ...]:
    """Read the words of a list, in its order.

    Args:
        words: a text file with one word or phrase per line; a table of words (.csv with the columns class and word, or
            .yaml; see `read_word_table`), of which only the words are used; or `imagenet`, the names of ImageNet's 1000
            classes in torchvision.

    Raises FaroutError for a file that cannot be read or contains no words.
    """
    if words == "imagenet":
        names = list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    elif Path(words).suffix.lower() in (".csv", ".yaml", ".yml"):
        names = [word.prompt("{}") for word in read_word_table(words).values()]
    else:
        try:
            names = find_path(words).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FaroutError(
                f"words requires a text file with one word a line, a table .csv or .yaml, or imagenet; {words} cannot "
                f"be read ({error})"
            ) from error
    formatted = tuple(name for name in map(format_name, names) if name)
    if not formatted:
        raise FaroutError(f"the list of words {words} is empty; it requires a word on each line")
    return formatted


def format_name(name: str) -> str:
    """A name as it is written in a prompt: with spaces instead of `_`."""
    return " ".join(name.replace("_", " ").split())


def filter_words(words: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Remove repeated words and words that name one of the known classes; the order is kept.

    Two names match if the words of one are a contiguous part of the other: rifle and assault rifle, newt and smooth
    newt. Case is ignored; `_`, `/` and `,` separate words, a hyphen does not.
    """

    def split(name: str) -> tuple[str, ...]:
        stripped = name.casefold().strip(" _/,")
        return tuple(re.split(r"[\s_/,]+", stripped)) if stripped else ()

    def contains(parts: tuple[str, ...], other: tuple[str, ...]) -> bool:
        size = len(other)
        return size > 0 and any(parts[start : start + size] == other for start in range(len(parts) - size + 1))

    known_parts, seen, kept = [split(name) for name in known], set[tuple[str, ...]](), list[str]()
    for word in words:
        parts = split(word)
        is_known = any(contains(parts, name) or contains(name, parts) for name in known_parts)
        if parts and parts not in seen and not is_known:
            kept.append(word)
        seen.add(parts)
    return tuple(kept)


def find_nearest_words(words: Tensor, classes: Tensor, count: int) -> Tensor:
    """Indices (K, count) of the words with the highest cosine similarity to each class, the most similar first.

    Args:
        words: embeddings of the words (W, D), float.
        classes: embeddings of the class names (K, D).
        count: words per class; the fewer, the harder it is to distinguish the outliers from the class.

    Raises FaroutError unless 1 <= count <= W.
    """
    if not 1 <= count <= len(words):
        raise FaroutError(f"nearest must be 1 to {len(words)}, the number of words, got {count}")
    cosines = functional.normalize(classes.float(), dim=1) @ functional.normalize(words.float(), dim=1).T
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
