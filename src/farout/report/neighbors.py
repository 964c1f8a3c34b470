"""Good images beside scored ones: those nearest to them, and those that score highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from farout.data.decoding import to_pil
from farout.detectors.base import Detector, Measurements
from farout.report.thumbnails import SourceImages, small_address

__all__ = ["GoodImage", "highest_good", "nearest_good"]

_CHUNK = 4096


@dataclass(frozen=True)
class GoodImage:
    """An image that the detector was fitted with: its key, the data address of its picture where the source can be
    opened again and still holds that image, and its distance or its score.
    """

    key: str
    picture: str | None
    value: float


def nearest_good(
    detector: Detector, measured: Path, keys: Sequence[str], images: SourceImages, count: int = 3
) -> dict[str, list[GoodImage]]:
    """By key, the statistics images whose vectors, of length 1, lie nearest, with the distance (0 to 2); empty where
    the detector has no `embedding`.

    Args:
        detector: a fitted detector.
        measured: the `measurements.parquet` of the scored images; no network runs.
        keys: of scored images.
        images: where pictures come from.
        count: neighbours of each.
    """
    if not keys or not measured.is_file() or detector.embedding(detector.statistics.select([0])) is None:
        return {}
    table = pq.read_table(measured, partitioning=None, filters=[("key", "in", list(keys))])
    given = Measurements.from_table(table)
    places, distances = _nearest(_unit(detector, given), detector, count)
    known, hashes = detector.statistics.keys, detector.statistics_hashes
    source = detector.provenance.get("source")
    return {
        key: [
            GoodImage(known[place], _picture(images, source, known[place], hashes), float(gap))
            for place, gap in zip(row, gaps)
        ]
        for key, row, gaps in zip(given.keys, places, distances)
    }


def _nearest(vectors: np.ndarray, detector: Detector, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places among the statistics and distances, (n, count) each, the nearest first."""
    total = len(detector.statistics)
    found = [
        2 - 2 * vectors @ _unit(detector, detector.statistics.select(range(start, min(start + _CHUNK, total)))).T
        for start in range(0, total, _CHUNK)
    ]
    squares = np.concatenate(found, axis=1)
    places = np.argsort(squares, axis=1, kind="stable")[:, :count]
    return places, np.sqrt(np.maximum(np.take_along_axis(squares, places, axis=1), 0))


def _unit(detector: Detector, measurements: Measurements) -> np.ndarray:
    """Embeddings of length 1; one of length 0 stays."""
    vectors = detector.embedding(measurements)
    assert vectors is not None
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def highest_good(detector: Detector, images: SourceImages, count: int = 6) -> list[GoodImage]:
    """The calibration images with the highest scores, with these: what the detector takes for odd among good ones."""
    scores, keys = detector.calibration_rows[detector.score_name], detector.calibration.keys
    about = detector.provenance
    source = about.get("calibration_source", about.get("source"))
    return [
        GoodImage(keys[place], _picture(images, source, keys[place], detector.calibration_hashes), float(scores[place]))
        for place in np.argsort(-scores, kind="stable")[:count]
    ]


def _picture(images: SourceImages, source: str | None, key: str, known: frozenset[str]) -> str | None:
    """The picture of an image of a source, where its content is one that the detector knows."""
    if source is None or images.hash(source, key) not in known:
        return None
    image = images.read(source, key)
    return None if image is None else small_address(to_pil(image))
