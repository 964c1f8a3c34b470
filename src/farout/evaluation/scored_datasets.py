"""Scored datasets, and paired comparison of detectors on the same images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from farout.data import catalog
from farout.data.image_source import ImageSource
from farout.detectors.results import Scores
from farout.evaluation.intervals import paired_difference

__all__ = [
    "DIFFERENCE_COLUMNS",
    "METHOD_SCORE",
    "ScoredDataset",
    "compare_detectors",
    "dataset_columns",
    "folder_name",
    "scores_by_indicator",
    "shared_image_ids",
]

METHOD_SCORE = "score"
"""Name in tables of the indicator that a method uses as its score."""
DIFFERENCE_COLUMNS = ["first", "second", "id", "ood", "ood_group", "role", "difference", "low", "high"]
"""Columns of `differences.csv`: AUROC of the first detector minus that of the second, with its 95 % interval."""


@dataclass
class ScoredDataset:
    """A source, its scores, and the measured speed (NaN if it was not measured)."""

    source: ImageSource
    scores: Scores
    images_per_s: float = float("nan")

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """Content hash of the image of each score; empty for an unreadable image, which has no score."""
        by_key = dict(zip(self.source.keys, self.source.content_hashes(), strict=True))
        return np.array([by_key[key] or "" for key in self.scores.keys])


def scores_by_indicator(scores: Scores) -> dict[str, np.ndarray]:
    """Scores (B,) by the name of the indicator, the method's score first."""
    return {METHOD_SCORE: scores.score, **scores.indicators}


def folder_name(source: ImageSource) -> str:
    """Folder name of a source; it ends in a hash of the content, because two tensors may have one name."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", source.name).strip("_.") or "images"
    return f"{plain[-80:]}-{source.fingerprint()[:8]}"


def dataset_columns(id_name: str, ood_name: str) -> dict[str, str]:
    """Columns `id`, `ood`, `ood_group` (near or far) and `role` (dev or test) of a pair of sources."""
    return {
        "id": id_name,
        "ood": ood_name,
        "ood_group": catalog.ood_group(id_name, ood_name),
        "role": catalog.ood_role(id_name, ood_name),
    }


def compare_detectors(
    first: tuple[str, Sequence[ScoredDataset]], second: tuple[str, Sequence[ScoredDataset]], seed: int
) -> Iterator[dict[str, Any]]:
    """AUROC of the first detector minus that of the second, on the images that both have scored.

    Args:
        first: name and scored datasets of a detector, the in-distribution one first.
        second: another detector with the same datasets in the same order.
        seed: seed of the bootstrap.

    Yields:
        One row of `DIFFERENCE_COLUMNS` per out-of-distribution dataset.
    """
    (first_name, (first_id, *first_oods)), (second_name, (second_id, *second_oods)) = first, second
    for first_ood, second_ood in zip(first_oods, second_oods, strict=True):
        id_first, id_second, id_rows = _common_scores(first_id, second_id)
        ood_first, ood_second, ood_rows = _common_scores(first_ood, second_ood)
        if not len(id_first) or not len(ood_first):
            continue
        ids = shared_image_ids(first_id, first_ood)
        image_ids = None if ids is None else (ids[0][id_rows], ids[1][ood_rows])
        difference = paired_difference((id_first, ood_first), (id_second, ood_second), image_ids=image_ids, seed=seed)
        yield {
            "first": first_name,
            "second": second_name,
            **dataset_columns(first_id.source.name, first_ood.source.name),
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
        }


def _common_scores(first: ScoredDataset, second: ScoredDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both detectors' finite scores of the images that both have scored, and a mask of these images in the first."""
    by_key = dict(zip(second.scores.keys, second.scores.score, strict=True))
    second_scores = np.array([by_key.get(key, np.nan) for key in first.scores.keys])
    is_common = np.isfinite(first.scores.score) & np.isfinite(second_scores)
    return first.scores.score[is_common], second_scores[is_common], is_common


def shared_image_ids(
    in_distribution: ScoredDataset, out_of_distribution: ScoredDataset
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the original images behind the scores of both datasets; None if the datasets have no image in common.

    A variant of a set, such as flipped images, shares images with it: their scores are not independent.
    """
    first, second = in_distribution.content_hashes, out_of_distribution.content_hashes
    return (first, second) if set(first) & set(second) - {""} else None
