"""What a detector sees in images that it gets wrong: its maps, and images as the network makes them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from farout.benchmark.page_data import Side, read_sides
from farout.data.decoding import save_png, to_pil
from farout.detectors.base import Detector, Scores
from farout.report.heat_colors import MapScale
from farout.report.overlays import FOLDER, draw_overlay, overlay_path

__all__ = ["MOST", "pictures_of", "write_pictures", "wrong"]

MOST = 8
"""Images of a set that pictures are made of at most."""
_PICTURES = "pictures"


def wrong(scores: Scores, inside: bool) -> np.ndarray:
    """Places of the images that are judged wrongly, the worst first: in-distribution ones that are flagged, by falling
    score; others that are not, by rising score.
    """
    known = np.isfinite(scores.score)
    chosen = np.flatnonzero(known & (scores.is_ood if inside else ~scores.is_ood))
    order: np.ndarray = chosen[np.argsort(-scores.score[chosen] if inside else scores.score[chosen], kind="stable")]
    return order


def write_pictures(detector: Detector, folder: Path, sources: Sequence[str]) -> None:
    """Beside the scores in `folder/*/`, of the images that `wrong` puts first: `maps/<key>.png`, the map laid over the
    image, and `pictures/<name>/<key>.png` for every picture that the method makes, such as reconstructions.

    Args:
        detector: a fitted detector that makes maps.
        folder: of score folders, one a source.
        sources: by the names that their score folders know, the in-distribution one first; others that an earlier run
            has scored may not be here any more.
    """
    scale = MapScale.of(detector)
    for side in (side for side in read_sides(folder) if side.source in sources):
        places = [int(place) for place in wrong(side.scores, side.source == sources[0])[:MOST]]
        source = detector.open(side.source, policy=side.policy)
        rows = {key: row for row, key in enumerate(source.keys)}
        some = source.subset([rows[side.scores.keys[place]] for place in places])
        for batch in detector.batches(some):
            measured = detector.measure(batch, maps=True)
            assert measured.maps is not None
            for row, index in enumerate(batch.indices):
                name = overlay_path(some.keys[index])
                heat = draw_overlay(some[index], measured.maps[row], detector.preprocessing.crop, scale)
                save_png(heat, side.folder / FOLDER / name)
                for kind, made in measured.pictures.items():
                    if not kind.startswith("_") and kind not in detector.map_pictures:
                        save_png(to_pil(made[row]), side.folder / _PICTURES / kind / name)


def pictures_of(side: Side, key: str) -> Iterator[tuple[str, Path]]:
    """Captions and files of what `write_pictures` made of an image."""
    name = overlay_path(key)
    kinds = sorted(path for path in (side.folder / _PICTURES).glob("*") if path.is_dir())
    for caption, path in [*((kind.name, kind / name) for kind in kinds), ("map", side.folder / FOLDER / name)]:
        if path.is_file():
            yield caption, path
