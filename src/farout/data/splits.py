"""Seeded splits by content: training, statistics and calibration share no image, no near-copy and no group.

Groups of images are ordered by `sha256("{seed}:{content hash}")` of one of their images, so that a split does not
depend on names or order, and adding images to a set moves few images to another part. Equal images, near-copies and
images of one given group stay together. Statistics use one of several near-copies, and calibration one image of a
group: p-values compare a new image with independent ones.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from torch.utils.data import Dataset, Subset

from farout.core.errors import SourceError, TooFewImagesWarning
from farout.data.image_source import ImageSource

__all__ = [
    "GroupedImages",
    "Groups",
    "Split",
    "calibration_size",
    "exclusion_hint",
    "group_images",
    "log_split",
    "split_off_validation",
    "split_source",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Groups = Literal["near_copies", "folder", "none"] | Sequence[str]
"""Images that stay together, in addition to equal ones: near-copies, those and a folder or `group` column, or none; a
sequence contains the group of every image, whose near-copies stay together as well."""


@dataclass(frozen=True)
class Split:
    """Indices of the images of each part of a source, ascending and disjoint.

    Attributes:
        training, statistics, calibration: the parts.
        unused: near-copies of statistics and calibration images, and further images of their groups.
        copies: number of images that are copies or near-copies of others in the source.
    """

    training: tuple[int, ...]
    statistics: tuple[int, ...]
    calibration: tuple[int, ...]
    unused: tuple[int, ...] = ()
    copies: int = 0


@dataclass(frozen=True)
class GroupedImages:
    """The readable images of a source, in groups that stay together.

    Attributes:
        keys: key of each image of the source.
        hashes: content hash by index.
        distinct: number of the distinct image by index: near-copies, and equal images, have the same.
        groups: indices of the images of each group.
        has_near_copies: whether some images are near-copies, not only equal.
    """

    keys: Sequence[str]
    hashes: dict[int, str]
    distinct: dict[int, int]
    groups: list[list[int]]
    has_near_copies: bool

    @property
    def copies(self) -> int:
        """Number of images that are copies or near-copies of others."""
        return len(self.hashes) - len(set(self.distinct.values()))

    def describe_copies(self) -> str:
        """Return a clause with the number of copies and of distinct images; empty if there are no copies."""
        if not self.copies:
            return ""
        total = len(self.hashes)
        distinct = f"{total - self.copies} distinct images"
        if self.copies == 1:
            return f"1 of {total} images is a {'near-' * self.has_near_copies}copy of another: {distinct}"
        kind = "copies or near-copies" if self.has_near_copies else "copies"
        return f"{self.copies} of {total} images are {kind} of others: {distinct}"

    def rank_groups(self, seed: int) -> list[list[int]]:
        """Return the groups in the seeded order, which does not depend on their sizes."""
        return sorted(self.groups, key=lambda group: _seeded_hash(self.first_hash(group), seed))

    def first_hash(self, group: Sequence[int]) -> str:
        """Return the smallest content hash of a group, which identifies it."""
        return min(self.hashes[i] for i in group)

    def choose_image(self, group: Sequence[int], seed: int) -> int:
        """Choose one image of a group; of equal images, that with the first key."""
        return min(group, key=lambda i: (_seeded_hash(self.hashes[i], seed), self.keys[i]))

    def choose_distinct(self, group: Sequence[int], seed: int) -> list[int]:
        """Choose one of all near-copies in a group each."""
        copies: dict[int, list[int]] = defaultdict(list)
        for i in group:
            copies[self.distinct[i]].append(i)
        return [self.choose_image(images, seed) for images in copies.values()]


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


def group_images(source: ImageSource, groups: Groups = "near_copies") -> GroupedImages:
    """Find the images that must stay in one part of a split.

    Args:
        source: the images; unreadable ones are left out, or raise an error if the policy is `raise`.
        groups: see `split_source`.

    Raises:
        SourceError: the source has no folders or groups, or the number of group names is not that of the images.
    """
    from farout.data.near_copies import find_near_copies  # imports scipy, which scoring does not use

    given = _group_names(source, groups)
    find = groups != "none"
    hashes = {i: text for i, text in enumerate(source.content_hashes(thumbnails=find)) if text is not None}
    contents = {content: i for i, content in sorted(hashes.items(), reverse=True)}
    ordered = sorted(contents)
    labels = np.arange(len(ordered))
    if find and ordered:
        thumbnails = np.frombuffer(b"".join(source.thumbnail(contents[content]) for content in ordered), np.uint8)
        found = find_near_copies(thumbnails.reshape(len(ordered), -1))
        labels = found.labels
        if found.is_restricted:
            logger.warning(
                "%s: more than half of the images resemble one another; only those that hardly differ count as "
                "near-copies. If several show one scene, give their groups (--groups folder, or a column group)",
                source.name,
            )
    label_of = dict(zip(ordered, labels.tolist()))
    distinct = {i: label_of[content] for i, content in hashes.items()}
    blocks = _join_groups(distinct, given)
    return GroupedImages(
        source.keys, hashes, distinct, blocks, has_near_copies=len(set(label_of.values())) < len(ordered)
    )


def split_source(
    source: ImageSource,
    *,
    alpha: float = 0.05,
    statistics: int,
    train: bool,
    seed: int = 0,
    exclude: Collection[str] = (),
    groups: Groups = "near_copies",
    calibrate: bool = True,
    limit_statistics: bool = True,
    min_statistics: int = 1,
    max_statistics: int | None = None,
) -> Split:
    """Split a source into calibration, statistics and training images.

    Calibration gets one image of max(20 %, ceil(1 / alpha) - 1) groups first. Without training, statistics get all
    others. With training, statistics get `statistics` images, and training gets the rest. At least one group of images
    is left for each later part. Statistics contain one image of several near-copies.

    Args:
        source: the images; unreadable ones are left out, or raise an error if the policy is `raise`.
        alpha: smallest false-alarm rate that the p-values must support.
        statistics: number of statistics images.
        train: whether a network is trained.
        seed: seed of the order.
        exclude: content hashes of images that a given network was trained on: they, their copies and their groups are
            left out of every part.
        groups: images that stay together: `near_copies`; `folder`: near-copies, and the images of one parent folder (or
            `group` column); `none`: only equal images; a sequence: near-copies, and the images of one group.
        calibrate: whether there is a calibration part; it is empty for images that remain of another split.
        limit_statistics: with training, give the statistics at most half of the images that calibration leaves.
        min_statistics: number of distinct statistics images below which the split is refused.
        max_statistics: number of statistics images above which groups, chosen by content hash, go to the calibration as
            far as it lacks images because of `exclude`; the others are unused. None: no limit.

    Raises:
        SourceError: no calibration image, or fewer than `min_statistics` statistics images would remain.

    Warns:
        TooFewImagesWarning: a part has fewer images than required.
    """
    if statistics < 0:
        raise SourceError(f"statistics must be 0 images or more, got {statistics}")
    images = group_images(source, groups)
    excluded = frozenset(exclude)
    ranked = [group for group in images.rank_groups(seed) if not any(images.hashes[i] in excluded for i in group)]
    count = sum(map(len, ranked))
    required = calibration_size(len(ranked), alpha) if calibrate else 0
    about_copies = f"; {images.describe_copies()}" if images.copies else ""
    hint = about_copies + exclusion_hint(len(images.hashes) - count)
    if len(ranked) < 2:
        reasons = [f"{key}: {reason}" for key, reason in source.unreadable.items()]
        about_unreadable = f" ({len(reasons)} cannot be read, such as {reasons[0]})" if reasons else ""
        raise SourceError(
            f"{source.name} cannot be split: {len(source)} images{about_unreadable} leave {len(ranked)} distinct "
            f"images or groups; expected at least 2, better {required} for calibration and {statistics} for "
            f"statistics{hint}"
        )

    def count_distinct(group: list[int]) -> int:
        return len({images.distinct[i] for i in group})

    calibration_groups, rest = _take_groups(ranked, required, spare=2 if train else 1) if calibrate else ([], ranked)
    if train:
        if limit_statistics:
            statistics = min(statistics, max(2, sum(map(count_distinct, rest)) // 2))
        statistics_groups, training = _take_groups(rest, statistics, spare=1, size=count_distinct)
    else:
        statistics_groups, training = rest, []
    chosen = [i for group in statistics_groups for i in images.choose_distinct(group, seed)]
    if max_statistics is not None and len(chosen) > max_statistics:
        # chosen by hash so that the order of the source does not matter
        by_hash = sorted(statistics_groups, key=images.first_hash)
        kept, others = _take_groups(by_hash, max_statistics, spare=0, size=count_distinct)
        missing = max(0, calibration_size(len(images.groups), alpha) - len(calibration_groups)) if calibrate else 0
        calibration_groups += others[:missing]
        chosen = [i for group in kept for i in images.choose_distinct(group, seed)]
        chosen = sorted(chosen, key=lambda i: images.hashes[i])[:max_statistics]
    calibration = [images.choose_image(group, seed) for group in calibration_groups]
    used = {*calibration, *chosen, *(i for group in training for i in group)}
    result = Split(
        training=tuple(sorted(i for group in training for i in group)),
        statistics=tuple(sorted(chosen)),
        calibration=tuple(sorted(calibration)),
        unused=tuple(sorted({i for group in ranked for i in group} - used)),
        copies=images.copies,
    )
    if len(result.statistics) < min_statistics:
        raise SourceError(
            f"calibration at alpha {alpha} needs {required} images, and the statistics {min_statistics} or more; "
            f"{source.name} has {_count_groups(count, len(ranked))}; give more images or a larger alpha{hint}"
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
    if calibrate and len(result.calibration) < calibration_size(0, alpha):
        shortfalls.append(f"too few distinct images or groups to flag anything at alpha {alpha}")
    if shortfalls:
        message = f"{source.name} has few images: {', '.join(shortfalls)}{hint}"
        warnings.warn(message, TooFewImagesWarning, stacklevel=2)
    elif images.copies:
        logger.info("%s: %s", source.name, images.describe_copies())
    return result


def _count_groups(images: int, groups: int) -> str:
    return f"{images}" if images == groups else f"{images} images in {groups} distinct images or groups"


def log_split(source: ImageSource, parts: Split) -> None:
    """Log the number of images in each part, before long work starts."""
    counts = {
        "training": len(parts.training),
        "statistics": len(parts.statistics),
        "calibration": len(parts.calibration),
    }
    text = ", ".join(f"{count} for {part}" for part, count in counts.items() if count)
    if parts.unused:
        text += f"; {len(parts.unused)} are not used: copies of these, or of the same groups"
    logger.info("%s: %d images split into %s", source.name, sum(counts.values()) + len(parts.unused), text)


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
    if isinstance(groups, str) and groups in ("none", "near_copies"):
        return None
    names: Sequence[str] | None = source.groups if isinstance(groups, str) else groups
    if isinstance(groups, str) and groups != "folder":
        expected = "near_copies, folder, none, or the group of each image"
        raise SourceError(f"groups is {groups!r}; expected {expected}")
    if names is None:
        raise SourceError(f"{source.name} has no folders or group column to group by; use groups='near_copies'")
    if len(names) != len(source):
        raise SourceError(f"{len(names)} group names for {len(source)} images of {source.name}; expected one per image")
    return names


def _join_groups(distinct: dict[int, int], names: Sequence[str] | None) -> list[list[int]]:
    """Return groups of indices that must stay together: connected by near-copies or names, also through others."""
    parent = {i: i for i in distinct}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, int | str], int] = {}
    for i, number in distinct.items():
        for shared in (("distinct", number), *((("name", names[i]),) if names is not None else ())):
            parent[root(i)] = root(first.setdefault(shared, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in distinct:
        groups[root(i)].append(i)
    return list(groups.values())


def _take_groups(
    ranked: list[list[int]], count: int, spare: int, size: Callable[[list[int]], int] = lambda group: 1
) -> tuple[list[list[int]], list[list[int]]]:
    """Take the first groups with a total size of `count`, at least one, and leave `spare` groups if possible."""
    taken = 0
    maximum = max(1, len(ranked) - spare)
    for number, group in enumerate(ranked):
        if taken >= count or number >= maximum:
            return (ranked[:number], ranked[number:]) if number else (ranked[:1], ranked[1:])
        taken += size(group)
    return ranked, []
