"""Splits: p-values hold only if no image, copy or burst stands on both sides."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from farout.core.errors import FaroutError, SourceError, TooFewImagesWarning, UnreadableImageError
from farout.data.sources import open_source
from farout.data.splits import Split, calibration_size, split_source
from farout.detectors.reconstruction import Reconstruction
from small import model, pictures


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8))


def parts(result: Split) -> list[set[int]]:
    return [set(result.training), set(result.statistics), set(result.calibration)]


def disjoint(result: Split) -> bool:
    a, b, c = parts(result)
    return not (a & b or a & c or b & c)


def test_counts_are_as_promised_and_parts_disjoint():
    result = split_source(open_source(pixels(200)), statistics=30, train=True)
    assert len(result.calibration) == 40
    assert len(result.statistics) == 30
    assert len(result.training) == 130
    assert disjoint(result)
    assert set().union(*parts(result)) == set(range(200))
    assert all(list(part) == sorted(part) for part in (result.training, result.statistics, result.calibration))


def test_statistics_get_the_rest_where_nothing_is_trained():
    result = split_source(open_source(pixels(200)), statistics=30, train=False)
    assert (len(result.calibration), len(result.statistics), len(result.training)) == (40, 160, 0)


@pytest.mark.parametrize(("count", "alpha", "wish"), [(10, 0.05, 19), (1000, 0.05, 200), (100, 0.01, 99), (10, 0.1, 9)])
def test_calibration_suffices_for_alpha(count, alpha, wish):
    assert calibration_size(count, alpha) == wish
    assert 1 / (wish + 1) <= alpha + 1e-12  # the smallest p-value there is


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0])
def test_impossible_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        calibration_size(10, alpha)


def test_the_split_follows_content_not_order():
    images = pixels(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    first = split_source(open_source(images), statistics=10, train=True)
    second = split_source(open_source(images[order]), statistics=10, train=True)
    for name in ("training", "statistics", "calibration"):
        assert {int(order[i]) for i in getattr(second, name)} == set(getattr(first, name))


def test_the_seed_changes_the_split_and_repeats_it():
    source = open_source(pixels(60))
    first = split_source(source, statistics=10, train=True, seed=0)
    assert split_source(source, statistics=10, train=True, seed=0) == first
    assert split_source(source, statistics=10, train=True, seed=1) != first


def test_copies_never_stand_on_both_sides_and_count_once_where_nothing_is_trained():
    images = pixels(50).repeat(2, 1, 1, 1)
    result = split_source(open_source(images), statistics=10, train=True)
    assert disjoint(result)
    assert {i % 50 for i in range(100)} == {i % 50 for part in parts(result) for i in part}
    assert (len(result.calibration), len(result.statistics), len(result.training)) == (19, 10, 42)
    assert sorted(i % 50 for i in result.unused) == sorted(i % 50 for i in (*result.statistics, *result.calibration))
    assert {i for i in result.training if i < 50} == {i - 50 for i in result.training if i >= 50}
    assert result.copies == 50


def test_copies_are_no_calibration_images():
    """60 files of 12 images: with 20 calibration files, 38 % of new normal images were flagged at alpha 0.05."""
    source = open_source(pixels(12).repeat(5, 1, 1, 1))
    expected = r"11 instead of 19 for the calibration.* alpha 0\.05; 48 of 60 images are copies of others: 12 distinct"
    with pytest.warns(TooFewImagesWarning, match=expected):
        result = split_source(source, statistics=1, train=False)
    assert (len(result.calibration), len(result.statistics)) == (11, 1)
    with pytest.raises(SourceError, match=r"needs 19 images.* 60 images in 12 distinct .*; 48 of 60 images are copies"):
        split_source(source, statistics=10, train=False, min_statistics=2)


def test_the_chance_of_a_group_to_be_calibrated_does_not_grow_with_its_size():
    """Else the calibration images would be those of the large bursts, and others too rare among them."""
    images = pixels(100)
    names = [f"burst {i // 50}" if i < 50 else f"single {i}" for i in range(100)]
    first = [
        any(
            i < 50
            for i in split_source(open_source(images), statistics=5, train=False, seed=seed, groups=names).calibration
        )
        for seed in range(60)
    ]
    assert 12 <= sum(first) <= 35, "the burst is one of 51 groups, of which 19 are for the calibration"


def test_folders_are_kept_whole(tmp_path):
    for i, array in enumerate(pixels(60)[:, 0].numpy()):
        folder = tmp_path / f"burst{i // 5}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / f"{i:02}.png")
    source = open_source(tmp_path)
    result = split_source(source, alpha=0.2, statistics=10, train=True, groups="folder")
    assert len(result.calibration) == 4, "one image of a folder"
    owners = [{source.groups[i] for i in part} for part in parts(result)]
    assert all(owners)
    assert len(set().union(*owners)) == sum(map(len, owners))
    plain = split_source(source, statistics=10, train=True)
    assert {source.groups[i] for i in plain.training} & {source.groups[i] for i in plain.calibration}


def test_given_groups_and_copies_chain_together():
    images = pixels(60)
    images[10] = images[0]  # joins group g0 with group g1
    names = [f"g{i // 10}" for i in range(60)]
    result = split_source(open_source(images), alpha=0.5, statistics=1, train=True, groups=names)
    homes = {
        name
        for name, part in zip(("training", "statistics", "calibration"), parts(result))
        for i in part
        if names[i] in ("g0", "g1")
    }
    assert len(homes) == 1
    assert not homes & {"training"} or set(range(20)) <= set(result.training)


def test_groups_of_another_length_or_kind_are_refused():
    source = open_source(pixels(10))
    with pytest.raises(SourceError, match="3 group names for 10 images"):
        split_source(source, statistics=1, train=False, groups=["a", "b", "c"])
    with pytest.raises(SourceError, match="no folders"):
        split_source(source, statistics=1, train=False, groups="folder")
    with pytest.raises(SourceError, match="'label'"):
        split_source(source, statistics=1, train=False, groups="label")


def test_images_a_network_was_trained_on_are_left_out_with_their_copies():
    images = pixels(100)
    images[99] = images[0]
    source = open_source(images)
    trained = {source.content_hash(i) for i in range(40)}
    result = split_source(source, statistics=10, train=False, exclude=trained)
    assert set().union(*parts(result)) == set(range(40, 99))


def test_excluding_everything_is_an_error():
    source = open_source(pixels(20))
    with pytest.raises(SourceError, match=r"20 were left out .* --statistics N"):
        split_source(source, statistics=1, train=False, exclude=[source.content_hash(i) for i in range(20)])


def test_a_training_gets_at_least_as_many_images_as_the_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the number of statistics images is a maximum
        result = split_source(open_source(pixels(120)), statistics=400, train=True)
    assert [len(part) for part in parts(result)] == [48, 48, 24]
    assert disjoint(result)


def test_a_shortfall_names_the_parts_that_are_short():
    with pytest.warns(TooFewImagesWarning, match=r"few images: 11 instead of 64 for the statistics \([^)]*\)$"):
        result = split_source(open_source(pixels(30)), statistics=64, train=False)
    assert disjoint(result)


def test_too_few_statistics_are_an_error_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SourceError, match=r"alpha 0\.001 needs 999 images.* has 30;"):
            split_source(open_source(pixels(30)), alpha=0.001, statistics=64, train=False, min_statistics=2)


def test_a_shortfall_says_what_is_left_of_images_that_a_network_has_seen():
    """More images held out when it is trained are what helps; without such a network nothing is said of one."""
    source = open_source(pixels(40))
    seen = [source.content_hash(i) for i in range(15)]
    with pytest.warns(
        TooFewImagesWarning, match=r"6 instead of 64 for the statistics.*; 15 were left out .* --statistics N"
    ):
        split_source(source, statistics=64, train=False, exclude=seen)
    with pytest.warns(TooFewImagesWarning, match=r"less precise\)$"):
        split_source(source, statistics=64, train=False)


@pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")
@pytest.mark.parametrize("seen", [18, 20])
def test_a_fit_whose_model_has_seen_nearly_all_images_says_how_to_train_it(tmp_path, seen):
    source = open_source(pictures(tmp_path / "good", 20))
    network = model(trained_on=[source.content_hash(i) for i in range(seen)])
    with pytest.raises(FaroutError, match=rf"{seen} were left out .* \(farout train … --statistics N\)"):
        Reconstruction().fit(str(tmp_path / "good"), network)


def test_a_very_small_set_still_gives_every_part_something():
    with pytest.warns(TooFewImagesWarning, match="1 instead of 19 for the calibration"):
        result = split_source(open_source(pixels(3)), statistics=2, train=True)
    assert [len(part) for part in parts(result)] == [1, 1, 1]


def test_too_little_training_warns():
    with pytest.warns(TooFewImagesWarning, match="none for the training"):
        split_source(open_source(pixels(2)), alpha=0.5, statistics=1, train=True)


def test_enough_images_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_source(open_source(pixels(100)), statistics=80, train=False)


def test_one_image_cannot_be_split():
    with pytest.raises(SourceError, match="cannot be split"):
        split_source(open_source(pixels(1)), statistics=1, train=False)


def test_unreadable_images_follow_the_policy(tmp_path):
    for i, array in enumerate(pixels(40)[:, 0].numpy()):
        Image.fromarray(array).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"^07\.png: .*policy skip"):
        split_source(open_source(tmp_path), statistics=10, train=False)
    for policy in ("skip", "nan"):
        source = open_source(tmp_path, policy=policy)
        result = split_source(source, statistics=10, train=False)
        assert set().union(*parts(result)) == set(range(40)) - {7}
        assert list(source.unreadable) == ["07.png"]


def test_a_variant_is_split_like_its_source(tmp_path):
    for i, array in enumerate(pixels(40)[:, 0].numpy()):
        Image.fromarray(array).save(tmp_path / f"{i:02}.png")
    plain = split_source(open_source(tmp_path), statistics=10, train=True)
    assert split_source(open_source(f"{tmp_path}/@vflip"), statistics=10, train=True) == plain


@pytest.mark.data
def test_real_set_splits_by_content():
    source = open_source("mnist:train", limit=2000)
    result = split_source(source, statistics=200, train=True)
    assert disjoint(result)
    assert len(result.calibration) >= 400
