"""What can be opened as a source, its keys and labels, and its identity: they join every score to its image."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from farout.core.errors import FaroutError, MissingExtraError, SourceError
from farout.data import tables
from farout.data.batching import iterate_batches
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from image_files import encode, picture, pixels, write_folder, write_parquet


def test_classes_whose_names_no_folder_can_have(tmp_path):
    write_folder(tmp_path, pixels(3), ["T-shirt_top/x.png", "bag/x.png", "bag/y.png"])
    told = tmp_path / "farout-classes.json"
    told.write_text('{"T-shirt_top": "T-shirt/top", "gone": "Größe"}', encoding="utf-8")
    assert open_source(tmp_path).class_names == ("T-shirt/top", "bag")
    assert open_source(f"{tmp_path}@classes=bag").keys == ("bag/x.png", "bag/y.png")
    for content, message in (('{"bag": 3}', "must contain a class name"), ("{", "not valid JSON")):
        told.write_text(content)
        with pytest.raises(FaroutError, match=message):
            open_source(tmp_path)


def test_folder_is_sorted_recursive_and_keyed_by_relative_path(tmp_path):
    names = ["b/x.png", "a/x.png", "a/x.jpg", "a/deep/x.PNG", "top.png"]
    write_folder(tmp_path, pixels(5), names)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_text("no image")
    source = open_source(tmp_path)
    assert source.keys == ("a/deep/x.PNG", "a/x.jpg", "a/x.png", "b/x.png", "top.png")
    assert source.groups == ("a/deep", "a", "a", "b", ".")
    assert source.labels is None
    assert torch.equal(source[3], pixels(5)[0])


def test_class_per_folder_tree_gives_labels(tmp_path):
    write_folder(tmp_path, pixels(3), ["dog/1.png", "cat/1.png", "cat/2.png"])
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.labels == (0, 0, 1)
    assert source.label(2) == 1
    with pytest.raises(SourceError, match="no labels"):
        open_source(pixels(1)).label(0)


def test_empty_and_missing_places_are_errors(tmp_path):
    with pytest.raises(SourceError, match="contains no images"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="neither an existing path"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="matches nothing"):
        open_source(f"{tmp_path}/*.png")
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(SourceError, match=r"expected a folder, \.parquet"):
        open_source(tmp_path / "a.doc")


def test_glob_and_single_file(tmp_path):
    write_folder(tmp_path, pixels(3), ["a/1.png", "b/2.png", "b/deep/3.png"])
    assert open_source(f"{tmp_path}/*/*.png").keys == ("a/1.png", "b/2.png")
    assert open_source(f"{tmp_path}/**/*.png@vflip").keys == ("a/1.png", "b/2.png", "b/deep/3.png")
    assert open_source(f"{tmp_path}/**/**/*.png").keys == ("a/1.png", "b/2.png", "b/deep/3.png")
    assert open_source(tmp_path / "b" / "2.png").keys == ("2.png",)


def test_csv_is_relative_to_its_own_folder(tmp_path):
    write_folder(tmp_path / "set", pixels(3), ["i/1.png", "i/2.png", "i/3.png"])
    (tmp_path / "set" / "list.csv").write_text("path,label,group\ni/3.png,dog,g1\ni/1.png,cat,g2\ni/2.png,dog,g1\n")
    source = open_source(tmp_path / "set" / "list.csv")
    assert source.keys == ("i/3.png", "i/1.png", "i/2.png")
    assert source.class_names == ("cat", "dog")
    assert source.labels == (1, 0, 1)
    assert source.groups == ("g1", "g2", "g1")
    assert torch.equal(source[1], pixels(3)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,1\na.png,2\n", "more than once"),
        ("path,label\na.png,1\nb.png,\n", "1 of 2 labels"),
        ("name\na.png\n", "expected one named path"),
        ("path\n", "lists no images"),
        ("path,x\n,1\n", "empty in row 0"),
        ("path,group\na.png,g\nb.png,\n", "1 of 2 groups"),
    ],
)
def test_csv_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC", "float"])
def test_arrays_of_every_layout_give_the_same_images(tmp_path, layout):
    images = pixels(4, 3 if layout in ("NCHW", "NHWC") else 1)
    stored = {
        "NHW": images[:, 0],
        "NCHW": images,
        "NHWC": images.permute(0, 2, 3, 1),
        "float": images.float() / 255,
    }[layout]
    np.savez(tmp_path / "x.npz", images=stored.numpy(), labels=np.array([3, 1, 1, 0]))
    source = open_source(tmp_path / "x.npz")
    assert source.labels == (3, 1, 1, 0)
    assert all(torch.equal(source[i], images[i]) for i in range(4))


def test_npz_never_unpickles_and_names_its_shape(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SourceError, match="without pickle"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=np.zeros((2, 8, 8, 5), dtype=np.uint8))
    with pytest.raises(SourceError, match=r"\(2, 8, 8, 5\)"):
        open_source(tmp_path / "y.npz")


def test_npz_of_medmnist_takes_the_labels_beside_the_images(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=pixels(3)[:, 0].numpy(), train_labels=np.array([[2], [0], [1]]))
    assert open_source(tmp_path / "x.npz").labels == (2, 0, 1)


def test_parquet_of_plain_bytes_text_labels_and_groups(tmp_path):
    images = pixels(3)
    cells = pa.array([encode(picture(image), "PNG") for image in images], pa.binary())
    table = pa.table({"photo": cells, "label": ["b", "a", "b"], "group": ["g", "g", "h"]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.class_names == ("a", "b")
    assert source.labels == (1, 0, 1)
    assert source.groups == ("g", "g", "h")
    assert torch.equal(source[2], images[2])


def test_parquet_without_images_or_rows_is_an_error(tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="x: int64; expected encoded images"):
        open_source(tmp_path / "x.parquet")
    write_parquet(tmp_path / "y.parquet", pixels(0))
    with pytest.raises(SourceError, match="0 rows"):
        open_source(tmp_path / "y.parquet")
    (tmp_path / "z.parquet").write_text("no table")
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        open_source(tmp_path / "z.parquet")


def test_withheld_labels_of_the_hub_are_no_labels(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pixels(2), [-1, -1], ["a", "b"])
    assert open_source(path).labels is None


def test_tensors_and_arrays():
    images = pixels(3, 3)
    for given in (images, images.numpy(), images.float() / 255, (images.float() / 255).numpy()):
        source = open_source(given)
        assert source.keys == ("0", "1", "2")
        assert torch.equal(source[1], images[1])
    with pytest.raises(SourceError, match="0 to 255"):
        open_source(torch.tensor([0.0, 255.0]).reshape(1, 1, 1, 2))
    with pytest.raises(SourceError, match="empty"):
        open_source(torch.zeros(0, 1, 8, 8))
    with pytest.raises(SourceError, match="cannot read images from a int"):
        open_source(3)


def test_lists_of_pictures_are_sources():
    images = pixels(2, 3)
    source = open_source([picture(image) for image in images])
    assert torch.equal(source[1], images[1])
    with pytest.raises(SourceError, match="empty"):
        open_source([])


def test_a_broken_picture_is_one_unreadable_image():
    """Pillow opens files lazily; its decoders raise more than OSError for what is broken."""

    def load() -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    given = [picture(image) for image in pixels(3)]
    given[1].load = load
    source = open_source(given, policy="skip")
    assert [batch.keys for batch in iterate_batches(source, Preprocessing((8, 8), 1, (8, 8)), 3)] == [("0", "2")]
    assert "buffer of 4 bytes" in source.unreadable["1"]


class Labelled(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def test_datasets_with_and_without_labels():
    images = pixels(3)
    labelled = open_source(Labelled([picture(image) for image in images], torch.tensor([1, 0, 1])))
    assert labelled.labels == (1, 0, 1)
    assert labelled.class_names == ("cat", "dog")
    assert torch.equal(labelled[2], images[2])
    called = open_source(Labelled(images, ["dog", "bird", "dog"]))
    assert (called.labels, called.class_names) == ((1, 0, 1), ("bird", "dog"))
    plain = open_source(torch.utils.data.Subset(images.float() / 255, [2, 0]))
    assert plain.labels is None
    assert torch.equal(plain[0], images[2])
    with pytest.raises(SourceError, match=r"item 0.*-3"):
        open_source(torch.utils.data.Subset(torch.full((1, 1, 2, 2), -3.0), [0]))


def test_a_source_is_returned_as_it_is_or_narrowed(house):
    source = open_source("fashion_mnist", policy="nan")
    assert open_source(source) is source
    few = open_source(source, limit=5)
    assert len(few) == 5
    assert few.policy == "nan"


def test_hub_set_through_datasets(house, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name=None, split=None, **options):
        asked.append((path, name, split, options))
        return datasets.Dataset.from_parquet(
            str(house / "data" / "fashion_mnist" / "train.parquet"), cache_dir=str(house / "cache")
        ).cast(
            datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["shirt", "bag", "boot", "hat"])}
            )
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("hf://me/set/config:valid@vflip,classes=bag")
    assert asked == [("me/set", "config", "valid", {})]  # in particular no trust_remote_code
    assert source.class_names == ("shirt", "bag", "boot", "hat")
    assert source.keys == ("1", "5", "9", "13", "17")
    assert torch.equal(source[1], pixels(20)[5].flip(1))
    assert len(open_source("cifar10:test")) == 20
    assert asked[-1] == ("uoft-cs/cifar10", None, "test", {})


def test_columns_of_a_hub_set_are_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {
        "photo": [picture(image) for image in pixels(3)],
        "mask": [picture(image) for image in pixels(3, seed=1)],
    }
    table = datasets.Dataset.from_dict(
        {**columns, "label": ["x", "y", "x"], "breed": ["01", "1", "001"]},
        features=datasets.Features(
            {name: datasets.Image() for name in columns}
            | {name: datasets.Value("string") for name in ("label", "breed")}
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    with pytest.raises(SourceError, match=r"several columns of images: photo, mask; name one: @column=photo"):
        open_source("hf://me/set")
    source = open_source("hf://me/set@column=mask,label=breed")
    assert torch.equal(source[2], pixels(3, seed=1)[2])
    assert source.class_names == ("001", "01", "1")
    with pytest.raises(SourceError, match="column label contains no images; those that do are photo, mask"):
        open_source("hf://me/set@column=label")


def test_hub_failures_say_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SourceError, match=r"Couldn't reach the Hub\); check the connection.*\$FAROUT_DATA"):
        open_source("hf://me/set:test")


def test_hub_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "farout\[hub\]"'):
        tables.list_hub("me/set", "test")


def test_subset_keeps_keys_labels_and_groups(tmp_path):
    source = open_source(write_folder(tmp_path, pixels(4), ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]))
    part = source.subset([3, 0]).subset([0])
    assert (part.keys, part.labels, part.groups) == (("b/4.png",), (1,), ("b",))
    assert part.content_hash(0) == source.content_hash(3)


def test_with_policy_shares_pixels_and_leaves_the_original(house):
    source = open_source("fashion_mnist")
    assert source.with_policy("nan").policy == "nan"
    assert source.policy == "raise"
    with pytest.raises(SourceError, match="unknown policy"):
        source.with_policy("other")


def test_fingerprint_is_of_content_and_keys(tmp_path):
    images = pixels(3)
    png = open_source(write_folder(tmp_path / "a", images, ["1.png", "2.png", "3.png"])).fingerprint()
    again = open_source(write_folder(tmp_path / "b", images, ["1.png", "2.png", "3.png"])).fingerprint()
    assert png == again
    write_folder(tmp_path / "c", images, ["1.png", "2.png", "4.png"])
    write_folder(tmp_path / "d", images ^ 1, ["1.png", "2.png", "3.png"])
    others = {open_source(tmp_path / name).fingerprint() for name in "cd"}
    assert len(others | {png}) == 3


def test_content_hash_is_of_pixels_not_of_the_file(tmp_path):
    image = pixels(1)[0]
    for suffix in ("png", "bmp", "tiff"):
        picture(image).save(tmp_path / f"x.{suffix}")
    assert len(set(open_source(tmp_path).content_hashes())) == 1


def test_native_sizes_before_the_variant():
    wide = [Image.new("L", (12, 6))] * 3 + [Image.new("RGB", (4, 4))]
    source = open_source(wide)
    assert source.native_sizes() == {(6, 12): 3, (4, 4): 1}
    assert source.native_sizes(sample=2).total() == 2
    assert source.shapes()[(3, 4, 4)] == 1


@pytest.mark.data
def test_real_sets(data):
    source = open_source("fashion_mnist:test@classes=sandal,bag,vflip", limit=50)
    assert {source.class_names[label] for label in source.labels} == {"sandal", "bag"}
    assert source[0].shape == (1, 28, 28)
    color = open_source("cifar10:test", limit=64)
    prepared = Preprocessing.for_source(color)
    assert prepared.native == (32, 32)
    (batch,) = iterate_batches(color, prepared, 64)
    assert batch.images.shape == (64, 3, 32, 32)
    assert 0.2 < batch.images.mean() < 0.8
    assert len(open_source("textures:test")) == 480


@pytest.mark.data
def test_real_file_and_named_set_agree(data):
    named = open_source("mnist:test", limit=20)
    direct = open_source(data / "mnist" / "test.parquet", limit=20)
    assert named.fingerprint() == direct.fingerprint()
