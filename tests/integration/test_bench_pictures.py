"""Pictures of the images that a detector gets wrong: the heat map and the reconstruction."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farout.benchmark.error_images import MAX_IMAGES, list_error_images, rank_errors, write_error_images
from farout.benchmark.results_folder import ScoredFolder, read_scored_folders
from farout.data.sources import open_source
from farout.detectors.base import Detector
from farout.detectors.reconstruction import Reconstruction
from farout.scoring.folder import score_folder
from small import model, pictures

pytestmark = pytest.mark.usefixtures("cheap_perceptual")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path, str]:
    """Normal images of which some are flagged, and others that are all missed, in one folder of score folders."""
    root = tmp_path_factory.mktemp("pictures")
    normal = pictures(root / "normal", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = Reconstruction(levels=(50, 200), draws=1).fit(normal, model(), alpha=0.4, statistics=30)
        for name, low in (("inside", 100), ("other", 101), ("gone", 101)):
            score_folder(detector, pictures(root / name, 60, low=low, seed=5), root / "scores" / name)
    (root / "other" / "000.png").write_text("not a picture")
    shutil.rmtree(root / "gone")
    write_error_images(detector, root / "scores", [str(root / "inside"), str(root / "other")])
    shutil.rmtree(root / "scores" / "gone")
    return detector, root / "scores", str(root / "inside")


def shown(scored: ScoredFolder) -> set[str]:
    return {key for key in scored.scores.keys if list(list_error_images(scored, key))}


def test_pictures_show_the_worst_errors_only(evaluated: tuple[Detector, Path, str]) -> None:
    _, folder, inside = evaluated
    for scored in read_scored_folders(folder):
        errors = rank_errors(scored.scores, scored.source == inside)
        flags = scored.scores.is_ood[errors]
        assert flags.all() if scored.source == inside else not flags.any()
        steps = np.diff(scored.scores.score[errors])
        assert (steps <= 0).all() if scored.source == inside else (steps >= 0).all()
        assert len(errors) > MAX_IMAGES, "a test with few errors would be empty"
        unreadable = {"000.png"} if scored.source != inside else set()
        assert shown(scored) == {scored.scores.keys[error] for error in errors[:MAX_IMAGES]} - unreadable


def test_a_map_and_a_reconstruction_of_each(evaluated: tuple[Detector, Path, str]) -> None:
    detector, folder, inside = evaluated
    scored = next(scored for scored in read_scored_folders(folder) if scored.source == inside)
    key = scored.scores.keys[rank_errors(scored.scores, True)[0]]
    found = dict(list_error_images(scored, key))
    assert list(found) == ["reconstruction", "map"]
    source = open_source(inside)
    batch = next(iter(detector.load_batches(source.subset([list(source.keys).index(key)]))))
    expected = detector.measure(batch, maps=True).pictures["reconstruction"][0, 0]
    with Image.open(found["reconstruction"]) as picture:
        assert np.allclose(np.asarray(picture) / 255, expected.clamp(0, 1), atol=1 / 255)
