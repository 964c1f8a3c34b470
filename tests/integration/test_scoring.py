"""Scored folders: the same bytes also after interruptions, nothing measured twice, nothing overwritten."""

import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from farout import load
from farout.core import store
from farout.core.errors import DamagedFileWarning, FaroutError, NaNScoresWarning, StoreError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.detectors.base import Detector
from farout.detectors.calibration import benjamini_hochberg
from farout.detectors.reconstruction import Reconstruction
from farout.detectors.results import Measurements
from farout.scoring import folder as scoring
from farout.scoring.folder import ScoredFolder, read_scores
from small import model, pictures
from tolerances import assert_same_scores

pytestmark = pytest.mark.numerics

RESULTS = ("scores.csv", "measurements.parquet", "manifest.json", "page.html", "settings.json")
COUNT = 29


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and images of which one cannot be read."""
    root = tmp_path_factory.mktemp("scoring")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = Reconstruction(levels=(50, 200), draws=1).fit(
            pictures(root / "good", 60), model(), alpha=0.1, statistics=30, runtime=Runtime(batch_size=5)
        )
    detector.save(root / "d")
    pictures(root / "new", COUNT - 1, low=60, spread=150, seed=3)
    (root / "new" / "017-broken.png").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def detector(place: Path) -> Detector:
    return load(place / "d")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_IMAGES_PER_PART", 8)


@pytest.fixture(scope="module")
def whole(place: Path, detector: Detector) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(scoring, "_IMAGES_PER_PART", 8)
    done = score_folder(detector, place / "new", place / "whole")
    patch.undo()
    assert done.scored_now == COUNT - 1, "the unreadable image is not scored"
    return contents(place / "whole")


def score_folder(*given: Any, top_images: int = 4, **settings: Any) -> ScoredFolder:
    """With few pictures on the page, which are measured again for their maps."""
    return scoring.score_folder(*given, top_images=top_images, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(RESULTS), "nothing else is left there"
    return {name: (folder / name).read_bytes() for name in RESULTS}


def measured(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that is measured for scores (the page's own are with maps)."""
    seen: list[Batch] = []
    original = Reconstruction.measure

    def watching(self: Reconstruction, batch: Batch, maps: bool = False) -> object:
        if not maps:
            seen.append(batch)
        return original(self, batch, maps)

    monkeypatch.setattr(Reconstruction, "measure", watching)
    return seen


KILLED = """
import os, signal, sys, torch
import pyarrow.parquet as pq
from farout.scoring import folder as scoring
from farout.cli import main
torch.set_num_threads(1)
scoring._IMAGES_PER_PART = 8
write, written = pq.write_table, []
def dying(table, path, **more):
    written.append(path)
    write(table, path, **more)
    if len(written) == 4:
        path.truncate(100)  # the open file
        os.kill(os.getpid(), signal.SIGKILL)
scoring.pq.write_table = dying
main(["score", sys.argv[1], sys.argv[2], "--out", sys.argv[3], "--top-images", "4"])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while the fourth part is half written; the same command then ends with the same bytes."""
    out = tmp_path / "r"
    words = [sys.executable, "-c", KILLED, place / "d", place / "new", out]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((out / "parts").glob("0*.parquet"))) == 3
    assert not (out / "scores.csv").exists()
    seen = measured(monkeypatch)
    resumed = score_folder(detector, place / "new", out)
    assert resumed.scored_now == COUNT - 3 * 8
    keys = [key for batch in seen for key in batch.keys]
    assert len(keys) == len(set(keys)) == COUNT - 3 * 8
    assert contents(out) == whole


@pytest.mark.parametrize(
    "name", ["scores.csv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("page.html", "manifest.json"))]
)
def test_a_stop_while_results_are_written_loses_nothing(
    name: str, place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.atomic_file

    def stopping(path: Path) -> object:
        if Path(path).name == name:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(store, "atomic_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_folder(detector, place / "new", tmp_path / "r")
    monkeypatch.setattr(store, "atomic_file", original)
    seen = measured(monkeypatch)
    assert score_folder(detector, place / "new", tmp_path / "r").scored_now == 0
    assert not seen
    assert contents(tmp_path / "r") == whole


def test_a_finished_folder_is_left_as_it_is(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "whole", tmp_path / "r")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr(Reconstruction, "measure", refuse)
    done = score_folder(detector, place / "new", tmp_path / "r")
    assert (done.scored_now, done.counts) == (0, {"ok": COUNT - 1, "unreadable": 1})
    assert contents(tmp_path / "r") == whole


def test_another_number_of_pictures_rewrites_the_page_only(place: Path, detector: Detector, tmp_path: Path) -> None:
    shutil.copytree(place / "whole", tmp_path / "r")
    assert score_folder(detector, place / "new", tmp_path / "r", top_images=3).scored_now == 0
    assert (tmp_path / "r" / "page.html").read_text().count('<p class="name">') == 3
    assert (tmp_path / "r" / "scores.csv").read_bytes() == (place / "whole" / "scores.csv").read_bytes()


def test_a_page_from_the_tables_is_that_from_the_parts(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = shutil.copytree(place / "whole", tmp_path / "r")
    (out / "page.html").unlink()
    assert score_folder(detector, place / "new", out).scored_now == 0
    assert contents(out) == whole


def test_a_stop_while_parts_are_removed_measures_nothing_again(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(place / "whole", tmp_path / "r")
    (tmp_path / "r" / "parts").mkdir()
    (tmp_path / "r" / "parts" / "000000008.json").write_text("{}")
    assert score_folder(detector, place / "new", tmp_path / "r").scored_now == 0
    assert contents(tmp_path / "r") == whole


# -- refusals -----------------------------------------------------------------------------------------------------


def test_other_runs_are_refused_and_kept(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "r"
    shutil.copytree(place / "whole", out)
    with pytest.raises(StoreError, match="source"):
        score_folder(detector, place / "good", out)
    with pytest.raises(StoreError, match="images"):
        score_folder(detector, place / "new", out, limit=5)
    with pytest.raises(StoreError, match="policy"):
        score_folder(detector, place / "new", out, policy="skip")
    with pytest.raises(StoreError, match="detector"):
        score_folder(detector.with_scoring(score="mean_z"), place / "new", out)
    assert contents(out) == whole


def test_new_images_under_old_names_are_not_given_old_scores(detector: Detector, tmp_path: Path) -> None:
    """A folder that is refilled every day with 000.png, 001.png, … must not come back with yesterday's scores."""
    incoming = pictures(tmp_path / "incoming", 10, seed=1)
    score_folder(detector, incoming, tmp_path / "r")
    shutil.rmtree(incoming)
    pictures(incoming, 10, seed=2)
    with pytest.raises(StoreError, match="other images of the same names"):
        score_folder(detector, incoming, tmp_path / "r")


def test_a_resumed_part_is_checked_too(detector: Detector, tmp_path: Path) -> None:
    incoming = pictures(tmp_path / "incoming", 10, seed=1)
    store_parts(detector, incoming, tmp_path / "r")
    shutil.rmtree(incoming)
    pictures(incoming, 10, seed=2)
    with pytest.raises(StoreError, match="other images of the same names"):
        score_folder(detector, incoming, tmp_path / "r")


def store_parts(detector: Detector, images: Path, out: Path) -> None:
    patch = pytest.MonkeyPatch()

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(scoring, "_write_tables", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_folder(detector, images, out)
    patch.undo()
    scoring._IMAGES_PER_PART = 8


def test_foreign_folders_are_not_touched(place: Path, detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not empty"):
        score_folder(detector, place / "new", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(StoreError, match="is a file"):
        score_folder(detector, place / "new", tmp_path / "mine" / "thesis.txt")


# -- memory, damage -----------------------------------------------------------------------------------------------


def test_images_are_streamed(place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million images do not fit: no more than a batch is measured at once, and parts are on disk as they are made."""
    seen = measured(monkeypatch)
    on_disk: list[int] = []
    original = Reconstruction.measure

    def counting(self: Reconstruction, batch: Batch, maps: bool = False) -> object:
        on_disk.append(len(list((tmp_path / "r" / "parts").glob("0*.parquet"))))
        return original(self, batch, maps)

    monkeypatch.setattr(Reconstruction, "measure", counting)
    score_folder(detector, place / "new", tmp_path / "r", top_images=0)
    assert max(len(batch.keys) for batch in seen) == detector.batch_size == 5
    assert on_disk == sorted(on_disk)
    assert on_disk[-1] == (COUNT - 1) // 8, "all parts but the last are written when the last is measured"


def test_unreadable_images_are_listed_and_never_normal(place: Path, whole: dict[str, bytes]) -> None:
    frame = pd.read_csv(place / "whole" / "scores.csv").set_index("key")
    assert len(frame) == COUNT
    row = frame.loc["017-broken.png"]
    assert row["status"] == "unreadable"
    assert row[["score", "p_value", "is_ood"]].isna().all()
    lines = whole["scores.csv"].decode().splitlines()
    assert next(line for line in lines if "broken" in line).startswith("017-broken.png,,,,unreadable")
    manifest = json.loads(whole["manifest.json"])
    assert list(manifest["unreadable"]) == ["017-broken.png"]
    assert manifest["counts"] == {"ok": COUNT - 1, "unreadable": 1}
    assert "017-broken.png" in whole["page.html"].decode()
    rows = pq.read_table(place / "whole" / "measurements.parquet")["key"].to_pylist()
    assert set(rows) == set(frame.index) - {"017-broken.png"}


def test_the_folder_holds_the_scores_that_the_detector_gives(
    place: Path, detector: Detector, whole: dict[str, bytes]
) -> None:
    """Up to rounding: a folder is measured in parts, so its batches are others."""
    direct, read = detector.score(place / "new"), read_scores(place / "whole")
    assert read.keys == direct.keys
    assert_same_scores(read, direct, detector)
    assert read.status == direct.status


def test_the_tables_read_back_to_the_last_bit(
    place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are those of the stored measurements, which are all in one part and hence in one computation."""
    monkeypatch.setattr(scoring, "_IMAGES_PER_PART", 1000)
    score_folder(detector, place / "new", tmp_path / "r")
    read = read_scores(tmp_path / "r")
    measured = Measurements.read_parquet(tmp_path / "r" / "measurements.parquet")
    computed = detector.score_measurements(measured).reindex(read.keys)
    assert np.array_equal(read.score, computed.score, equal_nan=True)
    assert np.array_equal(read.p_value, computed.p_value, equal_nan=True)
    assert np.array_equal(read.is_ood, computed.is_ood)
    assert_same_scores(read, detector.score(place / "new"), detector)


def test_nothing_readable_is_said(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_text("no")
    done = score_folder(detector, tmp_path / "bad", tmp_path / "r")
    assert done.counts == {"unreadable": 2}
    assert "No image has a score" in (tmp_path / "r" / "page.html").read_text()
    assert len(read_scores(tmp_path / "r")) == 2
    skipped = score_folder(detector, tmp_path / "bad", tmp_path / "s", policy="skip")
    assert skipped.counts == {}


@pytest.mark.slow
def test_scores_that_are_not_numbers_warn(
    place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Reconstruction.measure

    def damaged(self: Reconstruction, batch: Batch, maps: bool = False) -> object:
        found = original(self, batch, maps)
        assert found.values is not None
        found.values[torch.tensor([key == "003.png" for key in batch.keys])] = float("nan")
        return found

    monkeypatch.setattr(Reconstruction, "measure", damaged)
    with pytest.warns(NaNScoresWarning, match=f"1 of {COUNT - 1}"):
        done = score_folder(detector, place / "new", tmp_path / "r")
    assert done.counts == {"not a number": 1, "ok": COUNT - 2, "unreadable": 1}


@pytest.mark.parametrize(
    "place_of_failure",
    ["part", *(pytest.param(name, marks=pytest.mark.slow) for name in ("measurements.parquet", "page.html"))],
)
def test_a_full_disk_leaves_no_half_written_file(
    place_of_failure: str,
    place: Path,
    detector: Detector,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "r"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if place_of_failure == "part":
            write, calls = pq.write_table, []

            def filling(table: object, path: object, **more: object) -> None:
                calls.append(path)
                if len(calls) == 3:
                    full()
                write(table, path, **more)

            patch.setattr(pq, "write_table", filling)
        elif place_of_failure == "measurements.parquet":
            written: list[object] = []

            class FillingWriter(pq.ParquetWriter):
                def write_table(self, table: object, row_group_size: int | None = None) -> None:
                    super().write_table(table, row_group_size)
                    written.append(table)
                    if len(written) == 3:
                        full()

            patch.setattr(scoring, "pq", SimpleNamespace(ParquetWriter=FillingWriter))
        else:
            patch.setattr(Path, "write_text", full)
            patch.setattr(store, "write_json", real_write_json)
        with pytest.raises(OSError, match="No space"):
            score_folder(detector, place / "new", out)
    left = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert not [name for name in left if name.startswith(".")], left
    assert place_of_failure not in left
    assert "manifest.json" not in left
    seen = measured(monkeypatch)
    score_folder(detector, place / "new", out)
    assert len({key for batch in seen for key in batch.keys}) == (COUNT - 1 - 16 if place_of_failure == "part" else 0)
    assert contents(out) == whole


def real_write_json(path: Path, content: dict) -> None:
    """As `store.write_json`, but not through `Path.write_text`, which is broken in that test."""
    with store.atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


@pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning")
def test_selection_at_a_false_discovery_rate(tmp_path: Path) -> None:
    """`selected` is Benjamini-Hochberg's choice among the table's p-values; an image without one is never chosen."""
    good = pictures(tmp_path / "good", 60)
    fitted = Reconstruction(levels=(50,), draws=1).fit(good, diffusion=model(), alpha=0.05, statistics=30)
    some = pictures(tmp_path / "some", 8, low=0, spread=255, seed=1)
    (some / "broken.png").write_text("no picture")
    table = pd.read_csv(score_folder(fitted, some, tmp_path / "out", fdr=0.4).folder / "scores.csv")
    assert table["selected"].tolist() == benjamini_hochberg(table["p_value"], 0.4).tolist()
    assert table["selected"].any()
    assert not table.loc[table["key"] == "broken.png", "selected"].any()
    for wrong in ({"fdr": 40.0}, {"fdr": 0.0}, {"top_images": -1}):
        with pytest.raises(FaroutError, match="a rate between 0 and 1"):
            score_folder(fitted, some, tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()


# -- damaged results ----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_lines(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, edit, cut_lines, Path.unlink])
def test_a_damaged_table_is_written_again_without_networks(
    damage: Any, place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    """As after a spreadsheet has saved it."""
    out = tmp_path / "r"
    shutil.copytree(place / "whole", out)
    damage(out / "scores.csv")
    with pytest.raises(StoreError, match=r"scores\.csv"):
        read_scores(out)
    seen = measured(monkeypatch)
    with pytest.warns(DamagedFileWarning, match=r"scores\.csv .*the results are written again"):
        done = score_folder(detector, place / "new", out)
    assert not seen, "the measurements are intact"
    assert (done.scored_now, done.counts) == (0, {"ok": COUNT - 1, "unreadable": 1})
    assert contents(out) == whole


@pytest.mark.parametrize("damage", [cut, edit, Path.unlink, make_folder])
@pytest.mark.parametrize("file", ["measurements.parquet", "manifest.json"])
def test_other_damaged_results_are_measured_again(
    damage: Any, file: str, place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "r"
    shutil.copytree(place / "whole", out)
    damage(out / file)
    if (out / "measurements.parquet").is_dir():
        (out / "measurements.parquet").rmdir()
    if file == "manifest.json":
        with pytest.raises(StoreError, match=r"manifest\.json|not finished"):
            read_scores(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = score_folder(detector, place / "new", out)
    assert done.scored_now == COUNT - 1
    is_unfinished = (file, damage) == ("manifest.json", Path.unlink)
    assert any(issubclass(each.category, DamagedFileWarning) for each in caught) != is_unfinished
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("name", "value"), [("counts", {"ok": 5}), ("flagged", 3), ("unreadable", {}), ("files", {}), ("policy", "skip")]
)
def test_an_edited_manifest_is_noticed(
    place: Path, whole: dict[str, bytes], tmp_path: Path, name: str, value: Any
) -> None:
    out = tmp_path / "r"
    shutil.copytree(place / "whole", out)
    manifest = store.read_json(out / "manifest.json")
    store.write_json(out / "manifest.json", {**manifest, name: value})
    with pytest.raises(StoreError, match=r"manifest\.json was changed"):
        read_scores(out)


def test_settings_that_were_changed_are_named(
    place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "r"
    shutil.copytree(place / "whole", out)
    cut(out / "settings.json")
    with pytest.raises(StoreError, match=r"settings\.json"):
        score_folder(detector, place / "new", out)


@pytest.mark.parametrize("damage", [cut, edit, Path.unlink])
@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_damaged_parts_are_measured_again(
    damage: Any, suffix: str, place: Path, detector: Detector, whole: dict[str, bytes], tmp_path: Path
) -> None:
    store_parts(detector, place / "new", tmp_path / "r")
    damage(tmp_path / "r" / "parts" / f"000000008{suffix}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = score_folder(detector, place / "new", tmp_path / "r")
    assert done.scored_now == 8
    assert any(issubclass(each.category, DamagedFileWarning) for each in caught) == (damage is not Path.unlink)
    assert contents(tmp_path / "r") == whole


def test_other_images_are_not_scored_into_damaged_results(detector: Detector, tmp_path: Path) -> None:
    incoming = pictures(tmp_path / "incoming", 10, seed=1)
    score_folder(detector, incoming, tmp_path / "r")
    cut(tmp_path / "r" / "scores.csv")
    shutil.rmtree(incoming)
    pictures(incoming, 10, seed=2)
    with pytest.warns(DamagedFileWarning), pytest.raises(StoreError, match="other images of the same names"):
        score_folder(detector, incoming, tmp_path / "r")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'key,score\n"a', b"\xff\xfe", b"PAR1"])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_tables_of_others_that_cannot_be_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=name):
        read_scores(tmp_path / name)
