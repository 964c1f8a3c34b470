"""Lists of image files: csv in every dialect, jsonl, plain lines, with labels, groups and keys."""

from __future__ import annotations

import csv
import json
import os
import sys
import warnings
from pathlib import PurePosixPath

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farout.core.errors import LeftOutWarning, SourceError, SourceWarning, UnreadableImageError
from farout.core.names import decode_key, normalize_name
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from image_files import picture, pixels, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, pixels(3), ["a.png", "b c.png", "d/é.png"])


def open_text(folder, text, name="list.csv", suffix="", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return open_source(f"{folder / name}{suffix}")


def named_labels(source):
    return None if source.labels is None else [source.class_names[label] for label in source.labels]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_in_usual_encodings(folder, encoding, end):
    source = open_text(folder, end.join(["path,label", "a.png,x", "d/é.png,ö", ""]), encoding=encoding)
    assert source.keys == ("a.png", "d/é.png")
    assert named_labels(source) == ["x", "ö"]
    assert torch.equal(source[1], pixels(3)[2])


@pytest.mark.parametrize(
    ("name", "separator"),
    [("l.csv", ";"), ("l.csv", "\t"), ("l.csv", "|"), ("l.tsv", "\t"), ("l.tsv", ","), ("l.TSV", "\t")],
)
def test_other_separators_are_found_in_the_header(folder, name, separator):
    lines = [["path", "label"], ["a.png", "x"], ['"b c.png"', "y"]]
    source = open_text(folder, "\n".join(separator.join(line) for line in lines), name)
    assert source.keys == ("a.png", "b c.png")
    assert named_labels(source) == ["x", "y"]


def test_the_separator_line_of_spreadsheets_is_used(folder):
    assert open_text(folder, "sep=;\npath;label\na.png;1,5\n").class_names == ("1,5",)


@pytest.mark.parametrize(
    "header",
    [
        "path, label",
        "Path,Label",
        "FILE NAME,Class",
        "filename,target",
        "image,y",
        "filepath,category",
        "file,class_name",
    ],
)
def test_usual_column_names_are_recognized(folder, header):
    separator = ", " if ", " in header else ","
    source = open_text(folder, f"{header}\na.png{separator}01\nb c.png{separator}1\n")
    assert named_labels(source) == ["01", "1"]


def test_spaces_after_separators_are_kept_unless_the_header_has_them(folder):
    assert open_text(folder, "path,label\na.png, 1\nb c.png,1\n").class_names == (" 1", "1")
    assert open_text(folder, "path, label\na.png, 1\nb c.png, 1\n").labels == (1, 1)


def test_quoted_cells_may_contain_line_ends_and_quotes(folder):
    source = open_text(folder, 'path,label,note\na.png,x,"two\nlines, ""quoted"""\nb c.png,y,\n')
    assert named_labels(source) == ["x", "y"]


def test_paths_are_absolute_in_the_home_folder_or_of_windows(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    source = open_text(folder, f"path\n{folder}/a.png\n~/b c.png\nd\\é.png\n./a.png\n")
    assert source.keys[2:] == ("d/é.png", "a.png")
    assert [torch.equal(source[i], pixels(3)[j]) for i, j in enumerate([0, 1, 2, 0])] == [True] * 4


@pytest.mark.skipif(os.name == "nt", reason="a separator there")
def test_a_backslash_in_a_file_name_is_kept_where_the_file_exists(folder):
    (folder / "a.png").rename(folder / "a\\1.png")
    source = open_text(folder, "path\na\\1.png\n")
    assert torch.equal(source[0], pixels(3)[0])
    assert source.keys == ("a\\1.png",)


def test_a_missing_file_is_one_unreadable_image(folder):
    source = open_text(folder, "path,label\na.png,x\nnowhere.png,x\n")
    assert torch.equal(source[0], pixels(3)[0])
    with pytest.raises(UnreadableImageError, match=r"^nowhere\.png: No such file"):
        source[1]


def test_a_key_column_next_to_the_paths_gives_the_keys(folder):
    assert open_text(folder, "key,path\n7,a.png\n=x,b c.png\n").keys == ("7", "%3Dx")
    assert open_text(folder, "key,path\n%3Dx,a.png\n").keys == ("%3Dx",)
    with pytest.raises(SourceError, match=r"list\.csv, column key has 1 keys more than once \(first: '7'\)"):
        open_text(folder, "key,path\n7,a.png\n7,b c.png\n")
    with pytest.raises(SourceError, match=r"column key contains '' in row 1"):
        open_text(folder, "key,path\n7,a.png\n,b c.png\n")


def test_a_table_of_keys_names_files_as_farout_writes_them(folder):
    (folder / "a.png").rename(folder / "=a.png")
    source = open_text(folder, "key,score\n%3Da.png,1\n")
    assert source.keys == ("%3Da.png",)
    assert torch.equal(source[0], pixels(3)[0])


def test_several_columns_of_labels_are_used_in_a_stated_order(folder):
    text = "path,class,label,shape\na.png,c,l,s\n"
    with pytest.warns(SourceWarning, match=r"several columns of labels: label, class; label is used"):
        assert open_text(folder, text).class_names == ("l",)
    assert open_text(folder, text, suffix="@label=class").class_names == ("c",)
    assert open_text(folder, text, suffix="@label=Shape,vflip").class_names == ("s",)
    with pytest.raises(SourceError, match=r"no column 'color' \(@label=color\); its columns are class, label, shape"):
        open_text(folder, text, suffix="@label=color")


def test_unknown_columns_are_named_once(folder):
    with pytest.warns(
        SourceWarning, match=r"no labels: none of the columns kind, size is called label, .* @label=kind"
    ) as seen:
        assert open_text(folder, "path,kind,size\na.png,x,1\n").labels is None
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_text(folder, "path,group\na.png,x\n")


def test_the_column_of_paths_can_be_named(folder):
    source = open_text(folder, "left,right,label\na.png,b c.png,x\n", suffix="@column=right")
    assert source.keys == ("b c.png",)
    with pytest.raises(SourceError, match=r"columns left, right, label; expected one named path.*@column=left"):
        open_text(folder, "left,right,label\na.png,b c.png,x\n")
    with pytest.raises(SourceError, match="a list of image files, for which @array=x has no meaning"):
        open_text(folder, "path\na.png\n", suffix="@array=x")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("path,label\ra.png,x\rb c.png,y\r", ("a.png", "b c.png")),
        ("path ;label\na.png ;x\n b c.png;y\n", ("a.png", "b c.png")),
        (",path,label\n0,a.png,x\n1,b c.png,y\n", ("a.png", "b c.png")),
    ],
)
def test_tables_of_other_programs(folder, text, keys):
    source = open_text(folder, text)
    assert source.keys == keys
    assert torch.equal(source[1], pixels(3)[1])
    assert named_labels(source) == ["x", "y"]


def test_a_missing_header_is_explained(folder):
    with pytest.raises(SourceError, match="the first line must contain the names of the columns"):
        open_text(folder, "a.png,x\nb c.png,y\n")
    with pytest.raises(SourceError, match=r"c15, and 34 more; expected one named path"):
        open_text(folder, ",".join(f"c{i}" for i in range(50)) + "\n" + "x," * 49 + "x\n")


def test_groups_have_usual_names_too(folder):
    assert open_text(folder, "path,patient\na.png,p1\nb c.png,p2\n").groups == ("p1", "p2")
    with pytest.raises(SourceError, match=r"1 of 2 groups in .*list\.csv, column group"):
        open_text(folder, "path,group\na.png,p1\nb c.png,\n")
    with pytest.warns(SourceWarning, match="column video are empty .* not used as the group"):
        assert open_text(folder, "path,video\na.png,p1\nb c.png,\n").groups is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,x\na.png,y\n", "more than once"),
        ("path,label\na.png,1\nb c.png,\n", r"1 of 2 labels in .*list\.csv, column label"),
        ("path,label\na.png,1.5,2\n", "3 values up to line 2 and 2 columns"),
        ('path,label\n"a.png,1\nb c.png,2\n', "cannot be read as csv"),
        ("path,label,label\na.png,1,2\n", "several columns called label"),
        ("path,label\n,1\n", "column path is empty in row 0"),
        ("", "lists no images"),
        ("\n\n", "lists no images"),
        ("path,label\n", "lists no images"),
    ],
)
def test_mistakes_in_csv_are_named(folder, text, message):
    with pytest.raises(SourceError, match=message):
        open_text(folder, text)


def test_empty_rows_and_separators_at_the_end_of_rows_are_no_images(folder):
    assert open_text(folder, "path,label\na.png,x,\n\n,,\nb c.png,y,,\n,\n").keys == ("a.png", "b c.png")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_labels_that_are_not_utf8_are_an_error_and_paths_are_not(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_folder(tmp_path, pixels(1), [name])
    (tmp_path / "a.csv").write_bytes(b"path,label\ncaf\xe9.png,x\n")
    source = open_source(tmp_path / "a.csv")
    assert source.keys == ("caf%E9.png",)
    assert torch.equal(source[0], pixels(1)[0])
    (tmp_path / "b.csv").write_bytes(b"path,label\na.png,caf\xe9\n")
    with pytest.raises(SourceError, match=r"b\.csv is not UTF-8 text"):
        open_source(tmp_path / "b.csv")


@pytest.mark.parametrize("name", ["metadata.jsonl", "x.ndjson"])
def test_json_lines(folder, name):
    rows = [{"file_name": "a.png", "label": "01"}, {"label": "1", "file_name": "d/é.png", "text": {"a": [1]}}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_text(folder, "\n".join(map(json.dumps, rows)) + "\n\n", name)
    assert source.keys == ("a.png", "d/é.png")
    assert named_labels(source) == ["01", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.png"}\n{"path": \n', r"line 2 cannot be read as JSON"),
        ('["a.png"]\n', "line 1 contains a list"),
        ('{"path": 3}\n', "column path is a int in row 0"),
        (
            '{"path": "a.png", "label": 1}\n{"path": "b c.png"}\n',
            r"1 of 2 labels .* column label are empty \(first: row 1\)",
        ),
        ('{"path": "a.png", "label": 1}\n{"path": "b c.png", "label": "1"}\n', "integers and texts"),
        ("[" * 100000, "line 1 cannot be read as JSON"),
        ("\n", "lists no images"),
    ],
)
def test_mistakes_in_json_lines_are_named(folder, text, message):
    with pytest.raises(SourceError, match=message):
        open_text(folder, text, "x.jsonl")


def test_lists_of_openood_are_relative_to_their_data_folder(tmp_path):
    write_folder(tmp_path / "data" / "images_classic", pixels(2), ["cifar10/test/cat/1.png", "cifar10/test/dog/2.png"])
    lists = tmp_path / "data" / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    source = open_text(lists, "cifar10/test/cat/1.png 3\ncifar10/test/dog/2.png 5\n", "test_cifar10.txt")
    assert source.labels == (3, 5)
    assert source.keys == ("cifar10/test/cat/1.png", "cifar10/test/dog/2.png")
    assert torch.equal(source[1], pixels(2)[1])
    source = open_text(lists, "cifar10/gone.png 3\ncifar10/test/dog/2.png 5\n", "first_gone.txt")
    assert torch.equal(source[1], pixels(2)[1])
    with pytest.raises(UnreadableImageError, match=r"^cifar10/gone\.png: No such file"):
        source[0]
    with pytest.warns(SourceWarning, match="all labels are -1"):
        assert open_text(lists, "cifar10/test/cat/1.png -1\n", "test_ood.txt").labels is None


def test_plain_lists_of_paths(folder):
    assert open_text(folder, "a.png\nb c.png\n\n", "files.txt").keys == ("a.png", "b c.png")
    with pytest.raises(SourceError, match=r"with and without a label \(line 2"):
        open_text(folder, "a.png 1\nb c.png\n", "files.txt")
    with pytest.raises(SourceError, match=r"first listed files, Read me first\., …, exist neither"):
        open_text(folder, "Read me first.\n", "README.txt")
    with pytest.raises(SourceError, match="lists no images"):
        open_text(folder, "\n", "files.txt")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_in_a_folder_labels_its_images(folder, name):
    rows = [("b c.png", "dog"), ("d/é.png", "cat"), ("gone.png", "cat")]
    table = "\n".join(["file_name,label", *(f"{path},{label}" for path, label in rows)])
    lines = "\n".join(json.dumps({"file_name": path, "label": label}) for path, label in rows)
    (folder / name).write_text(lines if name.endswith("jsonl") else table, encoding="utf-8")
    (folder / "notes.txt").touch()
    with pytest.warns(LeftOutWarning, match=rf"1 \.txt, 1 image\(s\) that {name} does not list|does not list, 1 \.txt"):
        source = open_source(folder)
    assert source.keys == ("b c.png", "d/é.png", "gone.png")
    assert named_labels(source) == ["dog", "cat", "cat"]
    assert torch.equal(source[1], pixels(3)[2])
    with pytest.raises(UnreadableImageError, match=r"^gone\.png"):
        source[2]


def test_metadata_without_labels_leaves_the_class_folders(tmp_path):
    write_folder(tmp_path, pixels(3), ["a/1.png", "a/2.png", "b/3.png"])
    (tmp_path / "metadata.csv").write_text("file_name,caption\na/1.png,x\nb/3.png,y\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(tmp_path)
    assert named_labels(source) == ["a", "b"]


def test_other_tables_called_metadata_are_counted(folder):
    (folder / "metadata.csv").write_text("camera,date\nx,2026\n")
    with pytest.warns(LeftOutWarning, match=r"1 \.csv"):
        assert len(open_source(folder)) == 3
    (folder / "metadata.csv").write_text("file_name\na.png\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(SourceError, match=r"contains metadata\.csv and metadata\.jsonl; keep one"):
        open_source(folder)


def test_damaged_metadata_is_an_error_and_another_label_can_be_named(folder):
    (folder / "metadata.csv").write_text('file_name,label\n"a.png,x\n')
    with pytest.raises(SourceError, match=r"metadata\.csv cannot be read as csv"):
        open_source(folder)
    (folder / "metadata.csv").write_text(
        "file_name,label,kind\na.png,x,1\nb c.png,x,2\nd/é.png,y,2\n", encoding="utf-8"
    )
    assert open_source(f"{folder}@label=kind").labels == (1, 2, 2)
    with pytest.raises(SourceError, match=r"a folder of image files with metadata\.csv, for which @column=x"):
        open_source(f"{folder}@column=x")


def test_all_frames_of_listed_files(folder):
    frames = [picture(image) for image in pixels(3, seed=4)]
    frames[0].save(folder / "s.tif", save_all=True, append_images=frames[1:])
    (folder / "list.csv").write_text("path,label\ns.tif,x\na.png,y\n")
    source = open_source(folder / "list.csv", reading=ReadSettings(frames="all"))
    assert source.keys == ("s.tif#0", "s.tif#1", "s.tif#2", "a.png")
    assert named_labels(source) == ["x", "x", "x", "y"]
    assert torch.equal(source[2], pixels(3, seed=4)[2])


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5, unique_by=lambda row: str(PurePosixPath(row[0]))),
    separator=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_table_that_csv_writes_is_read_as_it_is(tmp_path, rows, separator, encoding, quoting):
    with (tmp_path / "x.csv").open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting)
        writer.writerows([("path", "label"), *rows])
    try:
        source = open_source(tmp_path / "x.csv")
    except SourceError as error:  # two spellings of one file
        assert "more than once" in str(error)  # noqa: PT017
        return
    assert len(source) == len(rows)
    names = [str(label) if source.class_names is None else source.class_names[label] for label in source.labels]
    assert [decode_key(name) for name in names] == [normalize_name(label) for _, label in rows]
