"""Pictures of the images that a detector gets wrong: its heat maps, and images such as reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from farout.benchmark.results_folder import ScoredFolder, read_scored_folders
from farout.data.decoding import save_png, to_pil
from farout.detectors.base import Detector, Scores
from farout.detectors.declarations import HeatMaps
from farout.report.overlays import FOLDER, draw_overlay, overlay_path

__all__ = ["MAX_IMAGES", "list_error_images", "rank_errors", "write_error_images"]

MAX_IMAGES = 8
"""Pictures are written for at most so many images of a set."""
_PICTURES_FOLDER = "pictures"


def rank_errors(scores: Scores, in_distribution: bool) -> np.ndarray:
    """Indices of the wrong decisions, the worst first.

    Of in-distribution images those that are flagged, by falling score; of others those that are not, by rising score.
    """
    is_error = scores.is_ood if in_distribution else ~scores.is_ood
    indices = np.flatnonzero(np.isfinite(scores.score) & is_error)
    values = scores.score[indices]
    ranked: np.ndarray = indices[np.argsort(-values if in_distribution else values, kind="stable")]
    return ranked


def write_error_images(detector: Detector, folder: Path, sources: Sequence[str]) -> None:
    """Write pictures of the images that `rank_errors` puts first into the score folders `folder/*/`.

    `maps/<key>.png` is the heat map over the image; `pictures/<name>/<key>.png` is each picture that the method makes,
    such as reconstructions.

    Args:
        detector: a fitted detector that makes maps.
        folder: contains a score folder per source.
        sources: names of the sources, the in-distribution one first. Score folders of other sources may be from an
            earlier run and are left alone.
    """
    heat_maps = detector.heat_maps or HeatMaps()
    for scored in read_scored_folders(folder):
        if scored.source not in sources:
            continue
        errors = rank_errors(scored.scores, scored.source == sources[0])[:MAX_IMAGES]
        source = detector.open_images(scored.source, policy=scored.policy)
        index_of = {key: index for index, key in enumerate(source.keys)}
        images = source.subset([index_of[scored.scores.keys[int(error)]] for error in errors])
        for batch in detector.load_batches(images):
            measured = detector.measure(batch, maps=True)
            assert measured.maps is not None
            for row, index in enumerate(batch.indices):
                name = overlay_path(images.keys[index])
                heat_map = draw_overlay(
                    images[index], measured.maps[row], detector.preprocessing.crop, heat_maps.maximum
                )
                save_png(heat_map, scored.folder / FOLDER / name)
                for kind, pictures in measured.pictures.items():
                    if kind not in heat_maps.pictures:
                        save_png(to_pil(pictures[row]), scored.folder / _PICTURES_FOLDER / kind / name)


def list_error_images(scored: ScoredFolder, key: str) -> Iterator[tuple[str, Path]]:
    """Captions and files of the pictures of an image, as `write_error_images` has written them."""
    name = overlay_path(key)
    kinds = sorted(path for path in (scored.folder / _PICTURES_FOLDER).glob("*") if path.is_dir())
    for caption, path in [*((kind.name, kind / name) for kind in kinds), ("map", scored.folder / FOLDER / name)]:
        if path.is_file():
            yield caption, path
