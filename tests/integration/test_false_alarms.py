"""The promise of the p-values: at most alpha of new normal images are flagged, also where images have near-copies.

A fit with n calibration groups has a false-alarm rate that varies between splits with a standard deviation of
sqrt(alpha (1 - alpha) / (n + 2)): 0.048 for n = 19. The tests average over fits, and allow three standard errors.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copied_scenes import KINDS, as_tensor, copy_scene, copy_scenes, synthetic_scenes
from farout import load
from farout.cli import main
from farout.core.errors import FaroutError, TooFewImagesWarning
from farout.detectors import DETECTORS
from farout.detectors.fitting import recalibrate
from small import CPU

ALPHA, SCENES, COPIES, FITS = 0.05, 50, 5, 8
LIMIT = ALPHA + 3 * (ALPHA * (1 - ALPHA) / 21 / FITS) ** 0.5


def false_alarm_rates(method: str, pool: list[np.ndarray], kind: str, fits: int = FITS, **arguments: object) -> float:
    """Mean share of flagged images of other scenes, over fits on random scenes with near-copies, default settings."""
    rng = np.random.default_rng(0)
    images = copy_scenes(pool, kind, COPIES)
    rates = []
    for seed in range(fits):
        order = rng.permutation(len(pool))
        used = [scene * COPIES + number for scene in order[:SCENES] for number in range(COPIES)]
        new = [scene * COPIES for scene in order[SCENES:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector = DETECTORS[method].load()(**arguments)
            detector.fit(torch.stack([images[i] for i in used]), seed=seed, runtime=CPU)
        rates.append(detector.score(torch.stack([images[i] for i in new])).is_ood.mean())
    return float(np.mean(rates))


@pytest.mark.parametrize("method", ["knn", "mahalanobis", "pca"])
def test_bursts_do_not_raise_the_false_alarm_rate(method: str) -> None:
    """Without groups, 94 to 100 % of the new images were flagged."""
    assert false_alarm_rates(method, synthetic_scenes(90, 32), "noise", fits=3, size=32) <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["knn", "mahalanobis", "pca"])
def test_near_copies_of_every_kind_do_not_raise_the_false_alarm_rate(method: str, kind: str) -> None:
    assert false_alarm_rates(method, synthetic_scenes(120, 96), kind, size=64) <= LIMIT


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet", "fashion_mnist"])
def test_near_copies_of_real_images_do_not_raise_the_false_alarm_rate(name: str, kind: str) -> None:
    from farout.data.sources import open_source

    if name == "fashion_mnist" and kind == "pan":
        pytest.skip("windows of 21 pixels of one object are not like a video")
    source = open_source(f"{name}:train", limit=150, seed=1)
    pool = [np.ascontiguousarray(image.expand(3, -1, -1).numpy().transpose(1, 2, 0)) for image in source]
    for method in ("knn", "mahalanobis", "pca"):
        assert false_alarm_rates(method, pool, kind, size=64) <= LIMIT, method


def test_sixty_files_of_twelve_images_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They gave 20 calibration images, and 38 % of new normal images were flagged."""
    for number, scene in enumerate(synthetic_scenes(12, 16)):
        for copy in range(5):
            Image.fromarray(scene).save(tmp_path / f"{number}_{copy}.png")
    assert main(["fit", "pca", str(tmp_path), "--size", "32", "--out", str(tmp_path / "detector")]) == 1
    message = capsys.readouterr().err
    assert "calibration at alpha 0.05 needs 19 images" in message
    assert "48 of 60 images are copies of others: 12 distinct images" in " ".join(message.split())


def test_a_fit_says_how_many_images_are_copies_and_uses_one_of_each(tmp_path: Path) -> None:
    images = torch.stack(copy_scenes(synthetic_scenes(40, 32), "jpeg", 5))
    with pytest.warns(TooFewImagesWarning, match=r"; 1\d\d of 200 images are copies or near-copies of others: 40 dist"):
        detector = DETECTORS["knn"].load()(size=32).fit(images, statistics=100, runtime=CPU)
    assert (len(detector.statistics), len(detector.calibration)) == (21, 19)
    detector.save(tmp_path / "detector")
    about = load(tmp_path / "detector").provenance
    assert about["images"] == {"training": 0, "statistics": 21, "calibration": 19, "unused": 160, "copies": 160}
    assert about["groups"] == "near_copies"


def test_copies_do_not_count_in_a_new_calibration() -> None:
    scenes, rng = synthetic_scenes(70, 32), np.random.default_rng(0)
    detector = DETECTORS["pca"].load()(size=32)
    with pytest.warns(TooFewImagesWarning, match="64 for the statistics|few images"):
        detector.fit(torch.stack([as_tensor(scene) for scene in scenes[:45]]), statistics=64, runtime=CPU)
    fitted = torch.stack(copy_scenes(scenes[:45], "noise", 2))
    new = torch.stack(copy_scenes(scenes[45:], "noise", 4))
    recalibrate(detector, new)
    assert len(detector.calibration) == 25
    few = torch.stack([as_tensor(copy_scene(scenes[50], "noise", i, rng)) for i in range(20)] + list(new[:12]))
    with pytest.raises(FaroutError, match=r"^4 calibration images cannot flag .*; 28 of 32 images are .*: 4 distinct"):
        recalibrate(detector, few, must_flag=True)
    both = torch.cat([torch.stack([as_tensor(scene) for scene in scenes[:45]]), fitted, new])
    recalibrate(detector, both)
    assert len(detector.calibration) <= 25 + 19, "near-copies of statistics images are left out with them"
