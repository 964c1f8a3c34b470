"""Folders and globs: every file that is not hidden is an image, unreadable with a reason, or counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

from farout.core.errors import LeftOutWarning, MisleadingResultWarning, SourceError, UnreadableImageError
from farout.core.names import decode_key
from farout.core.store import write_config
from farout.data.folder_layout import class_labels_of, describe_splits, find_masks
from farout.data.folder_scan import expand_braces
from farout.data.image_source import ImageSource
from farout.data.normal_images import check_normal_images, check_one_set
from farout.data.sources import open_source
from image_files import pixels, write_folder


def write(root: Path, *names: str) -> Path:
    """Images of different content, where the suffix is that of an image; other files contain a text."""
    images = [name for name in names if name.endswith((".png", ".jpg", ".bmp"))]
    write_folder(root, pixels(len(images)), images)
    for name in names:
        if name not in images:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("not an image")
    return root


def open_all(source: object) -> ImageSource:
    """Open a source without warnings and read every image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_source(source, policy="nan")
        opened.content_hashes()
    return opened


def test_what_is_not_listed_is_counted_by_suffix_and_named_in_one_warning(tmp_path):
    write(tmp_path, "a.png", "b.PNG", "c.xyz", "deep/d.xyz", "notes.TXT", "README", "x.", ".hidden.png", "d.tar.gz")
    with pytest.warns(LeftOutWarning) as caught:
        source = open_source(tmp_path)
    assert source.keys == ("a.png", "b.PNG")
    assert source.left_out == {".xyz": 2, "without suffix": 2, ".gz": 1, ".txt": 1}
    assert [str(w.message) for w in caught] == [f"left out of {tmp_path}: 2 .xyz, 2 without suffix, 1 .gz, 1 .txt"]


def test_formats_of_extras_are_counted_with_the_extra_that_reads_them(tmp_path, monkeypatch):
    from farout.data import decoding, file_names

    without = frozenset(suffix for suffix in decoding.image_suffixes() if suffix not in decoding.EXTRA_OF_SUFFIX)
    monkeypatch.setattr(file_names, "image_suffixes", lambda: without)
    write(tmp_path, *(f"{i}.png" for i in range(5)), *(f"{i}.heic" for i in range(25)), "ct.dcm", "light.exr")
    source = open_all(tmp_path)
    assert len(source) == 5
    assert source.left_out == {
        ".heic (install farout[heic])": 25,
        ".dcm (install farout[dicom])": 1,
        ".exr (install farout[exr])": 1,
    }
    heic = write(tmp_path / "heic", "1.heic", "2.heic")
    with pytest.raises(SourceError, match=r"contains no images; it contains 2 \.heic \(install farout\[heic\]\)"):
        open_source(heic)


def test_suffixes_without_end_do_not_fill_the_message(tmp_path):
    write(tmp_path, "a.png", *(f"scan.{i:04d}" for i in range(300)), *("t.txt", "u.txt"), "weird.a b\x1bc")
    source = open_all(tmp_path)
    assert len(source.left_out) <= 22
    assert source.left_out[".txt"] == 2
    assert sum(source.left_out.values()) == 303
    assert "\x1b" not in "".join(source.left_out)


def test_system_folders_are_counted_and_do_not_disturb_the_classes(tmp_path):
    write(
        tmp_path,
        "cat/1.png",
        "dog/1.png",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.png",
        "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.png",
        "$RECYCLE.BIN/x.png",
        "lost+found/x.png",
        "__MACOSX/cat/1.png",
        "System Volume Information/IndexerVolumeGuid",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "#recycle/old.png",
        "Thumbs.db",
        "dog/desktop.ini",
    )
    source = open_all(tmp_path)
    assert source.keys == ("cat/1.png", "dog/1.png")
    assert source.class_names == ("cat", "dog")
    assert source.left_out == {
        "in @eaDir": 2,
        "in $RECYCLE.BIN": 1,
        "in lost+found": 1,
        "in __MACOSX": 1,
        "in System Volume Information": 1,
        "in .ipynb_checkpoints": 1,
        "in #recycle": 1,
        ".db": 1,
        ".ini": 1,
    }
    assert open_all(f"{tmp_path}/**/*.png").keys == ("cat/1.png", "dog/1.png")
    with pytest.raises(SourceError, match=r"matches no images, but 1 in \$RECYCLE\.BIN, 1 in lost\+found"):
        open_source(f"{tmp_path}/*/x.png")
    assert open_all(f"{tmp_path}/lost+found/*.png").keys == ("x.png",), "named by the user"
    assert open_all(tmp_path / "lost+found").keys == ("x.png",)


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    root, far = write(tmp_path / "set", "cat/1.png"), write(tmp_path / "far", "2.png", "more/3.png")
    (root / "dog").symlink_to(far)
    (root / "cat" / "loop").symlink_to(root)
    (far / "self").symlink_to(".")
    (far / "up").symlink_to("..")
    (root / "again").symlink_to("cat")
    source = open_all(root)
    assert source.keys == ("cat/1.png", "dog/2.png", "dog/more/3.png")
    assert not source.unreadable
    assert source.left_out == {"link(s) to folders that are listed already": 4}
    (far / "more" / "3.png").unlink()
    assert open_all(root).class_names == ("cat", "dog")
    assert open_all(f"{root}/**/*.png").keys == ("cat/1.png", "dog/2.png")


def test_links_that_lead_nowhere_are_unreadable(tmp_path):
    root = write(tmp_path, "cat/1.png", "dog/2.png")
    (root / "cat" / "gone.png").symlink_to("/nowhere/x.png")
    (root / "cat" / "circle.png").symlink_to("circle.png")
    (root / "bird").symlink_to("/nowhere/bird")
    (root / "notes.txt").symlink_to("/nowhere/notes.txt")
    source = open_all(root)
    assert source.keys == ("bird/", "cat/1.png", "cat/circle.png", "cat/gone.png", "dog/2.png")
    assert source.class_names == ("bird", "cat", "dog")
    assert source.left_out == {".txt": 1}
    assert source.unreadable["cat/gone.png"].startswith("a link to /nowhere/x.png, which cannot be followed: No such")
    assert set(source.unreadable) == {"bird/", "cat/circle.png", "cat/gone.png"}
    with pytest.raises(UnreadableImageError, match=r"3 of 5 images of .* cannot be read"):
        open_source(root).content_hashes()
    assert set(open_all(f"{root}/*/*.png").unreadable) == {"cat/circle.png", "cat/gone.png"}
    with pytest.raises(SourceError, match="is a link to /nowhere/bird, which does not exist"):
        open_source(root / "bird")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_folders_that_another_user_may_not_enter_have_a_row_each():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        check_permissions(Path(folder))


def check_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    root = write(tmp_path / "set", "a/1.png", "b/2.png", "b/deep/3.png", "c/4.png", "c/shut/5.png", "d/6.png")
    (root / "b").chmod(0o700)
    (root / "c" / "shut").chmod(0)
    (root / "d").chmod(0o744)  # names can be listed, files cannot be opened
    (root / "a" / "1.png").chmod(0o600)
    program = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from farout.data.sources import open_source
os.setuid(65534)
for text in {[str(root), f"{root}/**/*.png"]!r}:
    source = open_source(text, policy="nan")
    source.content_hashes()
    print(sorted(source.keys), sorted(source.unreadable.items()), source.class_names)
try:
    open_source({str(root / "b")!r})
except Exception as error:
    print(type(error).__name__, error)
try:
    open_source({str(root / "b" / "2.png")!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd="/", check=False
    )
    assert not done.returncode, done.stderr
    folder, pattern, shut, file = done.stdout.splitlines()
    assert folder.startswith("['a/1.png', 'b/', 'c/4.png', 'c/shut/', 'd/6.png']")
    assert folder.endswith("('a', 'b', 'c', 'd')"), "the labels do not depend on what can be entered"
    assert folder.count("Permission denied") == 4
    assert pattern.startswith("['a/1.png', 'b/', 'c/4.png', 'c/shut/', 'd/6.png']")
    assert shut == f"SourceError the folder {root}/b cannot be read: Permission denied"
    assert "Permission denied" in file
    assert file.startswith("SourceError")


def test_a_folder_without_images_says_what_it_contains(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="contains no images; it is empty, or all its files are hidden"):
        open_source(tmp_path / "empty")
    write(tmp_path / "other", "a.txt", "b.mp4", "c.mp4")
    with pytest.raises(SourceError, match=r"contains no images; it contains 2 \.mp4, 1 \.txt"):
        open_source(tmp_path / "other")
    with pytest.raises(SourceError, match=r"Not a directory"):
        open_source(tmp_path / "other" / "a.txt" / "x.png")
    with pytest.raises(SourceError, match=r"File name too long"):
        open_source("./" + "x" * 5000)
    with pytest.raises(SourceError, match=r"null byte"):
        open_source("./a\0b")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SourceError, match="is a named pipe"):
        open_source(tmp_path / "pipe.png")


def test_special_files_in_a_folder_are_unreadable_at_once(tmp_path):
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    source = open_all(tmp_path)
    assert set(source.unreadable) == {"pipe.png", "zero.png"}
    assert len(source) == 3


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.parquet", "metadata.csv", "farout-classes.json"])
def test_named_pipes_of_other_kinds_are_counted_and_never_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(SourceError, match=r"contains no images|matches no images"):
            open_source(source)
    write(tmp_path, "c/1.png")
    assert sum(open_all(tmp_path).left_out.values()) == 1


def test_names_that_differ_only_by_case_are_different_images_and_classes(tmp_path):
    source = open_all(write(tmp_path, "Cat/x.png", "cat/x.png", "cat/X.png"))
    assert source.keys == ("Cat/x.png", "cat/X.png", "cat/x.png")
    assert source.class_names == ("Cat", "cat")


def test_folders_of_one_class_in_both_normal_forms(tmp_path):
    source = open_all(write(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "tea/3.png"))
    assert source.class_names == ("caf\u00e9", "tea")
    assert len(source) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["cat/1.png", "dog/1.png"], ("cat", "dog")),
        (["flowers/cat/1.png", "flowers/dog/1.png"], ("cat", "dog")),
        (["flowers/cat/1.png", "trees/dog/1.png"], None),
        (["cat/1.png", "dog/a/1.png"], None),
        (["cat/1.png", "cover.png"], None),
        (["1.png"], None),
        (["cat/1.png"], ("cat",)),
    ],
)
def test_class_folders(paths, names):
    assert class_labels_of(paths)[1] == names


MVTEC = (
    "train/good/0.png",
    "train/good/1.png",
    "test/good/0.png",
    "test/bent/0.png",
    "ground_truth/bent/0_mask.png",
)


def test_a_benchmark_with_its_splits_is_refused_as_normal_images(tmp_path):
    root = write(tmp_path / "bottle", *MVTEC)
    source = open_all(root)
    assert source.keys == ("test/bent/0.png", "test/good/0.png", "train/good/0.png", "train/good/1.png"), "no masks"
    assert source.left_out == {"in ground_truth/ (masks)": 1}
    with pytest.raises(SourceError) as caught:
        check_one_set(source)
    assert f"give {root}/train/good (" in str(caught.value)
    assert "train/ and test/" in str(caught.value) or "test/ and train/" in str(caught.value)
    check_normal_images(open_all(root / "train" / "good"))
    check_normal_images(open_all(root / "train"))
    check_normal_images(open_all(f"{root}/**/*.png"))
    with pytest.warns(MisleadingResultWarning, match="has the class good next to bent"):
        check_normal_images(open_all(root / "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_normal_images(open_all(f"{root / 'test'}@classes=good"))


@pytest.mark.parametrize(
    ("paths", "advice"),
    [
        (["bottle/train/good/0.png", "bottle/test/bent/0.png", "cable/train/good/0.png", "cable/test/x/0.png"],
         "give one of d/bottle/train/good, d/cable/train/good ("),
        (["train/cat/0.png", "val/cat/0.png"], "give d/train ("),
        (["Train/ok/0.png", "Test/ko/0.png"], "give d/Train/ok ("),
        (["train2017/0.jpg", "val2017/0.jpg"], "give d/train2017 ("),
        (["imagesTr/0.png", "imagesTs/0.png", "labelsTr/0.png"], "give d/imagesTr ("),
        (["train/good/0.png", "validation/good/0.png", "test_public/bad/0.png"], "give d/train/good ("),
        (["test/good/0.png", "test/bent/0.png", "ground_truth/bent/0.png"], "give d/test/good ("),
        (["set/train_images/0.png", "set/test_images/0.png"], "give d/set/train_images ("),
        (["train_station/0.png", "test_tube/0.png", "valley/0.png"], None),
        (["train/0.png", "car/0.png", "bus/0.png"], None),
        (["train/good/0.png"], None),
        (["images/0.png", "masks/0.png"], None),
        (["a.png", "b.png"], None),
    ],
)  # fmt: skip
def test_splits_are_recognized_by_their_folders(paths, advice):
    message = describe_splits(paths, "d")
    assert (message is None) if advice is None else (advice in message), message


@pytest.mark.parametrize(
    ("paths", "masks"),
    [
        (MVTEC, ["ground_truth/bent/0_mask.png"]),
        (["Data/Images/Normal/0.png", "Data/Masks/Anomaly/0.png"], ["Data/Masks/Anomaly/0.png"]),
        (["images/a/0.png", "labels/a/0.png"], ["labels/a/0.png"]),
        (["test_public/good/0.png", "test_public/ground_truth/bad/0.png"], ["test_public/ground_truth/bad/0.png"]),
        (["a/good/rgb/0.png", "a/good/gt/0.png"], ["a/good/gt/0.png"]),
        (["Train/0.PNG", "Train/1.PNG", "Train/Label/0_label.PNG"], ["Train/Label/0_label.PNG"]),
        (["0.jpg", "masks/0.png"], ["masks/0.png"]),
        (["kos01/Part0.jpg", "kos01/Part0_label.bmp"], ["kos01/Part0_label.bmp"]),
        (["train/1.png", "train/1_GT.png", "train/2_GT.png"], ["train/1_GT.png"]),
        (["s/0001.jpg", "s/0001.mask.png"], ["s/0001.mask.png"]),
        (["mask/0.png", "no_mask/0.png"], []),
        (["masks/0.png", "9.png"], []),
        (["labels/0.png", "bottles/0.png"], []),
        (["ground_truth/0.png"], []),
        (["person_mask.png", "mask.png", "price label.png", "price.png"], []),
    ],
)
def test_masks_are_recognized_next_to_their_images(paths, masks):
    assert list(find_masks(paths)) == masks


def test_brackets_of_an_existing_name_are_no_pattern(tmp_path):
    write(tmp_path, "set[1]/a.png", "set[1]/b[2].png", "set[1]/c.txt", "set1/other.png")
    assert open_all(f"{tmp_path}/set[1]/*.png").keys == ("a.png", "b[2].png")
    assert open_all(f"{tmp_path}/set[1]/b[2].png").keys == ("b[2].png",)
    assert open_all(f"{tmp_path}/set[1]/b[2]*").keys == ("b[2].png",), "brackets that match nothing are literal"
    assert open_all(f"{tmp_path}/*/b[[]2].png").keys == ("set[1]/b[2].png",)
    assert open_all(f"{tmp_path}/*/b[2].png").keys == ("set[1]/b[2].png",)
    assert open_all(f"{tmp_path}/set[1]").keys == ("a.png", "b[2].png")
    with pytest.raises(SourceError, match=r"matches nothing; write \[\[\] for a bracket"):
        open_source(f"{tmp_path}/[xyz]/*.png")


def test_what_else_a_glob_matches_is_counted(tmp_path):
    write(tmp_path, "a/1.png", "a/2.txt", "a/.3.png", "a/deep/4.png", "b/5.bmp", "c.png")
    source = open_all(f"{tmp_path}/a/*")
    assert source.keys == ("1.png",)
    assert source.left_out == {f"folder(s) (give '{tmp_path}/a/*/**/*' to list their images)": 1, ".txt": 1}
    assert open_all(f"{tmp_path}/**").keys == ("a/1.png", "a/deep/4.png", "b/5.bmp", "c.png")
    assert open_all(f"{tmp_path}/**/*").left_out == {".txt": 1}
    assert open_all(f"{tmp_path}/*.{{png,jpg}}").keys == ("c.png",)
    assert open_all(f"{tmp_path}/{{a,b}}/*.*").keys == ("a/1.png", "b/5.bmp")
    with pytest.raises(SourceError, match=r"matches no images, but 3 folder\(s\)|matches no images, but 2 folder"):
        open_source(f"{tmp_path}/[ab]")


def test_braces():
    assert expand_braces("s-{000..003}.tar") == ["s-000.tar", "s-001.tar", "s-002.tar", "s-003.tar"]
    assert expand_braces("{2..0}{a,b}") == ["2a", "2b", "1a", "1b", "0a", "0b"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    for pattern in ("{0..999999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(SourceError, match="more than 100000 paths"):
            expand_braces(pattern)
    with pytest.raises(SourceError, match="not a range"):
        expand_braces("{a..f}")


def test_keys_lead_back_to_the_files(tmp_path):
    names = ["=1+1.png", "a\rb.png", "%41.png", os.fsdecode(b"caf\xe9.png"), "\u202egnp.png"]
    source = open_all(write(tmp_path, *names))
    assert sorted(map(decode_key, source.keys)) == sorted(names)
    assert not source.unreadable


def test_records_of_a_folder_that_farout_wrote_are_not_counted(tmp_path: Path) -> None:
    write_config(tmp_path, "images", {})
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    Image.new("L", (4, 4)).save(tmp_path / "000000.png")
    assert open_source(tmp_path).left_out == {}
