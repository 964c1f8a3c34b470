"""Files of numpy arrays: the array that is named is read, with its labels, and headers are checked first."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

from farout.core.errors import SourceError, SourceWarning, UnreadableImageError
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from image_files import pixels


def gray(count, seed=0):
    return pixels(count, seed=seed)[:, 0].numpy()


@pytest.fixture
def medmnist(tmp_path):
    """The layout of MedMNIST: three splits, labels of shape (N, 1)."""
    arrays = {}
    for seed, (split, count) in enumerate([("train", 6), ("val", 5), ("test", 4)]):
        arrays[f"{split}_images"] = gray(count, seed)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 3
    np.savez(tmp_path / "pathmnist.npz", **arrays)
    return tmp_path / "pathmnist.npz"


@pytest.fixture
def keras(tmp_path):
    arrays = {"x_train": gray(6), "y_train": np.arange(6) % 2, "x_test": gray(4, 1), "y_test": np.arange(4)}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


@pytest.mark.parametrize("suffix", ["@array=test_images", ":test", ":test@vflip", "@array=TEST_IMAGES"])
def test_a_split_of_medmnist_is_named(medmnist, suffix):
    source = open_source(f"{medmnist}{suffix}")
    assert source.labels == (0, 1, 2, 0)
    assert source.keys == ("0", "1", "2", "3")
    expected = gray(4, 2)[1][::-1] if "vflip" in suffix else gray(4, 2)[1]
    assert (source[1][0].numpy() == expected).all()


def test_a_split_of_keras_is_named(keras):
    assert open_source(f"{keras}:test").labels == (0, 1, 2, 3)
    source = open_source(f"{keras}@array=x_train")
    assert source.labels == (0, 1, 0, 1, 0, 1)
    assert (source[5][0].numpy() == gray(6)[5]).all()


def test_several_arrays_are_refused_with_their_names_and_shapes(medmnist, keras):
    with pytest.raises(
        SourceError, match=r"train_images \(6, 8, 8\) uint8, .*test_images \(4, 8, 8\).*@array=train_images"
    ):
        open_source(medmnist)
    with pytest.raises(SourceError, match=r"x_train \(6, 8, 8\) uint8, x_test \(4, 8, 8\)"):
        open_source(keras)
    with pytest.raises(SourceError, match=r"no array 'dev_images'; its arrays are train_images"):
        open_source(f"{medmnist}@array=dev_images")
    with pytest.raises(SourceError, match=r"0 arrays of images with 'dev' in their names"):
        open_source(f"{medmnist}:dev")
    with pytest.raises(SourceError, match=r"for which @column=x has no meaning"):
        open_source(f"{medmnist}@column=x")


def test_the_array_images_is_used_with_a_warning(tmp_path):
    np.savez(tmp_path / "x.npz", masks=gray(5), images=gray(5, 1), labels=list("abcab"))
    with pytest.warns(SourceWarning, match=r"images is read, not masks \(5, 8, 8\) uint8"):
        source = open_source(tmp_path / "x.npz")
    assert (source[0][0].numpy() == gray(5, 1)[0]).all()
    assert source.class_names == ("a", "b", "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (open_source(f"{tmp_path}/x.npz@array=masks")[0][0].numpy() == gray(5)[0]).all()


@pytest.mark.parametrize(
    ("shape", "count", "item"),
    [
        ((9, 8, 3), 1, (3, 9, 8)),
        ((9, 8, 4), 1, (3, 9, 8)),
        ((9, 8, 1), 1, (1, 9, 8)),
        ((1, 9, 8), 1, (1, 9, 8)),
        ((9, 8), 1, (1, 9, 8)),
        ((5, 9, 8), 5, (1, 9, 8)),
        ((5, 3, 9, 8), 5, (3, 9, 8)),
        ((5, 9, 8, 3), 5, (3, 9, 8)),
        ((5, 9, 8, 4), 5, (3, 9, 8)),
        ((5, 4, 9, 8), 5, (3, 9, 8)),
        ((5, 9, 8, 1), 5, (1, 9, 8)),
        ((1, 9, 8, 3), 1, (3, 9, 8)),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_shapes_of_one_image_and_of_batches(tmp_path, shape, count, item, suffix):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / f"x{suffix}"
    (np.savez(path, values) if suffix == ".npz" else np.save(path, values))
    source = open_source(path)
    assert len(source) == count
    assert {tuple(image.shape) for image in source} == {item}
    if shape == (9, 8, 3):
        assert (source[0].numpy() == values.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("shape", [(3, 9, 8), (4, 9, 8), (3, 9, 3)])
def test_a_shape_of_two_meanings_is_refused_unless_labels_decide(tmp_path, shape):
    values = np.zeros(shape, np.uint8)
    np.savez(tmp_path / "x.npz", values)
    with pytest.raises(SourceError, match=r"can be one image or [34] gray images; save it as"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=values, labels=np.arange(shape[0]))
    assert len(open_source(tmp_path / "y.npz")) == shape[0]


@pytest.mark.parametrize("shape", [(7,), (2, 9, 8, 2), (2, 5, 9, 8), (2, 3, 4, 9, 8), ()])
def test_other_shapes_are_refused(tmp_path, shape):
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    with pytest.raises(SourceError, match=r"arr_0 .* expected images"):
        open_source(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    with pytest.raises(SourceError, match=r"x\.npy has shape and type"):
        open_source(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", "i8", "u8", "f4", "f8", ">f4"])
def test_other_types_use_the_value_range(tmp_path, dtype):
    values = np.arange(2 * 8 * 16).reshape(2, 8, 16) * 16  # 12 bits
    np.save(tmp_path / "x.npy", values.astype(dtype))
    source = open_source(tmp_path / "x.npy", reading=ReadSettings(value_range=(0, 4095)))
    assert source[1][0, 7, 15] == round(255 * 4080 / 4095)
    assert source[1][0, 0, 0] == round(255 * 128 * 16 / 4095)
    if "f" in dtype:
        with pytest.raises(UnreadableImageError, match="--value-range"):
            open_source(tmp_path / "x.npy")[1]
    else:
        assert open_source(tmp_path / "x.npy")[1][0, 7, 15] == round(255 * 4080 / 4095)


def test_booleans_and_halves(tmp_path):
    np.save(tmp_path / "b.npy", np.eye(8, dtype=bool))
    assert open_source(tmp_path / "b.npy")[0].unique().tolist() == [0, 255]
    np.save(tmp_path / "h.npy", np.full((8, 8), 0.5, np.float16))
    assert open_source(tmp_path / "h.npy")[0].unique().tolist() == [128]


def test_alpha_is_composited_on_white(tmp_path):
    values = np.zeros((2, 8, 8, 4), np.uint8)
    values[1, ..., 3] = 255
    np.savez(tmp_path / "x.npz", images=values)
    assert [image.unique().tolist() for image in open_source(tmp_path / "x.npz")] == [[255], [0]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.eye(3)[[2, 0, 1, 1, 2]], (2, 0, 1, 1, 2)),
        (np.array([["a"], ["b"], ["a"], ["b"], ["a"]]), (0, 1, 0, 1, 0)),
        (np.array([0, -1, 1, 0, 0], np.int8), (0, -1, 1, 0, 0)),
    ],
)
def test_labels_of_other_forms(tmp_path, labels, expected):
    np.savez(tmp_path / "x.npz", images=gray(5), y=labels)
    assert open_source(tmp_path / "x.npz").labels == expected


@pytest.mark.parametrize(
    ("images", "labels"),
    [("XTrain", "YTrain"), ("trainX", "trainY"), ("Xtrain", "ytrain"), ("train_data", "train_target"), ("X", "y")],
)
def test_labels_are_found_by_the_words_of_the_names(tmp_path, images, labels):
    np.savez(tmp_path / "x.npz", **{images: gray(5), labels: np.arange(5), "XTest": gray(2), "YTest": np.arange(2)})
    assert open_source(f"{tmp_path}/x.npz@array={images}").labels == (0, 1, 2, 3, 4)
    assert open_source(f"{tmp_path}/x.npz:test").labels == (0, 1)


def test_arrays_of_labels_of_another_form_are_explained(tmp_path):
    np.savez(tmp_path / "x.npz", images=gray(5), labels=gray(5))
    with pytest.warns(SourceWarning, match=r"labels \(5, 8, 8\) uint8 has not one label per image"):
        assert open_source(tmp_path / "x.npz").labels is None
    np.savez(tmp_path / "y.npz", image=np.zeros((8, 8, 3), np.uint8), label=3)
    assert open_source(tmp_path / "y.npz").labels == (3,)
    np.savez(tmp_path / "z.npz", x=np.zeros((10, 784), np.uint8), y=np.arange(10))
    with pytest.raises(
        SourceError, match=r"shape \(10, 784\) and 10 labels: if each row is an image, save it as \(10, H"
    ):
        open_source(tmp_path / "z.npz")


def test_wrong_labels_are_errors_that_name_the_array(tmp_path):
    np.savez(tmp_path / "x.npz", images=gray(5), labels=np.arange(4))
    with pytest.raises(SourceError, match=r"array images contains 5 images, and the array labels has 4 labels"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=gray(5), labels=np.full((5, 14), 1))
    with pytest.raises(SourceError, match=r"x\.npz, column labels has the label \[1, 1, .* one-hot"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=gray(5), labels=np.full(5, np.nan))
    with pytest.raises(SourceError, match=r"5 of 5 labels in .*labels are empty"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=gray(5), labels=np.array([{}] * 5))
    with pytest.raises(SourceError, match=r"array labels contains Python objects"):
        open_source(tmp_path / "x.npz")


def test_arrays_that_may_be_labels_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", gray(5), np.arange(5))
    with pytest.warns(SourceWarning, match=r"no labels for arr_0: none of the arrays arr_1 .*@label=arr_1"):
        assert open_source(tmp_path / "x.npz").labels is None
    assert open_source(f"{tmp_path}/x.npz@label=arr_1").labels == (0, 1, 2, 3, 4)
    np.savez(tmp_path / "y.npz", images=gray(5), labels=np.arange(5), patient=list("aabbb"))
    assert open_source(tmp_path / "y.npz").groups == tuple("aabbb")


def write_member(path, header, data=b"", version=(1, 0), name="images.npy"):
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\x93NUMPY" + bytes(version) + length + header.encode() + data)


def header_of(shape, descr="'|u1'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def test_a_small_file_that_inflates_beyond_the_limit_is_refused_by_its_header(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((100, 100, 100), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    with pytest.raises(
        SourceError, match=r"array images has .* of 1000000 bytes, and the limit is 999999 \(--max-bytes\)"
    ):
        open_source(tmp_path / "x.npz", reading=ReadSettings(max_bytes=999_999))
    assert len(open_source(tmp_path / "x.npz", reading=ReadSettings(max_bytes=1_000_000))) == 100


def test_a_header_of_ten_terabytes_is_refused(tmp_path):
    write_member(tmp_path / "x.npz", header_of("(10000000, 1000, 1000)"))
    with pytest.raises(SourceError, match=r"array images: the header announces .* and the file contains 0"):
        open_source(tmp_path / "x.npz")
    header = header_of("(10000000, 1000, 1000)").encode()
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"123")
    with pytest.raises(SourceError, match=r"announces 10000000000000 bytes, more than the file has"):
        open_source(tmp_path / "x.npy")


def test_more_images_than_keys_fit_into_the_limit_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1000, 2, 2), np.uint8))
    with pytest.raises(SourceError, match=r"1000 images, whose keys need about 128000 bytes .*--max-bytes"):
        open_source(tmp_path / "x.npy", reading=ReadSettings(max_bytes=100_000))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[" * 5000,
        header_of("(-1, 8, 8)"),
        header_of("'x'"),
        header_of("(8, 8)", "'|Q9'"),
        header_of("(8, 8)", "5"),
        header_of("(8, 8)", "[('a', '|u1'), ('a', '|u1')]"),
        header_of("(8, " + "9" * 8000 + ")"),
        header_of("(8, " + "9" * 4000 + ")"),
        "{'shape': (1,)}",
        header_of("(8, 8)") + " " * 70000,
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_damaged_headers_are_source_errors(tmp_path, header, suffix):
    path = tmp_path / f"x{suffix}"
    version = (1, 0) if len(header) < 60000 else (2, 0)
    write_member(tmp_path / "x.npz", header, bytes(64), version)
    if suffix == ".npy":
        with zipfile.ZipFile(tmp_path / "x.npz") as archive:
            path.write_bytes(archive.read("images.npy"))
    with pytest.raises(SourceError, match=r"x\.np"):
        open_source(path)


def test_damaged_files_are_source_errors(tmp_path):
    out = io.BytesIO()
    np.savez_compressed(out, images=gray(20), labels=np.arange(20))
    data = out.getvalue()
    random = np.random.default_rng(0)
    (tmp_path / "x.npz").write_bytes(data)
    open_source(tmp_path / "x.npz")
    for cut in (0, 3, 30, len(data) // 2, len(data) - 1):
        (tmp_path / "x.npz").write_bytes(data[:cut])
        with pytest.raises(SourceError, match=r"x\.npz"):
            open_source(tmp_path / "x.npz")
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "x.npz").write_bytes(damaged)
        with warnings.catch_warnings(), contextlib.suppress(SourceError):  # any other error is a traceback
            warnings.simplefilter("ignore")
            open_source(tmp_path / "x.npz")


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="without pickle"):
        open_source(tmp_path / "x.npy")
    (tmp_path / "y.npz").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(SourceError, match=r"y\.npz cannot be read as npz"):
        open_source(tmp_path / "y.npz")


def test_npy_files_are_read_image_by_image(tmp_path):
    images = gray(50)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy", reading=ReadSettings(max_bytes=7000))
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    assert all((copy[i][0].numpy() == images[i]).all() for i in (0, 20, 49))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-10])
    with pytest.raises(UnreadableImageError, match=r"^49: it ends after 54 of 64 bytes"):
        source[49]
    np.save(tmp_path / "f.npy", np.asfortranarray(images))
    assert (open_source(tmp_path / "f.npy")[7][0].numpy() == images[7]).all()


def test_an_empty_array_is_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(SourceError, match=r"array images is empty: shape \(0, 8, 8\)"):
        open_source(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w"):
        pass
    with pytest.raises(SourceError, match="has the arrays none"):
        open_source(tmp_path / "y.npz")


def test_pixels_of_an_npz_file_are_those_of_the_array(tmp_path):
    images = pixels(5, 3)
    np.savez(tmp_path / "x.npz", images=images.numpy(), labels=np.arange(5))
    assert all(torch.equal(one, two) for one, two in zip(open_source(tmp_path / "x.npz"), images))
