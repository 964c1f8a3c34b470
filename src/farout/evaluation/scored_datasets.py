"""Scored sources side by side: which images both detectors scored, which belong together, who is ahead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from farout.data import catalog
from farout.data.image_source import ImageSource
from farout.detectors.base import Scores
from farout.evaluation.intervals import paired_difference

__all__ = ["OWN", "PAIRED", "Side", "by_indicator", "names", "paired", "shared_images", "slug"]

OWN = "score"
"""What tables call the indicator that is a method's own score."""
PAIRED = ["first", "second", "id", "ood", "group", "role", "difference", "low", "high"]
"""Columns of `paired.csv`: AUROC of the first detector minus that of the second, with its 95 % interval."""


@dataclass
class Side:
    """A scored source; images_per_s is not a number where it was not measured."""

    source: ImageSource
    scores: Scores
    images_per_s: float = float("nan")

    @cached_property
    def hashes(self) -> np.ndarray:
        """The content hash behind every score; empty for an unreadable image, which has no score."""
        known = dict(zip(self.source.keys, self.source.content_hashes(), strict=True))
        return np.array([known[key] or "" for key in self.scores.keys])


def by_indicator(scores: Scores) -> dict[str, np.ndarray]:
    """All scores (B,) of a table by their indicators, the method's own first."""
    return {OWN: scores.score, **scores.indicators}


def slug(source: ImageSource) -> str:
    """A folder name for a source: sources of one name, such as two tensors, differ in content."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", source.name).strip("_.") or "images"
    return f"{plain[-80:]}-{source.fingerprint()[:8]}"


def names(id_name: str, ood_name: str) -> dict[str, str]:
    """The columns id, ood, group and role."""
    return {
        "id": id_name,
        "ood": ood_name,
        "group": catalog.group(id_name, ood_name),
        "role": catalog.role(id_name, ood_name),
    }


def paired(
    first: tuple[str, Sequence[Side]], second: tuple[str, Sequence[Side]], seed: int
) -> Iterator[dict[str, Any]]:
    """AUROC of the first detector's score minus that of the second's, a row for each out-of-distribution source.

    Args:
        first, second: name and sides of a detector, the in-distribution side first; the same sources in both.
        seed: of the bootstrap.
    """
    (name, (inside, *outside)), (other, (their_inside, *their_outside)) = first, second
    for mine, their in zip(outside, their_outside, strict=True):
        both = _shared(inside, their_inside), _shared(mine, their)
        if not len(both[0][0]) or not len(both[1][0]):
            continue
        groups = shared_images(inside, mine)
        if groups is not None:
            groups = groups[0][both[0][2]], groups[1][both[1][2]]
        pairs = [(both[0][i], both[1][i]) for i in (0, 1)]
        found = paired_difference(pairs[0], pairs[1], groups=groups, seed=seed)
        about = {"first": name, "second": other, **names(inside.source.name, mine.source.name)}
        yield {**about, "difference": found.value, "low": found.low, "high": found.high}


def _shared(one: Side, other: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the images that both detectors scored, and which they are among the first one's."""
    theirs = dict(zip(other.scores.keys, other.scores.score, strict=True))
    second = np.array([theirs.get(key, np.nan) for key in one.scores.keys])
    good = np.isfinite(one.scores.score) & np.isfinite(second)
    return one.scores.score[good], second[good], good


def shared_images(inside: Side, outside: Side) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the source images behind the scores of both sides, where a variant of one is on the other: they are not
    independent.
    """
    first, second = inside.hashes, outside.hashes
    return (first, second) if set(first) & set(second) - {""} else None
