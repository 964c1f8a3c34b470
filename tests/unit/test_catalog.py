"""The table of named sets: what may be tuned on, what is near and far, and what is on this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from farout.data import catalog

# fmt: off
ASKED = [
    "fashion_mnist", "mnist", "kmnist", "cifar10", "cifar100", "svhn", "celeba", "tiny_imagenet",
    "imagenet_1k", "imagenet_200", "imagenet_100", "imagenet_o", "imagenet_v2", "imagenet_c",
    "imagenet_r", "textures", "places365", "lsun_crop", "lsun_resize", "isun", "inaturalist", "sun",
    "ssb_hard", "ninco", "openimage_o", "species", "medmnist", "sample_fashion", "sample_digits",
]
# fmt: on


def test_listing_sets_does_not_import_torch():
    code = "import sys, farout.data.catalog as c; c.list_sets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ASKED)
def test_every_set_has_a_way_to_get_it_and_a_licence(name):
    row = catalog.find_entry(name)
    assert row is not None
    assert row.license
    assert row.splits
    assert row.built_in or row.hub or row.download_hint


def test_no_hub_id_is_said_to_be_tried():
    rows = catalog.list_sets()
    assert [row["name"] for row in rows if row["hub"]]
    assert all(row["hub_status"] == "untested" for row in rows if row["hub"])
    assert all(row["hub_status"] is None for row in rows if row["hub"] is None)


def test_names_are_unique():
    rows = [row["name"] for row in catalog.list_sets()]
    assert len(rows) == len(set(rows)) == len(catalog.set_names())
    assert catalog.find_entry("nonsense") is None


def test_groups_name_sets_of_the_table():
    for table in (catalog.NEAR, catalog.FAR):
        for inlier, outliers in table.items():
            assert {inlier, *outliers} <= catalog.set_names()


@pytest.mark.parametrize(
    ("inlier", "outlier", "expected"),
    [
        ("cifar10", "cifar100", "near"),
        ("cifar10:test", "tiny_imagenet:test", "near"),
        ("cifar100", "svhn:test", "far"),
        ("imagenet_1k", "ninco", "near"),
        ("imagenet_200", "openimage_o", "far"),
        ("cifar10", "celeba", ""),
        ("fashion_mnist", "mnist", ""),
        ("fashion_mnist:test@classes=0-7", "fashion_mnist:test@classes=8,9", "near"),
        ("fashion_mnist:test", "fashion_mnist:test@vflip", ""),
    ],
)
def test_near_and_far_are_the_fields_own_groups(inlier, outlier, expected):
    assert catalog.ood_group(inlier, outlier) == expected


@pytest.mark.parametrize(
    ("inlier", "outlier", "expected"),
    [
        ("fashion_mnist", "fashion_mnist:train@rot90", "dev"),
        ("fashion_mnist", "fashion_mnist@blur=2", "dev"),
        ("fashion_mnist", "fashion_mnist:train@contrast", "dev"),
        ("fashion_mnist", "fashion_mnist:train@noise", "dev"),
        ("fashion_mnist", "fashion_mnist:train@patch", "dev"),
        ("good/", "good/@rot180", "dev"),
        ("fashion_mnist", "fashion_mnist:test@rot90", "test"),
        ("fashion_mnist", "fashion_mnist:train@vflip", "test"),
        ("fashion_mnist", "fashion_mnist:train@hflip", "test"),
        ("fashion_mnist", "mnist:train@rot90", "test"),
        ("fashion_mnist", "mnist", "test"),
        ("fashion_mnist@classes=0-7", "fashion_mnist@classes=8,9", "test"),
        ("fashion_mnist@classes=0-7", "fashion_mnist:train@classes=8,9,rot90", "test"),
        ("fashion_mnist@classes=0-7", "fashion_mnist:train@classes=0-7,rot90", "dev"),
        ("good/", "bad/", "test"),
    ],
)
def test_role_keeps_test_sets_out_of_choices(inlier, outlier, expected):
    assert catalog.ood_role(inlier, outlier) == expected


def test_where_a_set_is_found(tmp_path, monkeypatch):
    data, sample = tmp_path / "data", tmp_path / "sample"
    for base, name, split in ((data, "mnist", "test"), (sample, "sample_digits", "test"), (sample, "svhn", "test")):
        (base / name).mkdir(parents=True)
        (base / name / f"{split}.parquet").touch()
    monkeypatch.setenv("FAROUT_DATA", str(data))
    monkeypatch.setattr(catalog, "SAMPLE", sample)
    rows = {row["name"]: row for row in catalog.list_sets()}
    assert rows["mnist"]["location"] == str(data / "mnist")
    assert rows["mnist"]["splits"] == "test"
    assert rows["sample_digits"]["location"] == "built in"
    assert rows["svhn"]["location"] is None  # only sets marked as built in are taken from the package
    assert catalog.find_local("mnist", "train") is None
    assert catalog.find_local("mnist", "test") == data / "mnist" / "test.parquet"
    monkeypatch.delenv("FAROUT_DATA")
    assert catalog.find_local("mnist", "test") is None


def test_a_given_folder_goes_before_the_built_in_sample(tmp_path, monkeypatch):
    for base in ("data", "sample"):
        (tmp_path / base / "sample_digits").mkdir(parents=True)
        (tmp_path / base / "sample_digits" / "test.parquet").touch()
    monkeypatch.setenv("FAROUT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(catalog, "SAMPLE", tmp_path / "sample")
    assert catalog.find_local("sample_digits", "test") == tmp_path / "data" / "sample_digits" / "test.parquet"
