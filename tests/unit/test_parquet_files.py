"""Parquet files: the column that is named is read, in all types that arrow has, over one or several shards."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from farout.core.errors import LeftOutWarning, SourceError, SourceWarning, UnreadableImageError
from farout.data.parquet_files import list_parquet
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from image_files import encode, picture, pixels, write_folder, write_parquet


def encoded(images):
    return [encode(picture(image), "PNG") for image in images]


def write(path, metadata=None, **columns):
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_one_of_several_binary_columns_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", mask=encoded(pixels(3)), photo=encoded(pixels(3, seed=1)), label=[1, 0, 1])
    with pytest.raises(
        SourceError, match=r"x\.parquet has several columns that can be images: mask, photo; .*@column=mask"
    ):
        open_source(path)
    for suffix, seed in [("@column=mask", 0), ("@column=photo", 1), ("@column=Photo,vflip", 1)]:
        source = open_source(f"{path}{suffix}")
        expected = pixels(3, seed=seed)[2]
        assert torch.equal(source[2], expected.flip(1) if "vflip" in suffix else expected)
        assert source.labels == (1, 0, 1)
    with pytest.raises(SourceError, match=r"no column 'depth' \(@column=depth\); its columns are mask, photo"):
        open_source(f"{path}@column=depth")
    with pytest.raises(SourceError, match=r"column label has type int64; expected encoded images or paths"):
        open_source(f"{path}@column=label")
    with pytest.raises(SourceError, match="for which @array=photo has no meaning"):
        open_source(f"{path}@array=photo")


def test_a_column_called_image_is_read_with_a_warning(tmp_path):
    path = write(tmp_path / "x.parquet", mask=encoded(pixels(3)), image=encoded(pixels(3, seed=1)))
    with pytest.warns(SourceWarning, match="image is read, not mask"):
        source = open_source(path)
    assert torch.equal(source[0], pixels(3, seed=1)[0])


KINDS = {
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_every_type_of_bytes_is_read(tmp_path, kind, nested):
    cells = pa.array(encoded(pixels(3)), pa.binary())
    try:
        cells = cells.dictionary_encode() if kind == "dictionary" else cells.cast(KINDS[kind])
        column = pa.StructArray.from_arrays([cells], ["bytes"]) if nested else cells
        path = write(tmp_path / "x.parquet", photo=column)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        pytest.skip("this version of arrow does not write it")
    source = open_source(path)
    assert all(torch.equal(source[i], pixels(3)[i]) for i in range(3))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_type_of_text_is_a_label(tmp_path, kind):
    types = {"string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view()}
    labels = pa.array(["01", "1", "001"])
    try:
        labels = labels.dictionary_encode() if kind == "dictionary" else labels.cast(types[kind])
        path = write(tmp_path / "x.parquet", image=encoded(pixels(3)), label=labels)
    except pa.ArrowNotImplementedError:
        pytest.skip("this version of arrow does not write it")
    assert open_source(path).class_names == ("001", "01", "1")
    assert open_source(path).labels == (1, 2, 0)


def test_nested_fields_are_named_with_dots(tmp_path):
    cells = [{"photo": {"bytes": data, "path": None}, "size": 8} for data in encoded(pixels(3))]
    path = write(tmp_path / "x.parquet", sample=pa.array(cells))
    assert torch.equal(open_source(path)[2], pixels(3)[2])
    assert torch.equal(open_source(f"{path}@column=sample.photo")[1], pixels(3)[1])
    path = write(
        tmp_path / "y.parquet", image=encoded(pixels(3)), info=[{"breed": "01"}, {"breed": "1"}, {"breed": "1"}]
    )
    assert open_source(f"{path}@label=info.breed").labels == (0, 1, 1)


def test_columns_of_equal_names_are_refused(tmp_path):
    data = pa.array(encoded(pixels(2)))
    pq.write_table(pa.Table.from_arrays([data, data], names=["image", "image"]), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet has several columns called image"):
        open_source(tmp_path / "x.parquet")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_path_that_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_parquet(tmp_path / "x.parquet", pixels(3), ["a", "b", "a"])
    shutil.move(tmp_path / "x.parquet", folder / "x.parquet")
    source = open_source(folder / "x.parquet")
    assert source.labels == (0, 1, 0)
    assert torch.equal(pickle.loads(pickle.dumps(source))[2], pixels(3)[2])  # noqa: S301 - our own bytes


def test_lists_of_one_image_and_arrays_of_pixels(tmp_path):
    cells = [[data] for data in encoded(pixels(2))] + [encoded(pixels(2)), [], None]
    source = open_source(write(tmp_path / "x.parquet", images=pa.array(cells, pa.list_(pa.binary()))))
    assert torch.equal(source[1], pixels(2)[1])
    for index, reason in [
        (2, "2: the row contains 2 images"),
        (3, "3: the row contains 0 images"),
        (4, "4: the row con"),
    ]:
        with pytest.raises(UnreadableImageError, match=f"^{reason}"):
            source[index]
    values = pixels(3, 3).permute(0, 2, 3, 1).numpy()
    source = open_source(
        write(tmp_path / "y.parquet", pixels=pa.array(values.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))))
    )
    assert torch.equal(source[2], pixels(3, 3)[2])
    gray = write(
        tmp_path / "z.parquet", pixels=pa.array([[[1, 2], [3, 4]], [[1, 2], [3]]], pa.list_(pa.list_(pa.uint8())))
    )
    assert open_source(gray)[0].tolist() == [[[1, 2], [3, 4]]]
    with pytest.raises(UnreadableImageError, match=r"^1: "):
        open_source(gray)[1]


def test_null_cells_are_unreadable_images(tmp_path):
    cells = encoded(pixels(3))
    cells[1] = None
    source = open_source(write(tmp_path / "x.parquet", image=cells, key=["a", "b", "c"]))
    with pytest.raises(UnreadableImageError, match=r"^b: the row contains no encoded image"):
        source[1]
    assert torch.equal(source[2], pixels(3)[2])
    structs = [{"bytes": None, "path": None}, None, {"bytes": encoded(pixels(1))[0], "path": None}]
    source = open_source(
        write(
            tmp_path / "y.parquet", image=pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        )
    )
    assert torch.equal(source[2], pixels(1)[0])
    for index in (0, 1):
        with pytest.raises(UnreadableImageError, match="no encoded image"):
            source[index]


def test_paths_are_relative_to_the_file(tmp_path):
    write_folder(tmp_path / "set", pixels(3), ["i/1.png", "i/2.png", "3.png"])
    path = write(
        tmp_path / "set" / "x.parquet", file_name=["i/1.png", "i/2.png", None, "4.png"], label=["a", "b", "b", "a"]
    )
    source = open_source(path)
    assert source.keys == ("i/1.png", "i/2.png", "row 2", "4.png")
    assert torch.equal(source[1], pixels(3)[1])
    for index, reason in [(2, "row 2: the column file_name is empty"), (3, "4.png: No such file")]:
        with pytest.raises(UnreadableImageError, match=f"^{reason}"):
            source[index]
    named = write(tmp_path / "set" / "y.parquet", left=["i/1.png"], right=["3.png"], key=["k"])
    assert torch.equal(open_source(f"{named}@column=right")[0], pixels(3)[2])
    assert open_source(f"{named}@column=right").keys == ("k",)
    structs = pa.array([{"bytes": None, "path": "3.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert torch.equal(open_source(write(tmp_path / "set" / "z.parquet", image=structs))[0], pixels(3)[2])


def test_a_key_column_gives_the_keys(tmp_path):
    assert open_source(write(tmp_path / "x.parquet", image=encoded(pixels(2)), key=["b", "a"])).keys == ("b", "a")
    assert open_source(write(tmp_path / "y.parquet", image=encoded(pixels(2)), Key=[7, 5])).keys == ("7", "5")
    with pytest.raises(SourceError, match=r"z\.parquet, column key has 1 keys more than once"):
        open_source(write(tmp_path / "z.parquet", image=encoded(pixels(2)), key=["a", "a"]))


def test_labels_of_minus_one_are_kept_unless_all_are(tmp_path):
    source = open_source(write_parquet(tmp_path / "x.parquet", pixels(3), [1, -1, 0]))
    assert source.labels == (1, -1, 0)
    path = write_parquet(tmp_path / "y.parquet", pixels(3), [1, -1, 0], ["a", "b"])
    with pytest.warns(SourceWarning, match=r"column label: 1 of 3 labels are -1 .*@classes=0-1 leaves them out"):
        named = open_source(path)
    assert open_source(f"{path}@classes=0-1").keys == ("0", "2")
    assert (named.labels, named.class_names) == ((1, -1, 0), ("a", "b"))
    with pytest.warns(SourceWarning, match=r"z\.parquet, column label: all labels are -1"):
        assert open_source(write_parquet(tmp_path / "z.parquet", pixels(3), [-1, -1, -1])).labels is None
    with pytest.raises(SourceError, match=r"w\.parquet, column label has the label 2 in row 1, but 2 class names"):
        open_source(write_parquet(tmp_path / "w.parquet", pixels(2), [0, 2], ["a", "b"]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.5, 1.0]), r"labels such as 0\.5"),
        (pa.array([1, None]), "1 of 2 labels"),
        (pa.array([float("nan"), 1.0]), "1 of 2 labels"),
        (pa.array([[1, 1], [0, 1]]), "one-hot"),
        (pa.array([["a"], ["b", "c"]]), "texts and lists|lists and texts"),
        (pa.array([{"a": 1}, {"a": 2}]), "tables"),
        (pa.array([1, 2], pa.timestamp("s")), "datetime"),
    ],
)
def test_other_labels_are_errors_that_name_the_column(tmp_path, labels, message):
    path = write(tmp_path / "x.parquet", image=encoded(pixels(2)), label=labels)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path)
    assert "x.parquet, column label" in str(caught.value)


def test_columns_of_labels_have_usual_names(tmp_path):
    for name in ("Label", "target", "class", "y", "category"):
        path = write(tmp_path / f"{name}.parquet", image=encoded(pixels(2)), **{name: ["a", "b"]})
        assert open_source(path).class_names == ("a", "b")
    path = write(tmp_path / "x.parquet", image=encoded(pixels(2)), kind=["a", "b"], size=[1, 2])
    with pytest.warns(SourceWarning, match="none of the columns kind, size is called label"):
        assert open_source(path).labels is None
    assert open_source(f"{path}@label=kind,classes=b").keys == ("1",)


@pytest.mark.parametrize(
    "metadata",
    [
        "null",
        "[1, 2]",
        '{"info": ',
        "3",
        '"text"',
        '{"info": null}',
        '{"info": {"features": []}}',
        '{"info": {"features": {"label": {"names": 3}}}}',
        '{"info": {"features": {"label": {"names": [1, 2]}}}}',
        '{"info": {"features": {"label": {"names": {"a": 1}}}}}',
        "[" * 100_000,
        b"\xff\xfe",
        "",
    ],
)
def test_damaged_metadata_is_ignored_with_a_warning(tmp_path, metadata):
    path = write(tmp_path / "x.parquet", metadata, image=encoded(pixels(2)), label=[1, 0])
    with pytest.warns(SourceWarning, match="metadata 'huggingface' is damaged"):
        source = open_source(path)
    assert (source.labels, source.class_names) == ((1, 0), None)


@pytest.mark.parametrize(
    "metadata",
    [
        '{"info": {"features": {}}}',
        '{"info": {"features": {"label": null}}}',
        '{"info": {"features": {"label": {"dtype": "int64"}}}}',
    ],
)
def test_metadata_without_class_names_is_no_damage(tmp_path, metadata):
    path = write(tmp_path / "x.parquet", metadata, image=encoded(pixels(2)), label=[1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(path).labels == (1, 0)


@pytest.fixture
def hub_folder(tmp_path):
    """A clone of a set on the hub: three shards of train, one of test."""
    names = ["cat", "dog"]
    for number in range(3):
        part = slice(4 * number, 4 * number + 4)
        write_parquet(tmp_path / f"data/train-{number:05}-of-00003.parquet", pixels(12)[part], [0, 1, 1, 0], names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", pixels(2, seed=1), [1, 0], names)
    (tmp_path / "README.md").write_text("a card")
    return tmp_path


@pytest.mark.parametrize("location", ["{}:train", "{}/data:train", "{}/data/train-*.parquet"])
def test_shards_are_one_set(hub_folder, location):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        source = open_source(location.format(hub_folder))
    assert source.keys == tuple(map(str, range(12)))
    assert source.labels == (0, 1, 1, 0) * 3
    assert source.class_names == ("cat", "dog")
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    for index in (11, 0, 5, 4, 8):
        assert torch.equal(copy[index], pixels(12)[index])


def test_what_is_next_to_shards_is_counted(hub_folder):
    with pytest.warns(LeftOutWarning, match=r"1 \.md"):
        assert len(open_source(f"{hub_folder}:test")) == 2


def test_several_splits_are_refused_with_their_names(hub_folder):
    with pytest.raises(SourceError, match=r"several splits: test \(1\), train \(3\); give one, as in .*:test"):
        open_source(hub_folder)
    with pytest.raises(SourceError, match=r"no parquet files of the split 'dev'; it contains test \(1\), train \(3\)"):
        open_source(f"{hub_folder}:dev")


def test_missing_shards_are_an_error(hub_folder):
    (hub_folder / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(SourceError, match=r"2 of 3 shards \(the first missing one is number 1\)"):
        open_source(f"{hub_folder}:train")
    assert len(open_source(f"{hub_folder}/data/train-*.parquet")) == 8


def test_folders_of_splits_and_plain_numbers(tmp_path):
    write_parquet(tmp_path / "a/train/0000.parquet", pixels(2))
    write_parquet(tmp_path / "a/train/0001.parquet", pixels(3))
    write_parquet(tmp_path / "a/validation/0000.parquet", pixels(1))
    assert len(open_source(f"{tmp_path}/a:train")) == 5
    assert len(open_source(f"{tmp_path}/a/train")) == 5
    write_parquet(tmp_path / "b/part-00000.snappy.parquet", pixels(2))
    write_parquet(tmp_path / "b/part-00001.snappy.parquet", pixels(3))
    assert len(open_source(tmp_path / "b")) == 5
    write_folder(tmp_path / "c", pixels(2), ["1.png", "2.png"])
    write_parquet(tmp_path / "c/x.parquet", pixels(3))
    with pytest.warns(LeftOutWarning, match=r"1 \.parquet"):
        assert len(open_source(tmp_path / "c")) == 2
    with pytest.raises(SourceError, match=r"a folder of image files, for which :train has no meaning"):
        open_source(f"{tmp_path}/c:train")


def test_shards_of_different_columns_are_refused(tmp_path):
    write(tmp_path / "1.parquet", image=encoded(pixels(2)), label=[0, 1])
    write(tmp_path / "2.parquet", image=encoded(pixels(2)), label=["a", "b"])
    with pytest.raises(
        SourceError, match=r"1\.parquet and .*2\.parquet have different columns: label is int64 in the first and string"
    ):
        open_source(tmp_path)
    write(tmp_path / "2.parquet", image=encoded(pixels(2)))
    with pytest.raises(SourceError, match="label is int64 in the first and absent in the second"):
        open_source(f"{tmp_path}/*.parquet")
    write_parquet(tmp_path / "1.parquet", pixels(2), [0, 1], ["a", "b"])
    write_parquet(tmp_path / "2.parquet", pixels(2), [0, 1], ["b", "a"])
    with pytest.raises(SourceError, match="different class names in the column label"):
        open_source(tmp_path)


def test_a_split_of_one_file_has_no_meaning(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pixels(2))
    with pytest.raises(SourceError, match="one parquet file, for which :train has no meaning"):
        open_source(f"{path}:train")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_named_pipe_among_shards_does_not_wait(tmp_path):
    write_parquet(tmp_path / "1.parquet", pixels(2))
    os.mkfifo(tmp_path / "2.parquet")
    with pytest.warns(LeftOutWarning, match=r"1 \.parquet"):
        assert len(open_source(f"{tmp_path}/*.parquet")) == 2
    with pytest.raises(SourceError, match=r"2\.parquet .*regular file"):
        list_parquet([tmp_path / "1.parquet", tmp_path / "2.parquet"])


def test_repeated_images_need_little_memory(tmp_path):
    """A file of 1 MiB that repeats one cell a thousand times is not inflated to 1 GiB."""
    cell = np.random.default_rng(0).bytes(2**20)
    path = write(tmp_path / "x.parquet", image=pa.array([cell] * 1000))
    source = open_source(path, reading=ReadSettings(max_bytes=2**31))
    with pytest.raises(UnreadableImageError, match=r"^7: not an image"):
        source[7]
    assert sum(group.nbytes for group in source._store.listing.read.groups.values()) < 2**22


def test_row_groups_beyond_the_limit_are_refused_by_the_header(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "x.parquet", image=[rng.bytes(1000) for _ in range(100)], label=list(range(100)))
    with pytest.raises(SourceError, match=r"x\.parquet: row group 0 needs \d+ bytes .*--max-bytes"):
        open_source(path, reading=ReadSettings(max_bytes=50_000))


def test_damaged_files_are_source_errors_or_unreadable_images(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pixels(20), list(range(20)), row_group=5)
    data = path.read_bytes()
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(SourceError, match=r"x\.parquet cannot be read as parquet"):
            open_source(path)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 5):
            damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with warnings.catch_warnings(), contextlib.suppress(SourceError, UnreadableImageError):
            warnings.simplefilter("ignore")
            source = open_source(path, policy="nan")
            for index in range(len(source)):
                with contextlib.suppress(UnreadableImageError):
                    source[index]


def test_a_folder_of_farout_is_no_set_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "calibration.parquet", pixels(2))
    (tmp_path / "config.json").write_text(json.dumps({"farout": {"kind": "detector"}}))
    with pytest.raises(SourceError, match=r"contains no images; it contains .*1 \.parquet"):
        open_source(tmp_path)
