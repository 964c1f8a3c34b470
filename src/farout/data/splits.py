"""Seeded splits by content: training, statistics and calibration share no image and no group.

Images are ordered by `sha256("{seed}:{content hash}")`, so that a split does not depend on names or order, and adding
images to a set moves few images to another part. Equal images and images of one group stay together.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

from torch.utils.data import Dataset, Subset

from farout.core.errors import SourceError, TooFewImagesWarning
from farout.data.image_source import ImageSource

__all__ = ["Groups", "Split", "calibration_size", "exclusion_hint", "log_split", "split_off_validation", "split_source"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Groups = Literal["none", "folder"] | Sequence[str]
"""Images that stay together, in addition to equal ones: none, those of a folder or `group` column, or of a name."""


@dataclass(frozen=True)
class Split:
    """Indices of the images of each part of a source, ascending and disjoint."""

    training: tuple[int, ...]
    statistics: tuple[int, ...]
    calibration: tuple[int, ...]


def calibration_size(count: int, alpha: float) -> int:
    """Return the number of calibration images for `count` images: max(20 %, ceil(1 / alpha) - 1).

    With fewer than ceil(1 / alpha) - 1 images no p-value can be as small as `alpha`.
    """
    if not 0 < alpha < 1:
        raise SourceError(f"alpha is {alpha}; expected a false-alarm rate between 0 and 1")
    return max(math.ceil(count / 5), math.ceil(round(1 / alpha, 9)) - 1)


def exclusion_hint(seen: int) -> str:
    """Return the advice of an error if `seen` images were left out because a network was trained on them."""
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
    limit_statistics: bool = True,
    min_statistics: int = 1,
) -> Split:
    """Split a source into calibration, statistics and training images.

    Calibration gets max(20 %, ceil(1 / alpha) - 1) images first. Without training, statistics get all others. With
    training, statistics get `statistics` images, and training gets the rest. At least one group of images is left for
    each later part.

    Args:
        source: the images; unreadable ones are left out, or raise an error if the policy is `raise`.
        alpha: smallest false-alarm rate that the p-values must support.
        statistics: number of statistics images.
        train: whether a network is trained.
        seed: seed of the order.
        exclude: content hashes of images that a given network was trained on: they, their copies and their groups are
            left out of every part.
        groups: `folder` keeps the images of one parent folder (or `group` column) together; a sequence contains the
            group of every image.
        limit_statistics: with training, give the statistics at most half of the images that calibration leaves.
        min_statistics: number of statistics images below which the split is refused.

    Raises:
        SourceError: no calibration image, or fewer than `min_statistics` statistics images would remain.

    Warns:
        TooFewImagesWarning: a part has fewer images than required.
    """
    if statistics < 0:
        raise SourceError(f"statistics must be 0 images or more, got {statistics}")
    hashes = {i: content for i, content in enumerate(source.content_hashes()) if content is not None}
    blocks = _join_equal_images(hashes, _group_names(source, groups))
    excluded = frozenset(exclude)
    kept = [block for block in blocks if not any(hashes[i] in excluded for i in block)]
    ranked = sorted(kept, key=lambda block: min(_seeded_hash(hashes[i], seed) for i in block))
    count = sum(map(len, ranked))
    required = calibration_size(count, alpha)
    hint = exclusion_hint(len(hashes) - count)
    if len(ranked) < 2:
        raise SourceError(
            f"{source.name} cannot be split: {len(source)} images leave {len(ranked)} distinct images or groups; "
            f"expected at least 2, better {required} for calibration and {statistics} for statistics{hint}"
        )
    calibration, rest = _take_blocks(ranked, required, spare=2 if train else 1)
    if train:
        if limit_statistics:
            statistics = min(statistics, max(2, sum(map(len, rest)) // 2))
        statistics_blocks, training = _take_blocks(rest, statistics, spare=1)
    else:
        statistics_blocks, training = rest, []
    result = Split(*(tuple(sorted(chain(*part))) for part in (training, statistics_blocks, calibration)))
    if len(result.statistics) < min_statistics:
        raise SourceError(
            f"calibration at alpha {alpha} needs {required} images, and the statistics {min_statistics} or more; "
            f"{source.name} has {count}; give more images or a larger alpha{hint}"
        )
    shortfalls = []
    if len(result.calibration) < required:
        shortfalls.append(f"{len(result.calibration)} instead of {required} for the calibration (p-values are coarser)")
    if len(result.statistics) < statistics:
        shortfalls.append(
            f"{len(result.statistics)} instead of {statistics} for the statistics (scores are less precise)"
        )
    if train and not result.training:
        shortfalls.append("none for the training")
    if shortfalls:
        message = f"{source.name} has few images: {', '.join(shortfalls)}{hint}"
        warnings.warn(message, TooFewImagesWarning, stacklevel=2)
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


def split_off_validation(
    data: Dataset[T], hashes: Sequence[str], *, validate: bool
) -> tuple[Dataset[T], Dataset[T] | None]:
    """Return the training and the validation part of a data set: 5 % are for validation if `validate`, else none.

    Args:
        data: the data set.
        hashes: content hash of each item, which decides on its part.
        validate: whether there is a validation part.

    Raises:
        SourceError: fewer than 20 items.
    """
    if not validate:
        return data, None
    count = len(hashes) // 20
    if not count:
        raise SourceError(f"validation requires at least 20 training images, there are {len(hashes)}")
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return Subset(data, sorted(order[count:])), Subset(data, sorted(order[:count]))


def _seeded_hash(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _group_names(source: ImageSource, groups: Groups) -> Sequence[str] | None:
    if groups == "none":
        return None
    names: Sequence[str] | None = source.groups if isinstance(groups, str) else groups
    if isinstance(groups, str) and groups != "folder":
        raise SourceError(f"groups is {groups!r}; expected none, folder, or the group of each image")
    if names is None:
        raise SourceError(f"{source.name} has no folders or group column to group by; use groups='none'")
    if len(names) != len(source):
        raise SourceError(f"{len(names)} group names for {len(source)} images of {source.name}; expected one per image")
    return names


def _join_equal_images(hashes: dict[int, str], groups: Sequence[str] | None) -> list[list[int]]:
    """Return blocks of indices that must stay together: connected by equal content or group, also through others."""
    parent = {i: i for i in hashes}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, content in hashes.items():
        for shared in (("content", content), *((("group", groups[i]),) if groups is not None else ())):
            parent[root(i)] = root(first.setdefault(shared, i))
    blocks: dict[int, list[int]] = defaultdict(list)
    for i in hashes:
        blocks[root(i)].append(i)
    return list(blocks.values())


def _take_blocks(ranked: list[list[int]], count: int, spare: int) -> tuple[list[list[int]], list[list[int]]]:
    """Take the first blocks with `count` images together, at least one block, and leave `spare` blocks if possible."""
    taken = 0
    maximum = max(1, len(ranked) - spare)
    for number, block in enumerate(ranked):
        if taken >= count or number >= maximum:
            return (ranked[:number], ranked[number:]) if number else (ranked[:1], ranked[1:])
        taken += len(block)
    return ranked, []
