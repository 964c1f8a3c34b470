"""Seeded splits by content: training, statistics and calibration images never share an image or a group.

Images are ranked by `sha256("{seed}:{content hash}")`, so a split does not depend on names or order, and growing a set
moves few images. Identical images, and images of one group, stay together.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.utils.data import Dataset, Subset

from farout.core.errors import ShortfallWarning, SourceError
from farout.data.image_source import ImageSource

__all__ = ["Groups", "Split", "calibration_size", "exclusion_hint", "log_split", "split_off_validation", "split_source"]

logger = logging.getLogger(__name__)

Groups = Literal["none", "folder"] | Sequence[str]
"""What stays together beside equal images: nothing, one folder (or `group` column), or one of names, one an image."""


@dataclass(frozen=True)
class Split:
    """Positions in a source, ascending and disjoint."""

    training: tuple[int, ...]
    statistics: tuple[int, ...]
    calibration: tuple[int, ...]


def calibration_size(count: int, alpha: float) -> int:
    """Wanted calibration images among `count`: max(20 %, ceil(1 / alpha) - 1), the least for a p-value of `alpha`."""
    if not 0 < alpha < 1:
        raise SourceError(f"alpha is {alpha}; expected a false-alarm rate between 0 and 1")
    return max(math.ceil(count / 5), math.ceil(round(1 / alpha, 9)) - 1)


def exclusion_hint(seen: int) -> str:
    """What to do where `seen` images were left out because a network was trained on them; empty for none."""
    return (
        f"; {seen} were left out because a network was trained on them: give images that it has not seen, or train it "
        "with more held out (farout train … --statistics N)"
    ) * bool(seen)


def split_source(
    source: ImageSource,
    *,
    alpha: float = 0.05,
    statistics: int,
    train: bool,
    seed: int = 0,
    exclude: Collection[str] = (),
    groups: Groups = "none",
) -> Split:
    """Splits a source into calibration, statistics and training positions.

    Calibration gets max(20 %, ceil(1 / alpha) - 1) images first, then statistics the given minimum (all the rest where
    `train` is False), then training the rest. At least one group of images is left for each later part. `groups`:
    `folder` keeps the images of one parent folder (or `group` column) together, a sequence names the group of every
    image. `exclude` are content hashes of images that a given network was trained on: they, their group and their
    copies are left out of every part. Unreadable images raise under the policy `raise`, and are left out otherwise.

    A part below its wish (one image for training) warns with ShortfallWarning and all three counts. Raises SourceError
    when no calibration or no statistics image would remain.
    """
    if statistics < 0:
        raise SourceError(f"statistics must be 0 images or more, got {statistics}")
    hashes = {i: content for i, content in enumerate(source.content_hashes()) if content is not None}
    blocks = _blocks(hashes, _group_names(source, groups))
    excluded = frozenset(exclude)
    kept = [block for block in blocks if not any(hashes[i] in excluded for i in block)]
    ranked = sorted(kept, key=lambda block: min(_rank(hashes[i], seed) for i in block))
    count = sum(map(len, ranked))
    wishes = (calibration_size(count, alpha), statistics, 1 if train else 0)
    if len(ranked) < 2:
        raise SourceError(_impossible(source.name, len(source), len(ranked), len(hashes) - count, wishes))
    calibration, rest = _take(ranked, wishes[0], spare=2 if train else 1)
    chosen, training = _take(rest, wishes[1], spare=1) if train else (rest, [])
    result = Split(_positions(training), _positions(chosen), _positions(calibration))
    _warn_shortfall(result, wishes, source.name, len(hashes) - count)
    return result


def log_split(source: ImageSource, parts: Split) -> None:
    """Log the number of images in each part, before long work starts."""
    counts = {
        "training": len(parts.training),
        "statistics": len(parts.statistics),
        "calibration": len(parts.calibration),
    }
    text = ", ".join(f"{count} for {part}" for part, count in counts.items() if count)
    logger.info("%s: %d images split into %s", source.name, sum(counts.values()), text)


def split_off_validation(data: Dataset, hashes: Sequence[str], *, validate: bool) -> tuple[Dataset, Dataset | None]:
    """Of training data with the content hash of each item, what is learnt from, and what validates: with `validate` the
    last twentieth by hash, else nothing. Raises SourceError where that is none of them.
    """
    if not validate:
        return data, None
    held = len(hashes) // 20
    if not held:
        raise SourceError(f"validation requires at least 20 training images, there are {len(hashes)}")
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return Subset(data, sorted(order[held:])), Subset(data, sorted(order[:held]))


def _rank(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _group_names(source: ImageSource, groups: Groups) -> Sequence[str] | None:
    if groups == "none":
        return None
    names: Sequence[str] | None = source.groups if isinstance(groups, str) else groups
    if isinstance(groups, str) and groups != "folder":
        raise SourceError(f"groups is {groups!r}; expected none, folder, or one group name an image")
    if names is None:
        raise SourceError(f"{source.name} has no folders or group column to group by; use groups='none'")
    if len(names) != len(source):
        raise SourceError(f"{len(names)} group names for {len(source)} images of {source.name}; expected one an image")
    return names


def _blocks(hashes: dict[int, str], groups: Sequence[str] | None) -> list[list[int]]:
    """Positions that must stay together: joined by equal content or by group, over any chain of both."""
    parent = {i: i for i in hashes}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, content in hashes.items():
        for mark in (("content", content), *((("group", groups[i]),) if groups is not None else ())):
            parent[root(i)] = root(first.setdefault(mark, i))
    blocks: dict[int, list[int]] = defaultdict(list)
    for i in hashes:
        blocks[root(i)].append(i)
    return list(blocks.values())


def _take(ranked: list[list[int]], wish: int, spare: int) -> tuple[list[list[int]], list[list[int]]]:
    """Takes blocks until `wish` images are reached, one block at least, leaving `spare` blocks where that many are."""
    taken = 0
    most = max(1, len(ranked) - spare)
    for number, block in enumerate(ranked):
        if taken >= wish or number >= most:
            return (ranked[:number], ranked[number:]) if number else (ranked[:1], ranked[1:])
        taken += len(block)
    return ranked, []


def _positions(blocks: list[list[int]]) -> tuple[int, ...]:
    return tuple(sorted(i for block in blocks for i in block))


def _warn_shortfall(result: Split, wishes: tuple[int, int, int], name: str, seen: int) -> None:
    counts = (len(result.calibration), len(result.statistics), len(result.training))
    if all(count >= wish for count, wish in zip(counts, wishes)):
        return
    parts = zip(("calibration", "statistics", "training"), counts, wishes)
    told = ", ".join(f"{part} {count} of {wish}" for part, count, wish in parts)
    warnings.warn(
        f"{name} has too few images for every part: {told}; give more images, a larger alpha, or "
        f"fewer wanted statistics (--statistics){exclusion_hint(seen)}",
        ShortfallWarning,
        stacklevel=3,
    )


def _impossible(name: str, total: int, kept: int, seen: int, wishes: tuple[int, int, int]) -> str:
    return (
        f"{name} cannot be split: {total} images leave {kept} distinct images or groups; expected at least 2, better "
        f"{wishes[0]} for calibration and {wishes[1]} for statistics{exclusion_hint(seen)}"
    )
