"""What a benchmark shows of images that a detector gets wrong: the map, and the image as the network makes it again."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farout.benchmark.page_data import Side, read_sides
from farout.benchmark.pictures import MOST, pictures_of, write_pictures, wrong
from farout.detectors.base import Detector
from farout.detectors.reconstruction import Reconstruction
from farout.scoring.folder import score_folder
from small import model, pictures

pytestmark = pytest.mark.usefixtures("cheap_perceptual")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path, str]:
    """Good images of which some are flagged, and others that are all missed, in one folder of score folders."""
    root = tmp_path_factory.mktemp("pictures")
    good = pictures(root / "good", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = Reconstruction(levels=(50, 200), draws=1).fit(good, model(), alpha=0.4, statistics=30)
        for name, low in (("inside", 100), ("other", 101), ("gone", 101)):
            score_folder(detector, pictures(root / name, 60, low=low, seed=5), root / "scores" / name)
    (root / "other" / "000.png").write_text("not a picture")
    shutil.rmtree(root / "gone")
    write_pictures(detector, root / "scores", [str(root / "inside"), str(root / "other")])
    shutil.rmtree(root / "scores" / "gone")
    return detector, root / "scores", str(root / "inside")


def shown(side: Side) -> set[str]:
    return {key for key in side.scores.keys if list(pictures_of(side, key))}


def test_pictures_are_of_the_worst_errors_alone(scored: tuple[Detector, Path, str]) -> None:
    _, folder, inside = scored
    for side in read_sides(folder):
        places = wrong(side.scores, side.source == inside)
        flags = side.scores.is_ood[places]
        assert flags.all() if side.source == inside else not flags.any()
        steps = np.diff(side.scores.score[places])
        assert (steps <= 0).all() if side.source == inside else (steps >= 0).all()
        assert len(places) > MOST, "a test with few errors would say nothing"
        unreadable = {"000.png"} if side.source != inside else set()
        assert shown(side) == {side.scores.keys[place] for place in places[:MOST]} - unreadable


def test_a_map_and_a_reconstruction_of_each(scored: tuple[Detector, Path, str]) -> None:
    detector, folder, inside = scored
    side = next(side for side in read_sides(folder) if side.source == inside)
    key = side.scores.keys[wrong(side.scores, True)[0]]
    found = dict(pictures_of(side, key))
    assert list(found) == ["reconstruction", "map"]
    source = detector.open(inside)
    batch = next(iter(detector.batches(source.subset([list(source.keys).index(key)]))))
    expected = detector.measure(batch, maps=True).pictures["reconstruction"][0, 0]
    with Image.open(found["reconstruction"]) as picture:
        assert np.allclose(np.asarray(picture) / 255, expected.clamp(0, 1), atol=1 / 255)
