"""Labels are what the items say: texts stay texts, and nothing is merged, rounded or dropped."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from farout.core.errors import SourceError
from farout.core.names import decode_key, normalize_name
from farout.data.file_listing import encode_groups, encode_labels


@pytest.mark.parametrize(
    "texts", [("01", "1", "001"), ("007", "7"), ("1_0", "10"), (" 1", "1"), ("1.0", "1"), ("+1", "1"), ("-0", "0")]
)
def test_texts_that_look_like_numbers_stay_apart(texts):
    labels, names = encode_labels(texts, "x.csv, column label")
    assert len(set(labels)) == len(texts)
    assert [decode_key(names[label]) for label in labels] == list(texts)


@pytest.mark.parametrize("digits", ["١", "²", "１"])
def test_digits_of_other_scripts_are_texts(digits):
    assert encode_labels([digits, "1"], "x")[1] == tuple(sorted([digits, "1"]))


@pytest.mark.parametrize(
    "values",
    [
        ["0", "12", "-1"],
        [0, 12, -1],
        [0.0, 12.0, -1.0],
        np.array([0, 12, -1], dtype=np.int16),
        np.array([[0], [12], [-1]]),
        [torch.tensor(0), torch.tensor([12]), torch.tensor(-1)],
        [np.float32(0), np.float32(12), np.float32(-1)],
        np.array(["0", "12", "-1"]),
    ],
)
def test_integers_are_labels_without_names(values):
    assert encode_labels(values, "x") == ((0, 12, -1), None)


@pytest.mark.parametrize(
    "values", [["b", "a", "b"], np.array(["b", "a", "b"]), np.array([b"b", b"a", b"b"]), [["b"], ["a"], ["b"]]]
)
def test_texts_are_class_names(values):
    assert encode_labels(values, "x") == ((1, 0, 1), ("a", "b"))


def test_booleans_are_class_names():
    assert encode_labels([True, False, True], "x") == ((1, 0, 1), ("False", "True"))
    assert encode_labels(np.array([True, True]), "x") == ((0, 0), ("True",))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.bool_])
def test_one_hot_labels_become_indices(dtype):
    assert encode_labels(np.eye(4, dtype=dtype)[[2, 0, 3]], "x") == ((2, 0, 3), None)
    assert encode_labels([torch.eye(3)[1], torch.eye(3)[0]], "x") == ((1, 0), None)


def test_numbers_beyond_64_bits_are_no_labels():
    assert encode_labels(["99999999999999999999", "1"], "x")[1] == ("1", "99999999999999999999")
    with pytest.raises(SourceError, match=r"x\.csv, column label has the label 1e\+20"):
        encode_labels([10**20], "x.csv, column label")
    with pytest.raises(SourceError, match="integers of 64 bits"):
        encode_labels([1e300], "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", ""], r"1 of 2 labels in x, column y are empty \(first: row 1\)"),
        (["a", None], "are empty"),
        ([1.0, math.nan], "are empty"),
        ([1, 2.5], r"labels such as 2\.5"),
        ([1.0, math.inf], "labels such as inf"),
        ([1, "1"], "integers and texts"),
        ([True, 1], "booleans and integers"),
        ([[1, 0], [1, 1]], r"label \[1, 1\] in row 1"),
        ([[0.3, 0.7]], r"one-hot"),
        ([[1, 0], [1, 0, 0]], "lists of 2 to 3 values"),
        ([[0, 1], 1], "integers and lists"),
        ([[], []], r"label \[\] in row 0"),
        ([{"a": 1}], "tables"),
        ([Decimal(1)], "Decimal"),
        ([["a", "b"]], r"label \[a, b\]"),
    ],
)
def test_other_labels_are_errors_that_name_the_column(values, message):
    with pytest.raises(SourceError, match=message) as caught:
        encode_labels(values, "x, column y")
    assert "x, column y" in str(caught.value)


@given(st.lists(st.text(min_size=1), min_size=1))
@example(["1", "01"])
@example(["-1", "-0"])
@example(["\u0661", "1"])
def test_any_texts_can_be_recovered_from_their_labels(texts):
    labels, names = encode_labels(texts, "x")
    recovered = [str(label) if names is None else decode_key(names[label]) for label in labels]
    assert recovered == [normalize_name(text) for text in texts]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_any_integers_of_64_bits_are_their_own_labels(values):
    assert encode_labels(values, "x") == (tuple(values), None)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


@given(st.lists(ANYTHING, min_size=1, max_size=5))
def test_whatever_is_no_label_is_an_error_that_names_the_column(values):
    try:
        labels, _ = encode_labels(values, "x, column y")
    except SourceError as error:
        message = str(error)
    else:
        message = "x, column y"
        assert len(labels) == len(values)
    assert "x, column y" in message


def test_class_names_are_compared_in_normal_form():
    assert encode_labels(["café", "cafe\u0301"], "x") == ((0, 0), ("café",))


def test_empty_groups_are_counted():
    with pytest.raises(SourceError, match=r"2 of 3 groups in x are empty \(first: row 1\)"):
        encode_groups(["a", None, math.nan], "x")
