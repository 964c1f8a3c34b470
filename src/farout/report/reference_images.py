"""Normal images to compare scored images with: nearest neighbors, and calibration images with the highest scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farout.data.decoding import to_pil
from farout.detectors.base import Detector, Measurements
from farout.report.thumbnails import SourceImages, thumbnail_data_url

__all__ = ["ReferenceImage", "has_embedding", "highest_calibration_images", "nearest_normal_images"]

_CHUNK_SIZE = 4096


@dataclass(frozen=True)
class ReferenceImage:
    """An image that the detector was fitted with.

    Attributes:
        key: key of the image in its source.
        picture: data URL; None where the source cannot be opened any more, or its image has changed.
        value: distance to the scored image, or score.
    """

    key: str
    picture: str | None
    value: float


def nearest_normal_images(
    detector: Detector, measurements: Measurements, images: SourceImages, count: int = 3
) -> dict[str, list[ReferenceImage]]:
    """Find the statistics images nearest to scored images in the detector's embedding.

    Args:
        detector: a fitted detector.
        measurements: those of the scored images; no network is run.
        images: sources of the pictures.
        count: number of neighbors per image.

    Returns:
        By key, the nearest images with the Euclidean distance of the embeddings scaled to length 1 (0 to 2); empty if
        the detector has no embedding.
    """
    if not len(measurements) or not has_embedding(detector):
        return {}
    queries, total = _unit_embeddings(detector, measurements), len(detector.statistics)
    chunks = [range(start, min(start + _CHUNK_SIZE, total)) for start in range(0, total, _CHUNK_SIZE)]
    # |q - x|^2 = 2 - 2 q x for vectors of length 1
    squared_distances = np.concatenate(
        [2 - 2 * queries @ _unit_embeddings(detector, detector.statistics.select(chunk)).T for chunk in chunks], axis=1
    )
    indices = np.argsort(squared_distances, axis=1, kind="stable")[:, :count]
    distances = np.sqrt(np.maximum(np.take_along_axis(squared_distances, indices, axis=1), 0))
    statistics_keys, hashes = detector.statistics.keys, detector.statistics_hashes
    source, is_reduced = detector.provenance.get("source"), detector.preprocessing.reduced_decoding
    return {
        key: [
            ReferenceImage(
                statistics_keys[index],
                _unchanged_picture(images, source, statistics_keys[index], hashes, is_reduced),
                float(distance),
            )
            for index, distance in zip(*neighbors)
        ]
        for key, *neighbors in zip(measurements.keys, indices, distances)
    }


def has_embedding(detector: Detector) -> bool:
    """Whether the detector has an embedding, in which images can be compared."""
    return detector.compute_embedding(detector.statistics.select([0])) is not None


def _unit_embeddings(detector: Detector, measurements: Measurements) -> np.ndarray:
    """Embeddings scaled to length 1; zero vectors stay zero."""
    vectors = detector.compute_embedding(measurements)
    assert vectors is not None
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def highest_calibration_images(detector: Detector, images: SourceImages, count: int = 6) -> list[ReferenceImage]:
    """The calibration images with the highest scores: what the detector finds unusual among normal images."""
    scores = detector.compute_scores(detector.calibration)[detector.score_name].double().numpy()
    keys = detector.calibration.keys
    source = detector.provenance.get("calibration_source", detector.provenance.get("source"))
    return [
        ReferenceImage(
            keys[index],
            _unchanged_picture(
                images, source, keys[index], detector.calibration_hashes, detector.preprocessing.reduced_decoding
            ),
            float(scores[index]),
        )
        for index in np.argsort(-scores, kind="stable")[:count]
    ]


def _unchanged_picture(
    images: SourceImages, source: str | None, key: str, hashes: frozenset[str], is_reduced: bool
) -> str | None:
    """Data URL of an image whose content hash is one of those that the detector was fitted with."""
    if source is None or images.content_hash(source, key, is_reduced) not in hashes:
        return None
    image = images.read(source, key)
    return None if image is None else thumbnail_data_url(to_pil(image))
