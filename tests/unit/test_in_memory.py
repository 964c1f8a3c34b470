"""Python objects as image sources: arrays, lists, Datasets, DataLoaders, iterators, Hugging Face Datasets."""

import io
import pickle
import struct
import sys
import warnings
from collections import deque, namedtuple
from enum import IntEnum

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision import datasets as vision

from farout.core.errors import MisleadingResultWarning, MissingExtraError, SourceError, UnreadableImageError
from farout.data.batching import iterate_batches
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from image_files import encode, picture, pixels, write_folder


class Items(Dataset):
    """A Dataset of given items; an item that is an exception is raised."""

    def __init__(self, *items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, BaseException):
            raise item
        return item


def read_all(source):
    """The scored keys, and the unreadable ones with reasons, under the policy of `score`."""
    source = source.with_policy("nan")
    batches = iterate_batches(source, Preprocessing((8, 8), 3, (8, 8)), 3, workers=2)
    return [key for batch in batches for key in batch.keys], source.unreadable


IMAGES = pixels(5, 3)


class Level(IntEnum):
    LOW, HIGH = 0, 2


# ---------------------------------------------------------------- one image, arrays, tensors


@pytest.mark.parametrize(
    "given",
    [
        picture(IMAGES[0]),
        IMAGES[0],
        IMAGES[0].numpy(),
        IMAGES[0].permute(1, 2, 0),
        IMAGES[0].permute(1, 2, 0).numpy(),
        IMAGES[:1],
        encode(picture(IMAGES[0]), "PNG"),
        bytearray(encode(picture(IMAGES[0]), "PNG")),
        io.BytesIO(encode(picture(IMAGES[0]), "PNG")),
        IMAGES[0].float() / 255,
        (IMAGES[0].double() / 255).numpy(),
        (IMAGES[0].float() / 255).half(),
        IMAGES[0].long(),
        np.asarray(picture(IMAGES[0])).astype(">i4"),
        np.asarray(picture(IMAGES[0]))[::1].view(np.ndarray),
        np.flip(np.flip(np.asarray(picture(IMAGES[0])), 0), 0),
        IMAGES[0].float().div(255).requires_grad_(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_image_in_every_form(given):
    source = open_source(given)
    assert source.keys == ("0",)
    assert (source[0].int() - IMAGES[0].int()).abs().max() <= (1 if getattr(given, "dtype", 0) == torch.half else 0)


@pytest.mark.parametrize("shape", [(6, 7), (1, 6, 7), (6, 7, 1)])
def test_one_gray_image(shape):
    values = np.arange(42, dtype=np.uint8).reshape(6, 7)
    assert torch.equal(open_source(values.reshape(shape))[0], torch.from_numpy(values)[None])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_batches_of_every_layout(layout, channels, library):
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    expected = open_source([Image.fromarray(v[..., 0] if channels == 1 else v) for v in values])
    given = values.transpose(0, 3, 1, 2) if layout == "NCHW" else values
    source = open_source(torch.from_numpy(given.copy()) if library == "torch" else given)
    assert source.keys == expected.keys == ("0", "1", "2", "3", "4")
    assert source.content_hashes() == expected.content_hashes()  # alpha is composited on white as that of files


def test_gray_batches_without_an_axis_of_channels():
    values = pixels(5)[:, 0]
    assert torch.equal(open_source(values)[4], values[4][None])
    assert open_source(values[:3]).shapes() == {(3, 8, 8): 1}  # (3, H, W) is one RGB image
    with pytest.raises(SourceError, match=r"shape \(2, 8, 8\).*images\[:, None\]"):
        open_source(values[:2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_alpha_of_floats_and_16_bits_is_that_of_8_bits(dtype):
    rgba = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 7), dtype=np.uint8)
    expected = open_source(rgba)
    for given in (rgba / dtype(255), rgba.astype(np.uint16) * 257):
        source = open_source(given, reading=ReadSettings("full" if given.dtype == np.uint16 else None))
        assert (source[1].int() - expected[1].int()).abs().max() <= 1


def test_values_are_scaled_by_their_range_not_by_their_type():
    gray = np.arange(0, 4096, 64, dtype=np.uint16).reshape(1, 1, 8, 8)
    assert open_source(gray.repeat(2, 0))[0].unique().numel() > 60
    assert open_source(gray, reading=ReadSettings((0, 4032)))[0].max() == 255
    assert open_source(gray.astype(np.int64) // 16)[0].max() == 252  # 0 to 255 in 64 bits
    assert torch.equal(open_source(np.eye(8, dtype=bool))[0].unique(), torch.tensor([0, 255], dtype=torch.uint8))
    ct = np.linspace(-1000, 3000, 64).reshape(1, 8, 8)
    assert open_source(ct, reading=ReadSettings((-1000, 3000)))[0].unique().numel() > 50
    with pytest.raises(SourceError, match=r"-1000 to 3000.*value_range"):
        open_source(ct)
    with pytest.raises(SourceError, match="-1 to 1 pass"):
        open_source(np.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
    rounded = np.full((1, 1, 4, 4), 1 + 1e-7)
    assert open_source(rounded)[0].max() == 255


def test_a_range_may_be_set_after_opening():
    ct = np.linspace(-1000, 3000, 320, dtype=np.float32).reshape(5, 1, 8, 8)
    source = open_source(ct, require_range=False)
    assert source.with_value_range((-1000, 3000))[4].max() == 255
    assert len(read_all(source)[1]) == 5
    some = np.concatenate([ct[:1], np.zeros((4, 1, 8, 8), np.float32)])
    assert len(read_all(open_source(some))[1]) == 5  # not four black images and an unreadable one


def test_nan_makes_one_image_unreadable():
    values = IMAGES.float() / 255
    values[3, 0, 0, 0] = float("nan")
    scored, unreadable = read_all(open_source(values))
    assert scored == ["0", "1", "2", "4"]
    assert "NaN" in unreadable["3"]
    masked = np.ma.masked_array(IMAGES[0].numpy(), mask=IMAGES[0].numpy() > 100)
    assert "masked" in read_all(open_source([IMAGES[1], masked]))[1]["1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, 3, 8, 8), np.uint8), "empty"),
        (np.zeros((2, 3, 0, 8), np.uint8), "without pixels"),
        (np.zeros((2, 5, 8, 9), np.uint8), r"shape \(2, 5, 8, 9\)"),
        (np.zeros((2, 2, 3, 8, 8), np.uint8), r"shape \(2, 2, 3, 8, 8\)"),
        (np.zeros(9), r"shape \(9,\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
        (np.zeros((2, 3, 8, 8), complex), "complex"),
        (np.zeros((2, 3, 8, 8), "datetime64[s]"), "datetime64"),
        (np.zeros((2, 3, 8, 8), [("r", "u1")]), "type"),
        (torch.zeros(2, 3, 8, 8).to_sparse(), "sparse"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "type"),
        ([], "empty"),
        ((), "empty"),
        ({}, "empty"),
        (iter(()), "empty"),
        (3, "cannot read images from a int"),
        (None, "cannot read images from a NoneType"),
        (object(), "cannot read images from a object"),
        ({picture(IMAGES[0]).tobytes()}, "no order"),
        (pd.DataFrame({"path": ["a.png"]}), r"table\['path'\]"),
        ([1, 2], "item 0: the item is a int"),
        ([[0.0, 1.0], [1.0, 0.0]], "item 0: the item is a list that begins with a float"),
        ([IMAGES, IMAGES], "concatenate"),
        ((IMAGES, torch.arange(5)), "concatenate"),
        ([None, None], "None"),
        (["cifar10:test"], "there is no such file.*without a list"),
        (["x" * 300, "a\0b", "~nobody/x"], "there is no such file"),
        (["a.png", "b.png"], "item a.png: there is no such file"),
        ({"images": IMAGES, "labels": [0]}, "5 images and not as many labels"),
        ({"cat": [IMAGES[0], IMAGES[1]], "dog": [IMAGES[2], IMAGES[3]]}, "label of item cat is a Tensor"),
        ({"": IMAGES[0]}, "empty key"),
        ([""], "the path is empty"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_contains_no_images_is_refused_by_name(given, message):
    with pytest.raises(SourceError, match=message):
        open_source(given)


# ---------------------------------------------------------------- lists, dicts, iterators


def test_lists_of_every_type_also_mixed_and_of_several_sizes(tmp_path):
    write_folder(tmp_path, IMAGES[:2], ["a.png", "é/=b.png"])
    mixed = [
        tmp_path / "a.png",
        str(tmp_path / "é/=b.png"),
        picture(IMAGES[2]),
        IMAGES[3].numpy(),
        IMAGES[4].permute(1, 2, 0).float() / 255,
        encode(picture(IMAGES[0]), "PNG"),
        io.BytesIO(encode(picture(IMAGES[1]), "BMP")),
        np.frombuffer(encode(picture(IMAGES[2]), "PNG"), np.uint8),  # as torchvision.io.read_file and cv2.imencode
        IMAGES[3][None],
        np.zeros((5, 9), np.uint8),
    ]
    source = open_source(mixed)
    assert source.keys == (f"{tmp_path}/a.png", f"{tmp_path}/é/=b.png", *map(str, range(2, 10)))
    for index, number in enumerate((0, 1, 2, 3, 4, 0, 1, 2, 3)):
        assert torch.equal(source[index], IMAGES[number]), index
    assert source[9].shape == (1, 5, 9)
    for again in (tuple(mixed[2:]), deque(mixed[2:]), pd.Series(mixed[2:]), iter(mixed[2:]), (m for m in mixed[2:])):
        assert open_source(again)[0].equal(IMAGES[2])


def test_keys_of_paths_are_the_paths(tmp_path, monkeypatch):
    write_folder(tmp_path, IMAGES[:3], ["a/1.png", "b/1.png", "=2\r.png"])
    monkeypatch.chdir(tmp_path)
    source = open_source(["b/1.png", "a/1.png", "=2\r.png"])
    assert source.keys == ("b/1.png", "a/1.png", "%3D2%0D.png")
    assert source.groups == ("b", "a", ".")
    assert [source[i].equal(IMAGES[n]) for i, n in enumerate((1, 0, 2))] == [True] * 3
    assert open_source([("b/1.png", "dog"), ("a/1.png", "cat")]).class_names == ("cat", "dog")
    with pytest.raises(SourceError, match="more than once"):
        open_source(["a/1.png", "a/1.png"])
    assert open_source(np.array(["b/1.png", "a/1.png"])).keys == ("b/1.png", "a/1.png")
    with pytest.raises(SourceError, match="folder itself"):
        open_source(["a", "b"])
    scored, unreadable = read_all(open_source(["missing.png", "a/1.png", "a"]))
    assert (scored, list(unreadable)) == (["a/1.png"], ["missing.png", "a"])


def test_faulty_items_of_a_list_are_unreadable_images():
    items = [
        picture(IMAGES[0]),
        None,
        3,
        IMAGES[1][:2],
        "no such file.png",
        b"no image",
        np.zeros((3, 0, 4)),
        IMAGES[4],
    ]
    scored, unreadable = read_all(open_source(items))
    assert scored == ["0", "7"]
    assert list(unreadable) == ["1", "2", "3", "no such file.png", "5", "6"]


def test_dicts_give_their_keys():
    source = open_source({"left": picture(IMAGES[0]), 7: IMAGES[1], "\r": (IMAGES[2].numpy())})
    assert source.keys == ("left", "7", "%0D")
    assert torch.equal(source[1], IMAGES[1])
    assert open_source({"a": (IMAGES[0], 3), "b": (IMAGES[1], 1)}).labels == (3, 1)
    with pytest.raises(SourceError, match="more than once"):
        open_source({1: IMAGES[0], "1": IMAGES[1]})
    for columns in ({"images": IMAGES, "labels": torch.arange(5)}, {"image": list(IMAGES), "label": [0, 1, 2, 3, 4]}):
        source = open_source(columns)
        assert (source.keys, source.labels) == (("0", "1", "2", "3", "4"), (0, 1, 2, 3, 4))


def test_object_arrays_are_lists():
    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = IMAGES[0].numpy(), np.zeros((4, 5, 3), np.uint8)
    assert open_source(ragged).shapes() == {(3, 8, 8): 1, (3, 4, 5): 1}


def test_objects_that_convert_to_arrays():
    class Foreign:  # as arrays of JAX and TensorFlow, whose shape may be anything
        def __init__(self, values, shape=None):
            self.values, self.shape, self.dtype = values, shape or values.shape, values.dtype

        def __array__(self, dtype=None, copy=None):
            return self.values

    assert len(open_source(Foreign(IMAGES.numpy()))) == 5
    pairs = [(Foreign(IMAGES[n].numpy()), Foreign(np.array(n))) for n in (3, 1)]
    assert open_source(iter(pairs)).labels == (3, 1)
    scored, unreadable = read_all(open_source([IMAGES[0], Foreign(np.zeros(7), (3, 8, 8)), Foreign(np.zeros(7), 3)]))
    assert scored == ["0"]
    assert list(unreadable) == ["1", "2"]


def test_iterators_are_copied_and_bounded():
    def same_buffer():
        buffer = np.empty((3, 8, 8), np.uint8)
        for image in IMAGES.numpy():
            buffer[:] = image
            yield buffer

    source = open_source(same_buffer())
    assert [source[i].equal(IMAGES[i]) for i in range(5)] == [True] * 5
    assert open_source(zip(IMAGES, "ababa")).labels == (0, 1, 0, 1, 0)

    def endless():
        while True:
            yield np.zeros((3, 8000, 8000), np.uint8)

    with pytest.raises(SourceError, match="more than 1024 MiB"):
        open_source(endless())


def test_errors_of_iterators():
    def break_off():
        yield from IMAGES
        raise RuntimeError("lost connection")

    with pytest.raises(SourceError, match=r"ended with an error after 5 items: lost connection \(RuntimeError\)"):
        open_source(break_off())

    def load(index):
        if index == 2:
            raise KeyError("meta")
        return IMAGES[index]

    scored, unreadable = read_all(open_source(map(load, range(5))))
    assert scored == ["0", "1", "3", "4"]
    assert unreadable == {"2": "'meta' (KeyError)"}


def test_the_frames_of_one_picture_are_not_the_same_frame():
    out = io.BytesIO()
    frames = [picture(image) for image in pixels(3)]
    frames[0].save(out, format="TIFF", save_all=True, append_images=frames[1:])
    stack = Image.open(out)
    assert len(set(open_source(ImageSequence.Iterator(stack)).content_hashes())) == 3
    with pytest.raises(SourceError, match=r"frame\.copy\(\)"):
        open_source(list(ImageSequence.Iterator(stack)))
    stack.seek(1)
    assert torch.equal(open_source(stack)[0], pixels(3)[1])
    stack.seek(0)
    first = open_source([stack])
    assert torch.equal(first[0], pixels(3)[0])
    assert first.further_frames == {"0": 2}


def test_all_frames_of_items(tmp_path):
    out = io.BytesIO()
    frames = [picture(image) for image in pixels(3)]
    frames[0].save(out, format="TIFF", save_all=True, append_images=frames[1:])
    path = tmp_path / "stack.tif"
    path.write_bytes(out.getvalue())
    items = [(path, 5), (Image.open(path), 6), (out.getvalue(), 7), (IMAGES[0], 8), (tmp_path / "missing.tif", 9)]
    source = open_source(items, reading=ReadSettings(frames="all"))
    stack = f"{tmp_path}/stack.tif"
    assert source.keys[:6] == (f"{stack}#0", f"{stack}#1", f"{stack}#2", "1#0", "1#1", "1#2")
    assert source.keys[6:] == ("2#0", "2#1", "2#2", "3", f"{tmp_path}/missing.tif")
    assert source.labels == (5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 9)
    assert source.groups[2:5] == (stack, "1", "1")
    for index in (8, 3, 1, 5, 0, 4, 2, 7, 6):
        assert torch.equal(source[index], pixels(3)[index % 3])
    assert list(read_all(source)[1]) == [f"{tmp_path}/missing.tif"]
    assert source.further_frames == {}
    assert sum(open_source(items[:3]).with_policy("nan")[i] is not None for i in range(3)) == 3


def test_a_broken_picture_is_one_unreadable_image():
    """Pillow opens files lazily; its decoders raise more than OSError for what is broken."""

    def load() -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    given = [picture(image) for image in IMAGES[:4]]
    given[1].load = load
    given[2].close()
    given[3] = Image.open(io.BytesIO(encode(picture(IMAGES[3]), "PNG")[:90]))
    scored, unreadable = read_all(open_source(given))
    assert scored == ["0"]
    assert "buffer of 4 bytes" in unreadable["1"]


def test_pixel_limit_holds_for_objects():
    reading = ReadSettings(max_pixels=50)
    scored, unreadable = read_all(open_source([IMAGES[0][:, :4], IMAGES[1], picture(IMAGES[2])], reading=reading))
    assert scored == ["0"]
    assert "limit is 50" in unreadable["1"]
    assert "limit is 50" in unreadable["2"]


# ---------------------------------------------------------------- Datasets: items and labels


def test_any_error_of_an_item_is_one_unreadable_image():
    class CustomError(Exception):
        pass

    broken = [RuntimeError("bad"), KeyError("x"), CustomError(), StopIteration(), AssertionError("no"), None, 3, "text"]
    for labelled in (False, True):
        good = [(image, 1) if labelled else image for image in IMAGES]
        for error in broken:
            if labelled and error == "text":
                continue  # a path without a label
            for place in (0, 2, 4):
                items = [*good[:place], error, *good[place + 1 :]]
                scored, unreadable = read_all(open_source(Items(*items)))
                assert scored == [str(i) for i in range(5) if i != place]
                assert list(unreadable) == [str(place)]
    assert "bad (RuntimeError)" in read_all(open_source(Items(IMAGES[0], RuntimeError("bad"))))[1]["1"]
    with pytest.raises(UnreadableImageError, match=r"^1: bad"):
        open_source(Items(IMAGES[0], RuntimeError("bad")))[1]
    with pytest.raises(KeyboardInterrupt):
        open_source(Items(IMAGES[0], KeyboardInterrupt()))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA")):  # of the machine, not of one image
        with pytest.raises(type(error)):
            open_source(Items((IMAGES[0], 0), error))


def test_code_of_a_dataset_that_fails_elsewhere():
    class Failing(Items):
        @property
        def classes(self):
            raise ZeroDivisionError

        targets = classes

        def __repr__(self):
            raise ZeroDivisionError

    class SilentError(Exception):
        def __str__(self):
            raise ZeroDivisionError

    assert open_source(Failing(*zip(IMAGES, range(5)))).labels == (0, 1, 2, 3, 4)
    assert read_all(open_source(Items(IMAGES[0], SilentError())))[1] == {"1": "SilentError"}
    assert read_all(open_source(Items(IMAGES[0], OSError("a\r\n\x1b[31m"))))[1]["1"].isprintable()
    wrong = Subset(TensorDataset(IMAGES, torch.arange(5)), [3, 9, 2])
    assert list(read_all(open_source(wrong))[1]) == ["1"]
    with pytest.raises(SourceError, match="division by zero"):
        open_source(type("Broken", (Items,), {"__len__": lambda self: 1 / 0})())
    assert len(open_source(ConcatDataset([Items(), Items(*IMAGES)]))) == 5


def test_a_faulty_image_keeps_its_label():
    source = open_source(Items((IMAGES[0], 0), (None, 7), (IMAGES[2][:2], 5), (IMAGES[3], 2)))
    assert source.labels == (0, 7, 5, 2)
    assert list(read_all(source)[1]) == ["1", "2"]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([2, 0, 1], (2, 0, 1), None),
        ([-1, 0, -1], (-1, 0, -1), None),
        (["b", "a", "b"], (1, 0, 1), ("a", "b")),
        (["01", "1", "001"], (1, 2, 0), ("001", "01", "1")),
        ([b"b", b"a", b"b"], (1, 0, 1), ("a", "b")),
        ([torch.tensor(2), torch.tensor([0]), np.int64(1)], (2, 0, 1), None),
        ([torch.eye(3)[2], torch.eye(3)[0], torch.eye(3)[1]], (2, 0, 1), None),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], (2, 0, 1), None),
        ([np.eye(3, dtype=bool)[i] for i in (2, 0, 1)], (2, 0, 1), None),
        ([2.0, torch.tensor(0.0), np.float32(1)], (2, 0, 1), None),
        ([None, None, None], None, None),
        ([Level.HIGH, Level.LOW, Level.HIGH], (2, 0, 2), None),
        ([torch.eye(3)[[2]], torch.eye(3)[[0]], torch.eye(3)[[1]]], (2, 0, 1), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_labels_are_what_the_items_say(labels, expected, names):
    pairs = list(zip(IMAGES, labels, strict=False))
    dicts = [{"image": image, "label": label} for image, label in pairs]
    for given in (Items(*pairs), pairs, Items(*dicts), dicts, Items(*pairs, targets=[9, 9, 9]), iter(pairs)):
        source = open_source(given)
        assert (source.labels, source.class_names) == (expected, names)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (0.5, "label of item 1 is 0.5"),
        (float("nan"), "label of item 1 is nan"),
        (torch.tensor(0.5), "label of item 1 is 0.5"),
        (IMAGES[0], r"label of item 1 is a Tensor of shape \(3, 8, 8\)"),
        (picture(IMAGES[0]), "label of item 1 is a Image"),
        ({"a": 1}, "label of item 1 is a dict"),
        (None, "empty"),
        ("cat", "integers and texts"),
        ([0.5, 0.5], "integers and lists|lists and integers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_labels_that_are_no_classes_are_named(label, message):
    pairs = [(IMAGES[0], 0), (IMAGES[1], label), (IMAGES[2], 1)]
    for given in (Items(*pairs), pairs):
        with pytest.raises(SourceError, match=message):
            open_source(given)
    with pytest.raises(SourceError, match="row 1"):
        open_source(Items((IMAGES[0], [0, 1]), (IMAGES[1], [0.5, 0.5])))
    with pytest.raises(SourceError, match=r"1 of 3 items.*no label \(first: 1\)"):
        open_source(Items(pairs[0], IMAGES[1], pairs[2]))


def test_names_of_classes_only_if_they_fit():
    pairs = [(image, label) for image, label in zip(IMAGES, (0, 1, 2, 1, 0), strict=True)]
    assert open_source(Items(*pairs, classes=["a", "b", "c"])).class_names == ("a", "b", "c")
    assert open_source(Items(*pairs, classes=("a", "b", "c"), targets=[0, 1, 2, 1, 0])).class_names == ("a", "b", "c")
    assert open_source(Items(*pairs, classes=[("a", "A"), ("b",), ("c",)])).class_names == ("a, A", "b", "c")
    for unfit in (["a", "b"], ["a", "a", "b"], 3, [], None, "abc"):
        assert open_source(Items(*pairs, classes=unfit)).class_names is None
    texts = Items(*pairs, classes=["a", "b", "c"], targets=list("abcba"))
    assert open_source(texts).class_names == ("a", "b", "c")
    other_targets = Items(*pairs, classes=["a", "b", "c"], targets=[1, 2, 0, 2, 1])  # the names are those of targets
    assert open_source(other_targets).class_names is None
    assert open_source(Subset(Items(*pairs, classes=["a", "b", "c"]), [3, 0])).class_names == ("a", "b", "c")


def test_items_that_are_dicts():
    Pair = namedtuple("Pair", "image label")
    for make in (
        lambda image, label: {"image": picture(image), "label": label},
        lambda image, label: {"pixel_values": image.float() / 255, "labels": label},
        lambda image, label: {"Image": image, "Target": label, "path": "x.png", "index": 3},
        lambda image, label: {"x-ray": image, "class": label, "weight": 0.5, "embedding": torch.zeros(9)},
        lambda image, label: {"img": {"bytes": encode(picture(image), "PNG"), "path": "x.png"}, "fine_label": label},
        lambda image, label: {"__key__": "k", "jpg": encode(picture(image), "PNG"), "cls": label},
        Pair,
        lambda image, label: (image, label, {"meta": 1}),
        lambda image, label: [image, label],
    ):
        source = open_source(Items(*(make(image, 4 - i) for i, image in enumerate(IMAGES))))
        assert source.labels == (4, 3, 2, 1, 0)
        assert torch.equal(source[3], IMAGES[3])
    with pytest.raises(SourceError, match="a dict with the keys 'left', 'right'"):
        open_source(Items(*[{"left": IMAGES[0], "right": IMAGES[1]}] * 2))


def test_tensor_datasets():
    plain = open_source(TensorDataset(IMAGES))
    assert plain.labels is None
    assert torch.equal(plain[2], IMAGES[2])
    assert open_source(TensorDataset(IMAGES, torch.arange(5))).labels == (0, 1, 2, 3, 4)
    assert open_source(TensorDataset(IMAGES, torch.eye(5))).labels == (0, 1, 2, 3, 4)
    assert open_source(TensorDataset(IMAGES, torch.arange(5)[:, None])).labels == (0, 1, 2, 3, 4)
    assert open_source(TensorDataset(IMAGES.permute(0, 2, 3, 1))).shapes() == {(3, 8, 8): 5}
    with pytest.raises(SourceError, match=r"item 0: float32 values from 0 to 2"):
        open_source(TensorDataset(IMAGES.float()))


def test_subsets_and_concatenations():
    labelled = Items(*zip(IMAGES, (0, 1, 2, 1, 0)), classes=["a", "b", "c"])
    part = open_source(Subset(labelled, [4, 1]))
    assert (part.keys, part.labels, part.class_names) == (("0", "1"), (0, 1), ("a", "b", "c"))
    assert len(open_source(random_split(labelled, [3, 2])[0])) == 3
    both = open_source(ConcatDataset([labelled, Subset(labelled, [2])]))
    assert (both.labels, both.class_names) == ((0, 1, 2, 1, 0, 2), ("a", "b", "c"))
    assert torch.equal(both[5], IMAGES[2])
    # label 0 of one part is another class than label 0 of the other
    other = Items(*zip(IMAGES, (0, 1, 0, 1, 0)), classes=["x", "b"])
    joined = open_source(ConcatDataset([labelled, other]))
    assert [joined.class_names[label] for label in joined.labels] == list("abcbaxbxbx")
    unnamed = open_source(ConcatDataset([labelled, TensorDataset(IMAGES, torch.arange(5))]))
    assert (unnamed.labels, unnamed.class_names) == ((0, 1, 2, 1, 0, 0, 1, 2, 3, 4), None)
    with pytest.raises(SourceError, match="part 1 of ConcatDataset has no labels"):
        open_source(ConcatDataset([labelled, TensorDataset(IMAGES)]))
    broken = open_source(ConcatDataset([TensorDataset(IMAGES), Items(IMAGES[0], RuntimeError("bad"))]))
    assert read_all(broken)[1] == {"6": "bad (RuntimeError)"}


def test_datasets_made_of_sources_keep_labels(tmp_path):
    write_folder(tmp_path, IMAGES[:4], ["a/1.png", "a/2.png", "b/1.png", "c/1.png"])
    (tmp_path / "c" / "2.png").write_bytes(b"broken")
    source = open_source(tmp_path)
    loaded = open_source(DataLoader(source, batch_size=2))
    assert (loaded.keys, loaded.labels, loaded.class_names) == (source.keys, source.labels, ("a", "b", "c"))
    part = open_source(Subset(source, [3, 4, 0]))
    assert (part.keys, part.labels, part.class_names) == (("0", "1", "2"), (2, 2, 0), ("a", "b", "c"))
    scored, unreadable = read_all(open_source(ConcatDataset([source, Subset(source, [4, 2])])))
    assert scored == ["0", "1", "2", "3", "6"]
    assert list(unreadable) == ["4", "5"]


def test_image_folders_with_a_transform_of_the_targets(tmp_path):
    names = ["a/1.png", "a/2.png", "b/1.png", "c/1.png"]
    write_folder(tmp_path, IMAGES[:4], names)
    plain = open_source(vision.ImageFolder(tmp_path))
    assert (plain.labels, plain.class_names) == ((0, 0, 1, 2), ("a", "b", "c"))
    folder = vision.ImageFolder(tmp_path, target_transform=lambda label: {2: 1, 1: 0, 0: 1}[label])
    for given in (folder, Subset(folder, range(4)), DataLoader(folder)):
        source = open_source(given)
        assert source.labels == tuple(folder[i][1] for i in range(4)) == (1, 1, 0, 1)
        assert source.class_names is None  # `classes` names the labels before the transform
    text = vision.ImageFolder(tmp_path, target_transform=lambda label: "xyz"[label])
    assert open_source(text).class_names == ("x", "y", "z")
    changed = vision.ImageFolder(tmp_path)
    changed.targets = [2, 2, 2, 2]  # which ImageFolder does not use
    assert open_source(changed).labels == (0, 0, 1, 2)

    class Other(vision.ImageFolder):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, label + 1

    assert open_source(Other(tmp_path)).labels == (1, 1, 2, 3)


def test_labels_of_torchvision_are_known_without_reading_images(tmp_path):
    class Mnist(vision.MNIST):
        def __init__(self, target_transform=None):
            self.data, self.targets = pixels(100)[:, 0], torch.arange(100) % 10
            self.transform, self.target_transform = self.count, target_transform
            self.reads = 0

        def count(self, image):
            self.reads += 1
            return image

    mnist = Mnist()
    source = open_source(mnist)
    assert source.labels == tuple(i % 10 for i in range(100))
    assert source.class_names == tuple(vision.MNIST.classes)
    assert mnist.reads < 20
    assert open_source(Mnist(lambda label: 9 - label)).labels == tuple(9 - i % 10 for i in range(100))


def test_lengths_that_are_wrong():
    class TooLong(Items):
        def __len__(self):
            return 7

    for items in (IMAGES, list(zip(IMAGES, range(5)))):
        scored, unreadable = read_all(open_source(TooLong(*items)))
        assert scored == ["0", "1", "2", "3", "4"]
        assert list(unreadable) == ["5", "6"]

    class NoLength(Dataset):
        def __getitem__(self, index):
            return IMAGES[index]

    with pytest.raises(SourceError, match="NoLength has no length"):
        open_source(NoLength())
    with pytest.raises(SourceError, match="Items is empty"):
        open_source(Items())

    class Plain:  # the methods of a Dataset without its base class
        __len__, __getitem__ = Items.__len__, Items.__getitem__
        items = IMAGES

    assert len(open_source(Plain())) == 5


def test_random_augmentation_is_named():
    class Noisy(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.rand(3, 8, 8), 0

    with pytest.warns(MisleadingResultWarning, match="Noisy change when they are read again"):
        open_source(Noisy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(Items(*IMAGES))


def test_sources_of_datasets_pickle():
    for given in (Items(*zip(IMAGES, range(5))), list(IMAGES), IMAGES, ConcatDataset([Items(*IMAGES)] * 2)):
        source = pickle.loads(pickle.dumps(open_source(given)))  # noqa: S301 - our own bytes
        assert torch.equal(source[3], IMAGES[3])


# ---------------------------------------------------------------- DataLoader, IterableDataset


class Stream(IterableDataset):
    def __init__(self, *items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __iter__(self):
        return iter(self.items)


def test_iterable_datasets():
    source = open_source(Stream(*zip(IMAGES, (0, 1, 0, 1, 1)), classes=["a", "b"]))
    assert (source.keys, source.labels) == (("0", "1", "2", "3", "4"), (0, 1, 0, 1, 1))
    assert source.class_names == ("a", "b")
    assert torch.equal(source[4], IMAGES[4])
    assert open_source(DataLoader(Stream(*IMAGES), batch_size=2)).fingerprint() == open_source(IMAGES).fingerprint()


@pytest.mark.parametrize(
    "as_item", [lambda i, n: i, lambda i, n: (i, torch.tensor(n)), lambda i, n: {"image": i, "label": n}]
)
def test_data_loaders_without_batches(as_item):
    items = [as_item(image, 4 - n) for n, image in enumerate(IMAGES)]
    labels = None if isinstance(items[0], torch.Tensor) else (4, 3, 2, 1, 0)
    batches = [torch.utils.data.default_collate(items[:2]), torch.utils.data.default_collate(items[2:])]
    for given in (Stream(*items), Stream(*batches)):
        source = open_source(DataLoader(given, batch_size=None))
        assert source.labels == labels
        assert [source[i].equal(IMAGES[i]) for i in range(5)] == [True] * 5
    unbatched = open_source(DataLoader(Items(*items), batch_size=None, collate_fn=lambda item: item))
    assert (len(unbatched), unbatched.labels) == (5, labels)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": None}, {"batch_size": 4, "num_workers": 1}])
def test_data_loaders_are_read_by_index(options):
    mixed = Items(*(picture(image) for image in IMAGES[:3]), RuntimeError("bad"), picture(IMAGES[4].float().byte()))
    scored, unreadable = read_all(open_source(DataLoader(mixed, **options)))
    assert (scored, unreadable) == (["0", "1", "2", "4"], {"3": "bad (RuntimeError)"})
    labelled = open_source(DataLoader(TensorDataset(IMAGES, torch.arange(5)), **options))
    assert labelled.labels == (0, 1, 2, 3, 4)


def test_the_order_of_a_data_loader_is_kept_and_must_be_fixed():
    data = TensorDataset(IMAGES, torch.arange(5))
    some = open_source(DataLoader(data, sampler=[4, 0, 2], batch_size=2, drop_last=True))
    assert (some.keys, some.labels) == (("4", "0", "2"), (4, 0, 2))  # also the image of the dropped batch
    assert torch.equal(some[0], IMAGES[4])
    assert open_source(DataLoader(data, batch_sampler=[[1, 0], [3]])).keys == ("1", "0", "3")

    class Own:
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(torch.randperm(5).tolist())

    many = TensorDataset(pixels(50))
    for loader in (
        DataLoader(data, shuffle=True),
        DataLoader(data, sampler=WeightedRandomSampler([1.0] * 5, 5)),
        DataLoader(many, batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(many), 2, False)),
        DataLoader(data, shuffle=True, collate_fn=list),
    ):
        with pytest.raises(SourceError, match="shuffle"):
            open_source(loader)
    with pytest.raises(SourceError, match="another order"):
        open_source(DataLoader(many, sampler=type("Own", (Own,), {"__iter__": lambda s: iter(torch.randperm(50))})()))
    with pytest.raises(SourceError, match="more than once"):
        open_source(DataLoader(data, sampler=[1, 1]))


@pytest.mark.parametrize(
    ("collate", "labelled"),
    [
        (list, True),
        (lambda items: (torch.stack([i for i, _ in items]), torch.tensor([n for _, n in items])), True),
        (lambda items: [[i for i, _ in items], [n for _, n in items]], True),
        (lambda items: tuple(zip(*items)), True),
        (lambda items: {"pixel_values": torch.stack([i for i, _ in items]), "labels": [n for _, n in items]}, True),
        (lambda items: {"image": [picture(i) for i, _ in items], "label": [n for _, n in items]}, True),
        (lambda items: torch.stack([i for i, _ in items]), False),
        (lambda items: (torch.stack([i for i, _ in items]),), False),
        (lambda items: [picture(i) for i, _ in items], False),
        (lambda items: [i for i, _ in items], False),
        (lambda items: [(picture(i), n) for i, n in items], True),
        (lambda items: torch.stack([i.permute(1, 2, 0) for i, _ in items]), False),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batches_of_other_collate_functions(collate, labelled, size):
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(5)), batch_size=size, collate_fn=collate)
    source = open_source(loader)
    assert [source[i].equal(IMAGES[i]) for i in range(5)] == [True] * 5
    assert source.labels == ((0, 1, 2, 3, 4) if labelled else None)


# ---------------------------------------------------------------- Hugging Face Datasets


@pytest.fixture
def hub():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def hub_set(hub, names=("cat", "dog")):
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=list(names))})
    columns = {"image": [picture(image) for image in IMAGES], "label": [0, 1, 0, 1, 1]}
    return hub.Dataset.from_dict(columns, features)


def test_hub_datasets(hub):
    data = hub_set(hub)
    for given in (data, data.with_format("torch"), data.with_format("numpy"), DataLoader(data)):
        source = open_source(given)
        assert (source.labels, source.class_names) == ((0, 1, 0, 1, 1), ("cat", "dog"))
        assert torch.equal(source[3], IMAGES[3])
    chosen = open_source(data.select([4, 0]))
    assert chosen.labels == (1, 0)
    assert torch.equal(chosen[0], IMAGES[4])
    flipped = data.with_transform(
        lambda rows: {"pixel_values": [np.asarray(i)[::-1] for i in rows["image"]], "label": rows["label"]}
    )
    source = open_source(flipped)
    assert torch.equal(source[3], IMAGES[3].flip(1))
    assert (source.labels, source.class_names) == ((0, 1, 0, 1, 1), ("cat", "dog"))
    stream = open_source(data.to_iterable_dataset())
    assert (stream.labels, stream.class_names) == ((0, 1, 0, 1, 1), ("cat", "dog"))
    assert torch.equal(stream[3], IMAGES[3])
    part = open_source(Subset(data, [4, 0]))
    assert (part.labels, part.class_names) == ((1, 0), ("cat", "dog"))
    pictures = [picture(image) for image in IMAGES]
    both = hub.Dataset.from_dict(
        {"mask": pictures, "photo": pictures}, hub.Features({"mask": hub.Image(), "photo": hub.Image()})
    )
    with pytest.raises(SourceError, match="several columns of images: mask, photo; keep one"):
        open_source(both)


def test_hub_datasets_of_other_columns(hub, tmp_path):
    arrays = hub.Dataset.from_dict(
        {"img": [image.numpy() for image in IMAGES], "target": list("babab")},
        hub.Features({"img": hub.Array3D((3, 8, 8), "uint8"), "target": hub.Value("string")}),
    )
    source = open_source(arrays)
    assert (source.labels, source.class_names) == ((1, 0, 1, 0, 1), ("a", "b"))
    assert torch.equal(source[3], IMAGES[3])
    encoded = hub.Dataset.from_dict({"image": [encode(picture(image), "PNG") for image in IMAGES]})
    assert torch.equal(open_source(encoded)[3], IMAGES[3])
    write_folder(tmp_path, IMAGES, [f"{i}.png" for i in range(5)])
    paths = hub.Dataset.from_dict({"image": [str(tmp_path / f"{i}.png") for i in range(5)]})
    assert torch.equal(open_source(paths)[3], IMAGES[3])
    with pytest.raises(SourceError, match="text"):
        open_source(hub.Dataset.from_dict({"text": ["a", "b"]}))


def test_folders_of_save_to_disk(hub, tmp_path, monkeypatch):
    hub.DatasetDict(train=hub_set(hub), test=hub_set(hub).select([4, 0])).save_to_disk(tmp_path / "sets")
    with pytest.raises(SourceError, match=r"several sets.*sets:train, .*sets:test"):
        open_source(tmp_path / "sets")
    source = open_source(f"{tmp_path}/sets/test@classes=dog")
    assert (source.keys, source.labels, source.class_names) == (("0",), (1,), ("cat", "dog"))
    assert torch.equal(source[0], IMAGES[4])
    for part in (tmp_path / "sets" / "test").glob("*.arrow"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(tmp_path / "sets" / "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"farout\[hub\]"):
        open_source(tmp_path / "sets" / "train")


def test_sets_of_splits_are_refused_with_their_names(hub):
    for given in (hub.DatasetDict(train=hub_set(hub), test=hub_set(hub)),):
        with pytest.raises(SourceError, match=r"\['train'\], \['test'\]"):
            open_source(given)
