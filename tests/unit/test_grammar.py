"""The grammar of source strings, with class filters, limits and variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from farout.core.errors import SourceError
from farout.data import catalog
from farout.data.image_source import ImageSource
from farout.data.source_spec import parse_spec
from farout.data.sources import open_source
from image_files import pixels, write_folder, write_parquet

SETS = frozenset({"fashion_mnist", "mnist", "cifar10"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fashion_mnist", ("named", "fashion_mnist", "train", None, None, ())),
        ("cifar10:test", ("named", "cifar10", "test", None, None, ())),
        ("mnist:test@vflip", ("named", "mnist", "test", "vflip", None, ())),
        ("mnist@blur", ("named", "mnist", "train", "blur", 1.0, ())),
        ("mnist@blur=2.5", ("named", "mnist", "train", "blur", 2.5, ())),
        ("mnist@classes=0-7", ("named", "mnist", "train", None, None, ("0-7",))),
        ("mnist@classes=0,3,5,rot90", ("named", "mnist", "train", "rot90", None, ("0", "3", "5"))),
        ("mnist@noise=0.2,classes=a b,c", ("named", "mnist", "train", "noise", 0.2, ("a b", "c"))),
        ("folder/@vflip", ("path", "folder/", "", "vflip", None, ())),
        ("./mnist", ("path", "./mnist", "", None, None, ())),
        ("C:\\images", ("path", "C:\\images", "", None, None, ())),
        ("C:images", ("path", "C:images", "", None, None, ())),
        ("a@b/c.png", ("path", "a@b/c.png", "", None, None, ())),
        ("a@b/*.png@hflip", ("path", "a@b/*.png", "", "hflip", None, ())),
        ("*.png", ("path", "*.png", "", None, None, ())),
        ("hf://me/set:valid@rot180", ("hub", "me/set", "valid", "rot180", None, ())),
        ("hf://me/set/config", ("hub", "me/set/config", "train", None, None, ())),
    ],
)
def test_a_source_string_has_one_meaning(text, expected):
    spec = parse_spec(text, SETS)
    assert (spec.kind, spec.location, spec.split, spec.variant, spec.strength, spec.classes) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("mnist@", "without a modifier"),
        ("mnist@sharpen", "unknown modifier 'sharpen'.*vflip"),
        ("mnist@vflip,rot90", "2 variants"),
        ("mnist@vflip=2", "has no strength"),
        ("mnist@blur=x", "expected a number"),
        ("mnist@patch=1.5", "at most 1"),
        ("mnist@classes=", "empty class"),
        ("x.npz@array=", "requires one name after array="),
        ("x.npz@array=a,array=b", "requires one name after array="),
        ("hf://justaname", "not a hub id"),
    ],
)
def test_wrong_specs_say_what_was_expected(text, message):
    with pytest.raises(SourceError, match=message):
        parse_spec(text, SETS)


def test_a_name_that_is_a_set_and_a_path_shows_both_spellings(house, monkeypatch):
    write_folder(house / "fashion_mnist", pixels(2), ["a.png", "b.png"])
    monkeypatch.chdir(house)
    with pytest.raises(SourceError, match=r"\./fashion_mnist for the path, fashion_mnist:train for the set"):
        open_source("fashion_mnist")
    assert len(open_source("./fashion_mnist")) == 2
    assert len(open_source(Path("fashion_mnist"))) == 2
    assert len(open_source("fashion_mnist:train")) == 20


def test_an_existing_path_with_an_at_sign_is_a_path(tmp_path):
    folder = write_folder(tmp_path / "shots@vflip", pixels(2), ["a.png", "b.png"])
    assert open_source(str(folder)).variant is None
    assert open_source(f"{folder}@hflip").variant == "hflip"


def test_unknown_sets_get_near_matches():
    with pytest.raises(
        SourceError, match=r"'fashion_mnits' is neither an existing path nor a named set .* did you mean fashion_mnist"
    ):
        open_source("fashion_mnits")


def test_a_set_that_must_be_got_by_hand_says_how(house):
    with pytest.raises(SourceError, match=r"OpenOOD.*\$FAROUT_DATA/places365/test\.parquet"):
        open_source("places365:test")


def test_an_unknown_split_lists_the_splits(house):
    with pytest.raises(SourceError, match="no split 'valid'; expected one of test, train"):
        open_source("fashion_mnist:valid")


def test_named_set_has_keys_labels_and_names(house):
    source = open_source("fashion_mnist")
    assert source.name == "fashion_mnist"
    assert source.keys == tuple(str(i) for i in range(20))
    assert source.labels == tuple(i % 4 for i in range(20))
    assert source.class_names == ("shirt", "bag", "boot", "hat")
    assert torch.equal(source[7], pixels(20)[7])


def test_a_folder_of_ones_own_in_the_data_folder_is_a_set(house):
    write_parquet(house / "data" / "mine" / "all.parquet", pixels(3))
    assert len(open_source("mine:all")) == 3
    with pytest.raises(SourceError, match="no split 'train' on this machine; expected one of all"):
        open_source("mine")


def test_built_in_sample_needs_no_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FAROUT_DATA", raising=False)
    monkeypatch.setattr(catalog, "SAMPLE", tmp_path)
    write_parquet(tmp_path / "sample_digits" / "test.parquet", pixels(3))
    assert len(open_source("sample_digits:test")) == 3


@pytest.mark.parametrize(
    ("classes", "kept"), [("0-1", {0, 1}), ("0,3", {0, 3}), ("boot,bag", {1, 2}), ("1-2,hat", {1, 2, 3})]
)
def test_class_filter_keeps_keys_and_label_numbers(house, classes, kept):
    source = open_source(f"fashion_mnist@classes={classes}")
    assert set(source.labels) == kept
    assert len(source) == 5 * len(kept)
    assert source.keys == tuple(str(i) for i in range(20) if i % 4 in kept)
    assert all(torch.equal(source[i], pixels(20)[int(key)]) for i, key in enumerate(source.keys))


def test_class_filter_mistakes_are_named(house):
    with pytest.raises(SourceError, match=r"unknown class 'boots'.*did you mean boot"):
        open_source("fashion_mnist@classes=boots")
    with pytest.raises(SourceError, match=r"unknown class '4'.*0\.\.3"):
        open_source("fashion_mnist@classes=2-4")
    write_folder(house / "plain", pixels(2), ["a.png", "b.png"])
    with pytest.raises(SourceError, match="no labels"):
        open_source(f"{house}/plain@classes=0")


def test_numbered_class_folders_are_filtered_by_their_names(tmp_path):
    write_folder(tmp_path, pixels(3), ["2/a.png", "10/b.png", "30/c.png"])  # sorted as text: 10, 2, 30
    assert open_source(f"{tmp_path}/@classes=2").keys == ("2/a.png",)


def test_texts_that_look_like_numbers_are_classes_by_their_text(tmp_path):
    write_folder(tmp_path, pixels(3), ["a.png", "b.png", "c.png"])
    (tmp_path / "list.csv").write_text("path,label\na.png,01\nb.png,1\nc.png,001\n")
    for label, key in [("01", "a.png"), ("1", "b.png"), ("001", "c.png")]:
        assert open_source(f"{tmp_path}/list.csv@classes={label}").keys == (key,)
    with pytest.raises(SourceError, match=r"unknown class '0' .*(did you mean|classes are 001, 01, 1)"):
        open_source(f"{tmp_path}/list.csv@classes=0")  # no index of the names


def test_negative_labels_are_filtered(tmp_path):
    write_folder(tmp_path, pixels(3), ["a.png", "b.png", "c.png"])
    (tmp_path / "list.csv").write_text("path,label\na.png,-1\nb.png,1\nc.png,-1\n")
    assert open_source(f"{tmp_path}/list.csv@classes=-1").keys == ("a.png", "c.png")


def test_names_of_arrays_columns_and_classes_may_contain_separators(tmp_path):
    spec = parse_spec("x.parquet@column=image/encoded,label=a@b,vflip", SETS)
    assert (spec.location, spec.column, spec.label, spec.variant) == ("x.parquet", "image/encoded", "a@b", "vflip")
    assert parse_spec("mnist@classes=T-shirt/top,bag", SETS).classes == ("T-shirt/top", "bag")
    folder = write_folder(tmp_path / "a@label=1", pixels(1), ["a.png"])
    assert open_source(f"{folder}/*.png").keys == ("a.png",)


def test_an_existing_file_or_folder_may_have_a_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").touch()
    (tmp_path / "data").mkdir()
    for text, location in [("x.npz:test", "x.npz"), ("./data:test", "./data"), (f"{tmp_path}/x.npz:test@vflip", None)]:
        spec = parse_spec(text, SETS)
        assert (spec.kind, spec.location, spec.split) == ("path", location or f"{tmp_path}/x.npz", "test")
    assert parse_spec("data:test", SETS).kind == "named"
    assert parse_spec("./nowhere:test", SETS).location == "./nowhere:test"


def test_limit_is_a_seeded_sample_in_source_order(house):
    source = open_source("fashion_mnist", limit=8, seed=3)
    places = [int(key) for key in source.keys]
    assert len(set(places)) == 8
    assert places == sorted(places)
    assert places != list(range(8))
    assert open_source("fashion_mnist", limit=8, seed=3).keys == source.keys
    assert open_source("fashion_mnist", limit=8, seed=4).keys != source.keys
    assert len(open_source("fashion_mnist", limit=100)) == 20
    with pytest.raises(SourceError, match="limit is 0"):
        open_source("fashion_mnist", limit=0)


def test_flips_and_rotations_are_exact_and_keep_keys_and_hashes(house):
    plain = open_source("fashion_mnist")
    expected = {
        "vflip": lambda x: x.flip(1),
        "hflip": lambda x: x.flip(2),
        "rot90": lambda x: x.rot90(1, (1, 2)),
        "rot180": lambda x: x.flip(1).flip(2),
        "rot270": lambda x: x.rot90(-1, (1, 2)),
    }
    for name, change in expected.items():
        source = open_source(f"fashion_mnist@{name}")
        assert torch.equal(source[3], change(plain[3]))
        assert source.keys == plain.keys
        assert source.content_hash(3) == plain.content_hash(3)
        assert source.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("name", ["blur=1.5", "contrast=0.3", "noise=0.2", "patch=0.5"])
def test_corruptions_change_images_the_same_way_in_every_order_and_subset(house, name):
    plain, source = open_source("fashion_mnist"), open_source(f"fashion_mnist@{name}")
    few = open_source(f"fashion_mnist@{name}", limit=6)
    for i in reversed(range(len(few))):
        place = int(few.keys[i])
        assert torch.equal(few[i], source[place])
        assert few[i].shape == plain[place].shape
        assert not torch.equal(few[i], plain[place])


def test_corruptions_do_what_they_say(house):
    plain = open_source("fashion_mnist")[2].float()
    contrast = open_source("fashion_mnist@contrast=0.5")[2].float()
    assert contrast.std() == pytest.approx(0.5 * float(plain.std()), rel=0.02)
    assert contrast.mean() == pytest.approx(float(plain.mean()), abs=0.5)
    blur = open_source("fashion_mnist@blur=2")[2].float()
    assert blur.diff(dim=-1).abs().mean() < 0.4 * plain.diff(dim=-1).abs().mean()
    gray = open_source(torch.full((2, 1, 64, 64), 128, dtype=torch.uint8))
    noisy = ImageSource("x", gray._store.listing, variant="noise", strength=0.1)[0].float()
    assert noisy.std() == pytest.approx(25.5, rel=0.1)
    assert noisy.mean() == pytest.approx(128, abs=2)


def test_every_image_gets_its_own_noise():
    gray = open_source(torch.stack([torch.full((1, 8, 8), value, dtype=torch.uint8) for value in (100, 101)]))
    first, second = ImageSource("x", gray._store.listing, variant="noise", strength=0.1)
    assert not torch.equal(first + 1, second)


def test_patch_comes_from_another_image_of_the_set():
    for value in range(100, 110):  # with two images, a draw that may hit the image itself would do so half of the time
        flat = torch.stack([torch.full((1, 8, 8), gray, dtype=torch.uint8) for gray in (10, value)])
        for image in ImageSource("x", open_source(flat)._store.listing, variant="patch", strength=0.5):
            assert image.unique().tolist() == [10, value]
            assert (image == value).sum() in (16, 64 - 16)


def test_a_missing_folder_and_an_unknown_name_are_described_alike(tmp_path):
    for text in ("nowhere", f"{tmp_path}/nowhere/"):
        with pytest.raises(SourceError, match="neither an existing path nor a named set"):
            open_source(text)
