"""Words that a generator of text may be asked for: those that name nothing of what is in the distribution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.prompts import read_words

__all__ = ["listed", "nearest", "screened", "spoken"]


def listed(words: str) -> tuple[str, ...]:
    """The words of a list, in its order, as they are spoken.

    Args:
        words: a text file with a word, or several that belong together, on each line; a table of words (.csv with
            columns class and word, or .yaml; see `read_words`), of which the classes play no part; or `imagenet`, the
            names of ImageNet's 1000 classes as torchvision has them.

    Raises FaroutError for a file that cannot be read or holds no words.
    """
    kind = Path(words).suffix.lower()
    if words == "imagenet":
        found = _imagenet()
    elif kind in (".csv", ".yaml", ".yml"):
        found = [word.prompt("{}") for word in read_words(words).values()]
    else:
        found = _lines(words)
    kept = tuple(word for word in map(spoken, found) if word)
    if not kept:
        raise FaroutError(f"the list of words {words} is empty; it requires a word on each line")
    return kept


def _imagenet() -> list[str]:
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FaroutError(
            f"words requires a text file with one word a line, a table .csv or .yaml, or imagenet; {path} cannot be "
            "read "
            f"({error})"
        ) from error


def spoken(name: str) -> str:
    """A name as it stands in prompts: `_` is a space."""
    return " ".join(name.replace("_", " ").split())


def screened(words: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The words that are neither repeated nor near one of the known names, in their order, as they were written.

    Case makes no difference, `_`, `/` and `,` stand for spaces; a hyphen joins its parts to one word. Near are names of
    which one holds all words of the other in a row: rifle and assault rifle, newt and smooth newt, in either direction.
    """
    names, seen, kept = [_parts(name) for name in known], set[tuple[str, ...]](), list[str]()
    for word in words:
        parts = _parts(word)
        near = any(_holds(parts, name) or _holds(name, parts) for name in names)
        if parts and parts not in seen and not near:
            kept.append(word)
        seen.add(parts)
    return tuple(kept)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"[\s_/,]+", name.casefold().strip(" _/,"))) if name.strip(" _/,") else ()


def _holds(whole: tuple[str, ...], part: tuple[str, ...]) -> bool:
    """Whether `part` stands in `whole`, word by word."""
    size = len(part)
    return size > 0 and any(whole[start : start + size] == part for start in range(len(whole) - size + 1))


def nearest(words: Tensor, known: Tensor, count: int) -> Tensor:
    """Numbers of the `count` words that are nearest to each known name by the cosine of their embeddings, the nearest
    first: (K, count).

    Args:
        words: embeddings of the words (W, D), float.
        known: embeddings of the names (K, D).
        count: of words for each name; the fewer, the harder outliers are told apart.

    Raises FaroutError unless 1 <= count <= W.
    """
    if not 1 <= count <= len(words):
        raise FaroutError(f"nearest must be 1 to {len(words)}, the words that there are, got {count}")
    cosines = functional.normalize(known.float(), dim=1) @ functional.normalize(words.float(), dim=1).T
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
