"""Warnings about networks that know classes of which there are no images."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from farout import ClassNoise, open_source
from farout.classifiers.networks import OUTLIER
from farout.core.errors import MisleadingResultWarning
from farout.synthesis.leakage import warn_about_extra_classes
from small import CPU, classifier, conditional, model, pictures


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        pictures(tmp_path / "labelled" / name, 3, seed=number)
    return tmp_path / "labelled"


def leakage_warnings(*given: Any, **networks: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_about_extra_classes(*given, **networks)
    assert all(each.category is MisleadingResultWarning for each in found)
    return [str(each.message) for each in found]


def test_a_generator_that_knows_more_classes(images: Path, tmp_path: Path) -> None:
    some = f"{images}@classes=a,c"
    settings: dict[str, Any] = {"count": 2, "diffusion": conditional(), "runtime": CPU}
    with pytest.warns(
        MisleadingResultWarning, match=r"diffusion model knows 1 class \(b\), of which .* has no images"
    ) as found:
        ClassNoise(steps=2).synthesize(some, tmp_path / "o", **settings)
    assert len([each for each in found if "has no images" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassNoise(steps=2).synthesize(images, tmp_path / "p", **settings)


def test_many_classes_are_not_all_named(images: Path) -> None:
    (message,) = leakage_warnings(open_source(images), conditional(classes=20))
    assert "knows 17 classes (d, e, f, g, h, i, j, k, l, m, n, o, …)" in message


def test_a_generator_that_was_trained_on_images_of_other_classes(images: Path) -> None:
    """An unconditional model has no class names, but a list of its training images."""
    whole = open_source(images)
    network = model(trained_on=whole.content_hashes()[:4])
    (message,) = leakage_warnings(open_source(f"{images}@classes=a"), network)
    assert "diffusion model was trained on images of 1 class (b)" in message
    assert leakage_warnings(open_source(f"{images}@classes=a,b"), network) == []
    assert leakage_warnings(open_source(images / "a"), network) == [], "nothing is known about images of other sets"
    (images / "b" / "000.png").write_text("not a picture")
    assert leakage_warnings(open_source(f"{images}@classes=a"), network) == [], "its only training image is unreadable"


def test_a_class_is_reported_once(images: Path) -> None:
    network = conditional(classes=2, trained_on=open_source(images).content_hashes())
    (message,) = leakage_warnings(open_source(f"{images}@classes=a"), network)
    assert "knows 1 class (b) and was trained on images of 1 class (c)" in message


def test_a_classifier_that_knows_more_classes(images: Path) -> None:
    some, judge = open_source(f"{images}@classes=a,c"), classifier()
    judge.class_names = ("a", "b", OUTLIER)
    assert "the classifier knows 1 class (b)" in leakage_warnings(some, classifier=judge)[0]
    assert len(leakage_warnings(some, conditional(), judge)) == 2
    judge.class_names = ("a", "c", OUTLIER)
    assert leakage_warnings(some, classifier=judge) == []
    judge.class_names = ("0", "1", "2")
    assert leakage_warnings(some, classifier=judge) == [], "numbers are not class names"
    judge.trained_on = frozenset(open_source(images).content_hashes())
    assert "the classifier was trained on images of 1 class (b)" in leakage_warnings(some, classifier=judge)[0]


def test_the_full_set_of_a_subset(images: Path) -> None:
    source = open_source(images)
    part = open_source(f"{images}@classes=b,vflip").subset([2, 0])
    assert part.full_source().keys == source.keys
    assert part.full_source().variant == "vflip"
    assert part.keys == ("b/002.png", "b/000.png"), "the subset does not change"
    assert torch.equal(source.subset([3]).full_source()[0], source[0])
