"""Zip files and tar archives: the images of a folder, without extracting anything."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farout.core.errors import LeftOutWarning, SourceError
from farout.core.names import decode_key
from farout.data.image_source import ImageSource
from farout.data.normal_images import check_one_set
from farout.data.read_settings import ReadSettings
from farout.data.sources import open_source
from image_files import encode, picture, pixels

IMAGES = [encode(picture(image), "PNG") for image in pixels(8)]
TREE = {"cat/1.png": IMAGES[0], "cat/2.png": IMAGES[1], "dog/1.png": IMAGES[2]}


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write(path: Path, members: dict[str, bytes]) -> Path:
    return write_zip(path, members) if path.suffix.lower() == ".zip" else write_tar(path, members)


def open_all(source: object, reading: ReadSettings | None = None) -> ImageSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_source(source, policy="nan", reading=reading or ReadSettings())
        opened.content_hashes()
    return opened


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "X.ZIP"])
def test_an_archive_has_the_keys_labels_and_pixels_of_its_folder(tmp_path, name):
    path = write(
        tmp_path / name, {**{f"./{key}": data for key, data in TREE.items()}, "notes.txt": b"x", ".x.png": b""}
    )
    with pytest.warns(LeftOutWarning, match=r": 1 \.txt"):
        source = open_source(path)
    assert source.keys == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert source.class_names == ("cat", "dog")
    assert source.groups == ("cat", "cat", "dog")
    assert torch.equal(torch.stack(list(source)), pixels(8)[:3])
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  # as a worker process receives it
    assert torch.equal(again[2], pixels(8)[2])
    assert len(open_source(f"{path}@classes=dog")) == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_of_zip(tmp_path, method):
    source = open_all(write_zip(tmp_path / "x.zip", TREE, method))
    assert torch.equal(source[1], pixels(8)[1])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar(tmp_path, form):
    members = {"cat/" + "long" * 20 + ".png": IMAGES[0], "dog/1.png": IMAGES[1]}
    source = open_all(write_tar(tmp_path / "x.tar", members, form))
    assert not source.unreadable
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_labels_of_webdataset_samples(tmp_path, suffix):
    members = {}
    for number, label in enumerate(("7", "3", "7")):
        members |= {f"s/{number:03d}.png": IMAGES[number], f"s/{number:03d}.cls": label.encode()}
        members[f"s/{number:03d}.json"] = b'{"label": 99}'
    source = open_all(write(tmp_path / f"a{suffix}", members))
    assert source.labels == (7, 3, 7)
    assert source.left_out == {".json": 3}
    tables = {name: data for name, data in members.items() if not name.endswith(".cls")}
    for number, label in enumerate(("cat", "dog", "cat")):
        tables[f"s/{number:03d}.json"] = json.dumps({"width": 8, "label": label}).encode()
    source = open_all(write(tmp_path / f"b{suffix}", tables))
    assert source.class_names == ("cat", "dog")
    assert source.labels == (0, 1, 0)
    assert not source.left_out
    del members["s/001.cls"]
    with pytest.raises(SourceError, match="1 of 3 labels"):
        open_source(write(tmp_path / f"c{suffix}", members))
    members["s/001.cls"] = b"\xff\xfe"
    with pytest.raises(SourceError, match=r"the label in s/001\.cls cannot be read"):
        open_source(write(tmp_path / f"d{suffix}", members))
    tables["s/001.json"] = b"{"
    with pytest.raises(SourceError, match=r"the label in s/001\.json cannot be read"):
        open_source(write(tmp_path / f"e{suffix}", tables))
    tables = {f"{number}.png": IMAGES[number] for number in range(3)} | {"1.json": b"[]", "2.json": b"{}"}
    source = open_all(write(tmp_path / f"f{suffix}", tables))
    assert source.labels is None
    assert source.left_out == {".json": 2}


def test_shards_are_given_by_glob_braces_or_folder(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"train-{shard:03d}.tar", {"0.png": IMAGES[shard], "0.cls": str(shard % 2).encode()})
    (tmp_path / "index.txt").write_text("x")
    keys = tuple(f"train-{shard:03d}.tar/0.png" for shard in range(4))
    for text in (f"{tmp_path}/train-*.tar", f"{tmp_path}/train-{{000..003}}.tar", str(tmp_path), f"{tmp_path}/*"):
        source = open_all(text)
        assert source.keys == keys
        assert source.labels == (0, 1, 0, 1)
        assert source.groups == tuple(key.partition("/")[0] for key in keys)
        assert torch.equal(source[3], pixels(8)[3])
    assert open_all(tmp_path).left_out == {".txt": 1}
    with pytest.raises(SourceError, match=r"train-004\.tar, which is part of .*, does not exist"):
        open_source(f"{tmp_path}/train-{{000..004}}.tar")
    (tmp_path / "sub").mkdir()
    write_zip(tmp_path / "sub" / "more.zip", TREE)
    with pytest.raises(SourceError, match="3 of 7 labels"):
        open_source(tmp_path)
    (tmp_path / "sub" / "deep").mkdir()
    write_tar(tmp_path / "sub" / "deep" / "more.tar", TREE)
    source = open_all(tmp_path / "sub")
    assert source.keys[:2] == ("deep/more.tar/cat/1.png", "deep/more.tar/cat/2.png")
    assert source.class_names == ("cat", "dog")
    assert len(source) == 6


def test_shards_of_several_splits_are_no_normal_images(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar", "other.tar"):
        write_tar(tmp_path / name, TREE)
    with pytest.raises(SourceError, match=r"splits \(train, val\); give one of them, such as '.*/train\*\.tar'"):
        check_one_set(open_all(tmp_path))
    check_one_set(open_all(f"{tmp_path}/train*.tar"))


def test_braces_need_no_separator(tmp_path, monkeypatch):
    for shard in range(2):
        write_tar(tmp_path / f"s-{shard}.tar", {"0.png": IMAGES[shard]})
    monkeypatch.chdir(tmp_path)
    assert len(open_all("s-{0..1}.tar")) == 2
    assert len(open_all("s-{0,1}.tar@vflip")) == 2


def test_an_archive_next_to_images_is_counted(tmp_path):
    write_zip(tmp_path / "x.zip", TREE)
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    source = open_all(tmp_path)
    assert source.keys == ("a.png",)
    assert source.left_out == {".zip": 1}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_hostile_names_are_only_keys(tmp_path, suffix):
    names = [
        "../../evil.png",
        "/etc/passwd.png",
        "a/../../b.png",
        "%2E%2E/c.png",
        "=cmd|x.png",
        "a\x1b[2J.png",
        "~/d.png",
    ]
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    source = open_all(write(folder / f"x{suffix}", dict.fromkeys(names, IMAGES[0])))
    assert not source.unreadable
    assert sorted(map(decode_key, source.keys)) == sorted(names)
    for key in source.keys:
        assert (tmp_path / "out" / key).resolve().is_relative_to(tmp_path / "out"), key
        assert "\x1b" not in key
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "side", f"x{suffix}"], "nothing is extracted"


def test_links_in_a_tar_stay_in_it(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGES[5])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        entry = tarfile.TarInfo("a/1.png")
        entry.size = len(IMAGES[0])
        archive.addfile(entry, io.BytesIO(IMAGES[0]))
        for name, kind, target in (
            ("hard.png", tarfile.LNKTYPE, "a/1.png"),
            ("a/soft.png", tarfile.SYMTYPE, "1.png"),
            ("out.png", tarfile.SYMTYPE, str(secret)),
            ("up.png", tarfile.SYMTYPE, "../secret.png"),
            ("self.png", tarfile.SYMTYPE, "self.png"),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("device.png", tarfile.CHRTYPE, ""),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    source = open_all(tmp_path / "x.tar")
    assert set(source.unreadable) == {"out.png", "up.png", "self.png", "pipe.png", "device.png"}
    assert "not in the archive" in source.unreadable["out.png"]
    assert "not a regular file" in source.unreadable["pipe.png"]
    assert source.content_hash(source.keys.index("hard.png")) == source.content_hash(source.keys.index("a/1.png"))
    assert source.content_hash(source.keys.index("a/soft.png")) == source.content_hash(source.keys.index("a/1.png"))


FOLDERS = st.sampled_from(["", ".", "..", "a", "cat", "é", "=x", "a\r", "@eaDir", ".h", "%41", "#"])
STEMS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\"), min_size=1, max_size=6)
SUFFIXES = st.sampled_from([".png", ".PNG", ".txt", ".zip", "", ".heic.bak"])
NAMES = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]), st.lists(FOLDERS, max_size=3), STEMS, SUFFIXES
)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True))
def test_every_member_is_an_image_hidden_or_counted(suffix, names):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"x{suffix}", {**dict.fromkeys(names, IMAGES[0]), "last.png": IMAGES[1]})
        source = open_all(path)
        keys = list(map(decode_key, source.keys))
        assert len(keys) == len(set(keys))
        for key in source.keys:
            assert (Path("/out") / key).resolve().is_relative_to("/out"), key
            assert key == key.strip("\r\n")
        parts = [[part for part in name.split("/") if part not in ("", ".", "..")] for name in {*names, "last.png"}]
        hidden = sum("@eaDir" not in part[:-1] and any(name.startswith(".") for name in part) for part in parts if part)
        assert len(keys) + sum(source.left_out.values()) + hidden == len({*names, "last.png"})
        assert not source.unreadable


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_sizes_are_limited_by_the_header(tmp_path, suffix):
    members = {"bomb.png": b"\0" * 3_000_000, "a.png": IMAGES[0]}
    source = open_all(write(tmp_path / f"x{suffix}", members), ReadSettings(max_bytes=100_000))
    assert source.unreadable == {"bomb.png": "the member has 3000000 bytes, and the limit is 100000 (--max-bytes)"}


def test_a_zip_header_that_lies_is_one_unreadable_image(tmp_path):
    data = write_zip(tmp_path / "x.zip", {"bomb.png": b"\0" * 3_000_000, "a.png": IMAGES[0]}).read_bytes()
    # both headers announce 100 bytes
    (tmp_path / "x.zip").write_bytes(data.replace((3_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    assert set(open_all(tmp_path / "x.zip").unreadable) == {"bomb.png"}
    start = data.index(b"a.png") + 5
    (tmp_path / "x.zip").write_bytes(data[:start] + bytes(20) + data[start + 20 :])
    assert open_all(tmp_path / "x.zip").unreadable["a.png"]


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "x.tar", TREE).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in (0, 100, 512, 600, 1024, 1536, end - 10, end // 512 * 512, 6 * 512):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"complete"):
            open_source(tmp_path / "x.tar")
    broken = bytearray(whole)
    broken[1024 : 1024 + 300] = bytes(range(1, 151)) * 2  # the header of the second member
    (tmp_path / "x.tar").write_bytes(broken)
    with pytest.raises(SourceError, match="incomplete or damaged at byte 1024"):
        open_source(tmp_path / "x.tar")
    loop = bytearray(whole)  # a size below 0 leads back to the same header
    loop[1024 + 124 : 1024 + 136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    header = loop[1024:1536]
    loop[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    (tmp_path / "x.tar").write_bytes(loop)
    with pytest.raises(SourceError, match=r"is damaged: cat/2\.png has -1024 bytes"):
        open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole + whole)
    with pytest.raises(SourceError, match="data after its end"):
        open_source(tmp_path / "x.tar")


def test_archives_that_cannot_be_read_say_why(tmp_path):
    whole = write_zip(tmp_path / "x.zip", TREE).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "x.zip").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cannot be read as a zip file .*is it complete"):
            open_source(tmp_path / "x.zip")
    (tmp_path / "x.zip").write_bytes(IMAGES[0])
    with pytest.raises(SourceError, match="cannot be read as a zip file"):
        open_source(tmp_path / "x.zip")
    encrypted = bytearray(whole)
    for signature, position in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := whole.find(signature, start + 1)) >= 0:
            encrypted[start + position] |= 1
    (tmp_path / "x.zip").write_bytes(encrypted)
    with pytest.raises(SourceError, match=r"is encrypted \(3 of 3 files\)"):
        open_source(tmp_path / "x.zip")
    for name in ("x.tar.gz", "x.tgz", "y.tar"):
        (tmp_path / name).write_bytes(gzip.compress(write_tar(tmp_path / "z.tar", TREE).read_bytes()))
        with pytest.raises(SourceError, match=r"compressed as a whole.*gunzip"):
            open_source(tmp_path / name)
    write_tar(tmp_path / "really.zip", TREE)
    assert open_all(tmp_path / "really.zip").class_names == ("cat", "dog"), "recognized by its content"
    write_zip(tmp_path / "really.tar", TREE)
    assert open_all(tmp_path / "really.tar").class_names == ("cat", "dog")
    (tmp_path / "z.tar").write_bytes(IMAGES[0] * 20)
    with pytest.raises(SourceError, match="cannot be read as a tar archive"):
        open_source(tmp_path / "z.tar")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_without_images_says_what_it_contains(tmp_path, suffix):
    with pytest.raises(SourceError, match="contains no images, but nothing"):
        open_source(write(tmp_path / f"a{suffix}", {}))
    nested = {"a.zip": b"x", "b.zip": b"x", "n.txt": b"x"}
    with pytest.raises(SourceError, match=r"no images, but 2 \.zip, 1 \.txt; archives in archives are not read"):
        open_source(write(tmp_path / f"b{suffix}", nested))
    assert open_all(write(tmp_path / f"c{suffix}", nested | {"x.png": IMAGES[0]})).left_out == {".zip": 2, ".txt": 1}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_folders_in_archives_mean_what_folders_mean(tmp_path, suffix):
    tree = dict.fromkeys(("b/train/good/0.png", "b/test/bent/0.png", "b/ground_truth/bent/0.png"), IMAGES[0])
    source = open_all(write(tmp_path / f"a{suffix}", {**tree, "__MACOSX/._0.png": b"x", "b/.DS_Store": b"x"}))
    assert source.left_out == {"in ground_truth/ (masks)": 1, "in __MACOSX": 1}
    with pytest.raises(SourceError, match="train/good"):
        check_one_set(source)


def test_the_last_of_several_members_of_a_name_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for data in IMAGES[:3]:
            entry = tarfile.TarInfo("a.png")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    source = open_all(tmp_path / "x.tar")
    assert torch.equal(source[0], pixels(8)[2])
    assert source.left_out == {"replaced by a later member of the same name": 2}


def test_a_zip_with_separators_of_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in TREE.items():
            entry = zipfile.ZipInfo("placeholder")
            entry.filename, entry.create_system = name.replace("/", "\\"), 0
            archive.writestr(entry, data)
    assert open_all(tmp_path / "x.zip").class_names == ("cat", "dog")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_frames_of_a_member_are_images_on_request(tmp_path, suffix):
    frames = [picture(image) for image in pixels(3)]
    stack = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    path = write(tmp_path / f"x{suffix}", {"cat/stack.tif": stack, "dog/1.png": IMAGES[3]})
    assert len(open_all(path)) == 2
    assert open_all(path).further_frames == {"cat/stack.tif": 2}
    source = open_all(path, ReadSettings(frames="all"))
    assert source.keys == ("cat/stack.tif#0", "cat/stack.tif#1", "cat/stack.tif#2", "dog/1.png")
    assert source.labels == (0, 0, 0, 1)
    assert source.groups == ("cat/stack.tif",) * 3 + ("dog",)
    assert torch.equal(torch.stack(list(source)), pixels(4))
    assert not source.further_frames
