"""Keys and names: the encoding is reversible for every text, and what is printed is harmless."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farout.core.csv_files import format_rows, read_csv, write_csv
from farout.core.errors import FaroutError
from farout.core.names import (
    decode_key,
    encode_cell,
    encode_key,
    expand_path,
    find_equivalent_name,
    find_equivalent_path,
    normalize_name,
    printable,
)

any_text = st.text(st.characters(exclude_categories=()))  # with lone surrogates
file_names = st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 47}).map(os.fsdecode)
HARMFUL = "\x00\t\n\r\x1b\x7f\x85\x9b\u2028\u2029\u202e\u2066\ufeff"


@given(st.one_of(any_text, file_names))
@example("\udcc3\udca9")  # bytes of an e with acute accent that did not come from a file name
@example("\udce2\udc80\udcae\u202e")
@example("\ud800%uD800%41%")
@example("\ud83d\ude00")
@example("\udced\udca0\udc80")
def test_keys_are_decoded_to_what_they_encode(text):
    key = encode_key(text)
    assert decode_key(key) == text
    key.encode("utf-8")
    assert not any(sign in key for sign in HARMFUL)
    assert key[:1] not in ("=", "+", "-", "@")
    assert len(key.splitlines()) <= 1


@given(any_text, any_text)
def test_different_texts_have_different_keys(first, second):
    assert (encode_key(first) == encode_key(second)) == (first == second)


@pytest.mark.parametrize(
    "name",
    ["a/b 1.png", "100%.png", "50% off.png", "café.png", "x=1.png", "a-b+c@d.png", "👨‍👩‍👧.png", "猫.png", " ", ""],
)
def test_usual_names_are_their_own_keys(name):
    assert encode_key(name) == name == decode_key(name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a\rb.png", "a%0Db.png"),
        (os.fsdecode(b"caf\xe9.png"), "caf%E9.png"),
        ("100%25.png", "100%2525.png"),
        ("=cmd|calc!A0.png", "%3Dcmd|calc!A0.png"),
        ("@SUM(1).png", "%40SUM(1).png"),
        ("a;=1.png", "a;%3D1.png"),
        ("\u202egnp.exe", "%E2%80%AEgnp.exe"),
    ],
)
def test_keys_show_what_was_encoded(name, key):
    assert encode_key(name) == key


@given(st.lists(st.one_of(any_text, file_names), min_size=1, max_size=5))
def test_keys_survive_csv_and_json(names):
    keys = [encode_key(name) for name in names]
    table = pd.DataFrame({"key": keys, "score": range(len(keys))}).to_csv(index=False, lineterminator="\n")
    read = pd.read_csv(io.StringIO(table), dtype={"key": str}, keep_default_na=False)
    assert [decode_key(key) for key in read["key"]] == names
    assert [row["key"] for row in csv.DictReader(io.StringIO(table, newline=""))] == keys
    assert json.loads(json.dumps(keys, ensure_ascii=False).encode()) == keys


@given(any_text)
def test_printed_text_is_harmless(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert not any(sign in shown for sign in HARMFUL)
    assert printable(shown) == shown


def test_printed_text_shows_control_characters():
    assert printable("\x1b[31mred\x07\u202e" + os.fsdecode(b"\xe9")) == r"\x1b[31mred\x07\u202e\xe9"
    assert printable("two\nlines\r", multiline=True) == "two\nlines\\x0d"
    assert printable(Path("é")) == "é"


def test_home_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand_path("~/x") == expand_path(Path("~/x")) == tmp_path / "x"
    assert expand_path("~") == tmp_path
    assert expand_path("a/~/x") == Path("a/~/x")
    assert expand_path("./x") == Path("x")
    assert expand_path("") == Path()
    for literal in ("./~/x", "~no-such-user-of-this-machine/x"):
        assert expand_path(literal) == expand_path(expand_path(literal)) == tmp_path / literal


def test_missing_home_is_an_error_only_where_it_is_used(monkeypatch):
    monkeypatch.setenv("HOME", "")
    assert expand_path("x") == Path("x")
    with pytest.raises(FaroutError, match="there is no home folder"):
        expand_path("~/x")


def test_names_match_in_either_normal_form(tmp_path):
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    assert normalize_name(decomposed) == composed
    assert find_equivalent_name(composed, ["a", decomposed]) == decomposed
    assert find_equivalent_name(decomposed, [decomposed, composed]) == decomposed
    assert find_equivalent_name("b", [decomposed]) is None
    (tmp_path / decomposed).mkdir()
    (tmp_path / decomposed / "é.png").touch()
    assert find_equivalent_path(tmp_path / composed / unicodedata.normalize("NFD", "é.png")).is_file()
    assert find_equivalent_path(tmp_path / composed / "x.png") == tmp_path / decomposed / "x.png"
    assert find_equivalent_path(tmp_path / "e" / "x.png") == tmp_path / "e" / "x.png"


@given(st.lists(any_text, min_size=1, max_size=4), st.floats(allow_nan=False, allow_infinity=False))
@example(["007"], 0.1)
@example(["NA", "nan", "", "None"], 1e-300)
@example(["1e5", "True", "1_0", "%41"], -0.30000000000000004)
@example(["\ud800"], 0.0)
def test_tables_are_read_back_as_they_were_written(tmp_path_factory, names, number):
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    keys = [encode_key(name) for name in names]
    count = len(names)
    texts = pd.Series(names, dtype=object)  # pandas' own type of texts refuses lone surrogates
    table = pd.DataFrame({"key": keys, "score": [number] * count, "is_ood": [True] * count, "text": texts})
    write_csv(table, path)
    read = read_csv(path, texts=("key", "text"))
    assert list(read["key"]) == keys
    assert [decode_key(key) for key in read["key"]] == names
    assert list(read["score"]) == [number] * count
    assert read["is_ood"].dtype == bool
    assert list(read["text"]) == [encode_cell(name) for name in names]
    assert path.read_bytes().count(b"\n") == 1 + count
    assert b"\r" not in path.read_bytes()
    appended = format_rows(list(table), table.to_dict("records"), header=True)
    assert appended.encode() == path.read_bytes()


def test_columns_become_numbers_only_if_all_their_cells_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("key,a,b,c,d,e\n1,1,1.5,True,x,1_0\n2,2,NA,,1,10\n", encoding="utf-8")
    table = read_csv(path)
    assert list(table["key"]) == ["1", "2"]
    assert table["a"].dtype == "int64"
    assert table["b"].isna().tolist() == [False, True]
    assert table["c"].tolist()[0] is True
    assert list(table["d"]) == ["x", "1"]
    assert list(table["e"]) == ["1_0", "10"]


@given(any_text)
def test_cells_are_encoded_once(text):
    cell = encode_cell(text)
    assert encode_cell(cell) == cell == encode_cell(encode_cell(cell))
    assert encode_cell(encode_key(text)) == encode_key(text)
    assert cell[:1] not in ("=", "+", "-", "@")
