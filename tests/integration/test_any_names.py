"""Files, folders and classes with any names: scored, written, read back and printed, in every locale."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import farout
from farout.benchmark.job_graph import Job, JobGraph
from farout.cli import main
from farout.cli.output import progress
from farout.cli.tables import new_table, print_table
from farout.core.errors import FaroutError
from farout.core.names import decode_key, encode_name
from farout.core.progress import task
from farout.data.catalog import ood_role
from farout.data.sources import open_source, parse_source
from farout.diffusion.sample_folder import class_folder_names, write_class_names
from farout.scoring.folder import read_scores, score_folder
from small import pictures

DECOMPOSED = unicodedata.normalize("NFD", "café")
BYTES = bytes(sorted(set(range(1, 256)) - {ord("/")}))
NAMES = [
    b"a\rb.png",
    b"c\nd.png",
    b"t\tx.png",
    b"caf\xe9.png",
    DECOMPOSED.encode() + b".png",
    b"=cmd|calc!A0.png",
    b"@SUM(1).png",
    b"+1.png",
    b"-2+3.png",
    b"a;=1.png",
    b"\x1b[31mred\x07.png",
    "\u202egnp.png".encode(),
    "\u2028\u0085.png".encode(),
    b"quote\"s'.png",
    b"a,b;c.png",
    b"100%41.png",
    b"007.png",
    b"NA.png",
    b"[b]x[slash].png",
    b"[a]*?{b,c}.png",
    b"back\\slash.png",
    b" a .png",
    "👩‍👧.png".encode(),
    b"x" * 251 + b".png",
    BYTES[:120] + b".png",
    BYTES[120:] + b".png",
]
"""Names of files as the file system has them."""


def write_images(folder: Path, names: list[bytes]) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        encoded = io.BytesIO()
        Image.new("L", (8, 8), number * 7).save(encoded, "PNG")
        with open(path, "wb") as file:
            file.write(encoded.getvalue())
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Normal images in `good`, a detector fitted to them in `detector`, and images of all `NAMES` in `odd`."""
    place = tmp_path_factory.mktemp("names")
    farout.PCA().fit(str(pictures(place / "good"))).save(place / "detector")
    write_images(place / "odd", NAMES)
    return place


def run(*words: str | bytes, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    arguments = [sys.executable, "-m", "farout", *words]
    return subprocess.run(arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, check=False)


def test_every_table_has_every_name(place, tmp_path):
    out = tmp_path / "r"
    assert main(["score", str(place / "detector"), str(place / "odd"), "--out", str(out)]) == 0
    names = sorted(NAMES)
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        tables = {"csv": [row["key"] for row in csv.DictReader(file)]}
    tables["pandas"] = list(pd.read_csv(out / "scores.csv", dtype={"key": str}, keep_default_na=False)["key"])
    tables["farout"] = list(read_scores(out).keys)
    tables["parquet"] = pq.read_table(out / "measurements.parquet")["key"].unique().to_pylist()
    for kind, keys in tables.items():
        assert sorted(os.fsencode(decode_key(key)) for key in keys) == names, kind
        assert not any(key[0] in "=+-@\t\r" for key in keys), "a spreadsheet would evaluate these cells"
    assert len((out / "scores.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(names)
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["counts"] == {"ok": len(names)}
    assert "caf%E9.png" in (out / "page.html").read_text(encoding="utf-8")
    assert read_scores(out).keys == open_source(place / "odd").keys


def test_unreadable_images_are_named_harmlessly(place, tmp_path, capsys):
    folder = write_images(tmp_path / "odd", NAMES[:1])
    (folder / "\x1b[31m\x07.png").write_bytes(b"")
    assert main(["score", str(place / "detector"), str(folder), "--out", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr()
    assert "unreadable: %1B[31m%07.png" in printed.out
    assert "\x1b" not in printed.out + printed.err


def test_errors_show_control_characters(tmp_path, capsys):
    assert main(["score", f"{tmp_path}/\x1b[31mnone\r", "x", "--out", str(tmp_path / "r")]) == 1
    assert r"\x1b[31mnone" in capsys.readouterr().err


def test_printing_needs_no_unicode_terminal(tmp_path, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(["list", "é\udce9\x1b"]) == 2
    table = new_table("é")
    table.add_column("[/b]")
    table.add_row("é [/b] \x1b")
    print_table(table)
    sys.stdout.flush()
    sys.stderr.flush()
    assert b"\\xe9 [/b] \\x1b" in streams[0].buffer.getvalue()
    assert b"\x1b" not in streams[1].buffer.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", ["1", "20", "80"])
def test_progress_bars_take_any_name(monkeypatch, width):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    with progress(), task("scoring [/b]\x1b[2J\udce9", 2) as bar:
        bar.advance(note="[/x]")
        bar.advance()
    assert "\x1b[2J" not in terminal.getvalue()


def test_home_is_expanded_everywhere(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path)
    detector = farout.load("~/detector")
    detector.save("~/copy")
    assert farout.load("~/copy").fingerprint == detector.fingerprint
    assert score_folder(detector, "~/odd", "~/scores", limit=3).folder == place / "scores"
    assert len(read_scores("~/scores")) == 3
    assert main(["score", "~/detector", "~/odd", "--out=~/cli", "--limit", "2"]) == 0
    (tmp_path / "settings.yaml").write_text("out: ~/yaml\nlimit: 2\n", encoding="utf-8")
    assert main(["score", "~/detector", "~/odd", "--config", "settings.yaml"]) == 0
    assert main(["evaluate", "--scores", "~/cli", "~/yaml/scores.csv", "--out", "~/evaluation"]) == 0
    for name in ("cli/scores.csv", "yaml/scores.csv", "evaluation/metrics.csv"):
        assert (place / name).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"], "no folder called ~ is made"
    (place / "sets" / "mine").mkdir(parents=True)
    monkeypatch.setenv("FAROUT_DATA", "~/sets")
    pd.DataFrame({"image": [(place / "good" / "000.png").read_bytes()]}).to_parquet(place / "sets/mine/train.parquet")
    assert len(open_source("mine")) == 1


def test_missing_home_is_named_before_the_work(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "")
    assert main(["score", str(place / "detector"), str(place / "odd"), "--out", "~/scores"]) == 1
    assert "there is no home folder" in capsys.readouterr().err
    with pytest.raises(FaroutError, match="no home folder"):
        farout.load("~/detector")


def test_one_folder_is_one_source(place, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(place / "good")
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(place)
    spellings = ["good", "good/", "./good", str(place / "good"), str(tmp_path / "link"), "odd/../good", Path("good")]
    detector = farout.load("detector")
    out = tmp_path / "r"
    assert score_folder(detector, "good", out).scored_now == 40
    for spelling in spellings:
        assert score_folder(detector, spelling, out).scored_now == 0
        assert parse_source(spelling).canonical == str(place / "good")
        assert ood_role("good", f"{spelling}@blur") == "dev"
    monkeypatch.chdir(tmp_path / "real")
    assert score_folder(detector, os.path.relpath(place / "good"), out).scored_now == 0
    with pytest.raises(FaroutError, match="source: good before"):
        score_folder(detector, f"{place}/good@vflip", out)


def test_classes_match_in_either_normal_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [DECOMPOSED.encode(), b"=x", b"l\xe9", b"a,b"]
    write_images(tmp_path / "classes", [folder + b"/%d.png" % number for folder in folders for number in range(2)])
    source = open_source("classes")
    assert source.class_names == ("%3Dx", "a,b", "café", "l%E9")
    for asked in ("café", DECOMPOSED, "=x", "%3Dx", os.fsdecode(b"l\xe9"), "l%E9", "a%2Cb"):
        assert len(open_source(f"classes@classes={asked}")) == 2, asked
    for number in range(2):
        (tmp_path / DECOMPOSED).mkdir(exist_ok=True)
        (tmp_path / "classes" / DECOMPOSED / f"{number}.png").rename(tmp_path / DECOMPOSED / f"{number}.png")
    assert len(open_source("café")) == len(open_source("./café")) == len(open_source("café/*.png")) == 2
    lines = ["path,label", "café/0.png,café", f"{DECOMPOSED}/1.png,{DECOMPOSED}", "classes/l%E9/0.png,x"]
    Path("list.csv").write_text("\n".join(lines), encoding="utf-8")
    table = open_source("list.csv")
    assert table.class_names == ("café", "x")
    assert [tuple(image.shape) for image in table] == [(1, 8, 8)] * 3
    assert table.keys[2] == "classes/l%E9/0.png", "a key of farout is the same key in a table"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["é", "👩‍👧", os.fsdecode(b"\xe9"), "\x1b[31m", "a b", "[b]", "=x", "#x", "%41", "-x", "~x"]
)
def test_results_have_any_name(place, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / name
    pictures(source, 3)
    detector = farout.load(place / "detector")
    detector.save(Path("d", name))
    detector = farout.load(Path("d", name))
    assert main(["score", str(place / "detector"), f"./{name}", f"--out=r/{name}"]) == 0
    assert len(read_scores(Path("r", name))) == 3
    words = ["--id", str(source), "--ood", f"./{name}@vflip", f"./{name}@rot90", "--no-trivial-baselines"]
    assert main(["evaluate", f"d/{name}", *words, "--no-standard-baselines", f"--out=e/{name}"]) == 0
    table = pd.read_csv(Path("e", name, "metrics.csv"))
    assert [len(open_source(given)) for given in table["ood"].unique()] == [3, 3]
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.slow
def test_any_locale_gives_the_same_results(place, tmp_path):
    ascii_terminal = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    for out, environment in (("été", ascii_terminal), ("r", {"PYTHONUTF8": "1"})):
        finished = run("score", place / "detector", place / "odd", "--out", out, cwd=tmp_path, **environment)
        assert finished.returncode == 0, finished.stderr
        assert b"\x1b" not in finished.stdout + finished.stderr
    for name in ("scores.csv", "measurements.parquet", "page.html"):
        assert (tmp_path / "été" / name).read_bytes() == (tmp_path / "r" / name).read_bytes()


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m farout list sets | head -1; echo ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "0"
    assert not finished.stderr


@pytest.mark.slow
def test_a_traceback_shows_control_characters(tmp_path):
    code = "import sys; from farout.cli.terminal import print_traceback as hook; sys.excepthook = hook; "
    code += "raise OSError('\\x1b[31m')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"OSError: \\x1b[31m" in finished.stderr
    assert b"\x1b" not in finished.stderr.replace(b"\\x1b", b"")


@given(st.lists(st.text(st.characters(exclude_categories=()), min_size=1), min_size=1, max_size=4))
@example([" .-.x", "=b", "%41", "a/b"])
@example(["masks", "train", "lost+found", "images"])
@settings(max_examples=30, deadline=None)
def test_classes_of_generated_images_are_read_back(tmp_path_factory, texts):
    names = list(dict.fromkeys(map(encode_name, texts)))
    folders = class_folder_names(names)
    root = tmp_path_factory.mktemp("generated") / "images"
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("L", (4, 4)).save(root / folder / "0.png")
    write_class_names(root, names)
    source = open_source(root)
    assert sorted(source.keys) == sorted(f"{folder}/0.png" for folder in folders)
    classes = {key.split("/")[0]: source.class_names[label] for key, label in zip(source.keys, source.labels)}
    assert classes == dict(zip(folders, names))


def test_jobs_are_finished_for_every_way_to_write_their_sources(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere").mkdir()

    def states(source: str) -> tuple[frozenset[str], dict[str, str]]:
        job = Job(name="a", kind="a", output=tmp_path / "out" / "a", settings={"source": source, "size": 8})
        graph = JobGraph(tmp_path / "out", [job])
        if not graph.records:
            list(graph.run("jobs", lambda job, earlier: job.output.mkdir(parents=True)))
        found = graph.states()
        return found.finished, dict(found.outdated)

    monkeypatch.chdir(tmp_path)
    for source in ("d", "./d/", str(tmp_path / "d")):
        assert states(source) == ({"a"}, {})
    assert states("d@vflip")[1]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in ("../d", str(tmp_path / "d")):
        assert states(source) == ({"a"}, {})
    assert states("d")[1], "another folder of this name"


def test_the_name_of_a_source_opens_it_again(tmp_path: Path) -> None:
    for folder in ("=cmd", "x"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "1.png")
    for name in ("=cmd", "%3Dcmd"):
        source = open_source(f"{tmp_path}@classes={name}")
        assert open_source(source.name).keys == source.keys == ("%3Dcmd/1.png",)
        assert open_source(source.location).keys == source.keys
