"""`farout score --watch`: every file becomes one row, whatever happens to the files, the process and the table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import farout
from farout.cli import main
from farout.core.csv_files import read_csv
from farout.core.errors import DamagedFileWarning, FaroutError, LeftOutWarning, StoreError, WriteError
from farout.scoring.folder import read_scores
from farout.scoring.scorer import Scorer
from farout.scoring.watch import FolderWatcher
from small import pictures

WAIT = 300


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watch")
    pictures(root / "images", 40)
    farout.PCA(size=32).fit(root / "images", statistics=20, alpha=0.1).save(root / "d")
    return root / "d"


@pytest.fixture(scope="module")
def scorer(detector: Path) -> Scorer:
    return Scorer(detector)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    return pictures(tmp_path / "incoming", 3, seed=1)


class Watch:
    """A watcher with a clock of its own: each `look` is 10 seconds after the last one."""

    def __init__(self, scorer: Scorer, folder: Path) -> None:
        self.watcher = FolderWatcher(scorer, folder, folder.parent / "out", settle=5)
        self.now = 0.0

    def look(self, times: int = 2) -> list[str]:
        added = []
        for _ in range(times):
            self.now += 10
            added += [row["key"] for row in self.watcher.poll(self.now)]
        return added


@pytest.fixture
def watch(scorer: Scorer, incoming: Path) -> Iterator[Watch]:
    watch = Watch(scorer, incoming)
    yield watch
    watch.watcher.close()


def table(folder: Path) -> list[tuple[str, str]]:
    frame = read_csv(folder.parent / "out" / "scores.csv")
    return list(zip(frame["key"], frame["status"], strict=True))


def test_rows_are_those_of_score_with_a_time(watch: Watch, incoming: Path, scorer: Scorer) -> None:
    assert watch.look() == ["000.png", "001.png", "002.png"]
    scores, expected = read_scores(incoming.parent / "out"), scorer.detector.score(incoming)
    deviation = scorer.detector.calibration_scores[scorer.detector.score_name].std()
    assert scores.keys == expected.keys
    assert scores.score == pytest.approx(expected.score, abs=1e-4 * deviation)
    assert scores.p_value == pytest.approx(expected.p_value)
    assert scores.is_ood.tolist() == expected.is_ood.tolist()
    assert set(scores.indicators) == set(expected.indicators), "other columns are no indicators"
    frame = read_csv(incoming.parent / "out" / "scores.csv")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in frame["time"])
    assert watch.watcher.result.counts == {"ok": 3}


def test_a_file_is_read_when_it_no_longer_changes(watch: Watch, incoming: Path) -> None:
    assert watch.look()
    data = (incoming / "000.png").read_bytes()
    for end in (10, 40, len(data)):
        (incoming / "new.png").write_bytes(data[:end])
        assert watch.look(1) == []
    assert watch.look(1) == ["new.png"]
    assert table(incoming)[-1] == ("new.png", "ok")
    assert watch.look() == []


def test_replaced_files_are_scored_again_and_touched_ones_are_not(watch: Watch, incoming: Path) -> None:
    assert len(watch.look()) == 3
    os.utime(incoming / "000.png", (1, 1))
    shutil.copy(incoming / "002.png", incoming / "001.png")
    (incoming / "002.png").unlink()
    assert watch.look(3) == ["001.png"]
    assert [key for key, _ in table(incoming)] == ["000.png", "001.png", "002.png", "001.png"]


def test_unreadable_files_are_rows_with_a_reason_and_others_are_counted(watch: Watch, incoming: Path) -> None:
    (incoming / "broken.png").write_bytes(b"no image")
    (incoming / "gone.png").symlink_to(incoming / "nowhere.png")
    (incoming / "notes.txt").write_text("text")
    (incoming / ".hidden.png").write_bytes(b"")
    with pytest.warns(LeftOutWarning, match=r"1 \.txt"):
        assert len(watch.look()) == 5
    rows = read_csv(incoming.parent / "out" / "scores.csv").set_index("key")
    assert (rows.loc["broken.png", "status"], rows.loc["gone.png", "status"]) == ("unreadable", "unreadable")
    assert "not an image" in rows.loc["broken.png", "reason"]
    assert "link" in rows.loc["gone.png", "reason"]
    scores = read_scores(incoming.parent / "out")
    assert not scores.is_ood[[scores.keys.index("broken.png")]].any()
    assert watch.look(3) == [], "warned of and listed once"
    shutil.copy(incoming / "000.png", incoming / "broken.png")
    assert watch.look() == ["broken.png"], "repaired"


def test_a_restarted_watcher_scores_no_image_twice(scorer: Scorer, incoming: Path) -> None:
    first = Watch(scorer, incoming)
    assert len(first.look()) == 3
    first.watcher.close()
    pictures(incoming / "more", 2, seed=9)
    second = Watch(scorer, incoming)
    assert second.look() == ["more/000.png", "more/001.png"]
    assert second.watcher.result.counts == {"ok": 5}
    assert second.watcher.result.scored_now == 2
    second.watcher.close()


@pytest.mark.parametrize("end", [1, 30, 100])
def test_a_line_that_was_cut_off_is_removed_and_its_image_scored_again(
    scorer: Scorer, incoming: Path, end: int
) -> None:
    first = Watch(scorer, incoming)
    first.look()
    first.watcher.close()
    file = incoming.parent / "out" / "scores.csv"
    content = file.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    file.write_bytes(content[: min(last + end, len(content) - 1)])
    with pytest.warns(DamagedFileWarning, match="incomplete line"):
        second = Watch(scorer, incoming)
    assert second.look() == ["002.png"]
    second.watcher.close()
    assert table(incoming) == [(f"00{number}.png", "ok") for number in range(3)]
    file.write_bytes(file.read_bytes() + b"\0" * 100)  # blocks that were never written, after a power failure
    with pytest.warns(DamagedFileWarning):
        Watch(scorer, incoming).watcher.close()
    assert len(table(incoming)) == 3


def test_a_full_disk_leaves_complete_lines(watch: Watch, incoming: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(watch.look()) == 3
    (incoming / "new.png").write_bytes((incoming / "000.png").read_bytes())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(WriteError, match=r"scores\.csv: No space left"):
            watch.look()
    assert len(table(incoming)) == 3
    assert watch.look() == ["new.png"], "scored when there is space again"


def test_what_does_not_belong_together_is_refused(scorer: Scorer, incoming: Path, tmp_path: Path) -> None:
    watch = Watch(scorer, incoming)
    watch.look()
    with pytest.raises(FaroutError, match="another process writes"):
        Watch(scorer, incoming)
    watch.watcher.close()
    other = pictures(tmp_path / "other", 1)
    with pytest.raises(StoreError, match="other settings"):
        FolderWatcher(scorer, other, tmp_path / "out")
    with pytest.raises(StoreError, match="is not empty"):
        FolderWatcher(scorer, incoming, other)
    with pytest.raises(FaroutError, match="not a folder"):
        FolderWatcher(scorer, incoming / "000.png", tmp_path / "new")
    file = tmp_path / "out" / "scores.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "edited\n", *lines[2:]]))
    with pytest.raises(StoreError, match="damaged in line 2"):
        Watch(scorer, incoming)
    file.write_text("".join(["key,score\n", *lines[1:]]))
    with pytest.raises(StoreError, match="other columns"):
        Watch(scorer, incoming)


def test_the_table_is_monitored_in_time_order(watch: Watch, incoming: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (incoming / "broken.png").write_bytes(b"no image")
    watch.look()
    assert main(["monitor", str(incoming.parent / "out"), "--out", str(incoming.parent / "monitoring")]) == 0
    assert "3 images" in (output := capsys.readouterr().out)
    assert "1 unreadable; order: column time" in output


def test_settings_of_finished_results_are_refused(
    detector: Path, incoming: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", str(detector), str(incoming), "--out", str(incoming.parent / "out"), "--watch"]
    assert main([*words, "--fdr", "0.1", "--top-images", "3"]) == 2
    assert "with --watch, --top-images, --fdr has no effect" in capsys.readouterr().err
    assert main([*words, "--interval", "0"]) == 1
    assert "interval is 0" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows does not send these signals to processes")
@pytest.mark.slow
def test_the_command_survives_a_kill_and_ends_cleanly_by_a_signal(detector: Path, incoming: Path) -> None:
    out = incoming.parent / "out"
    words = ["score", detector, incoming, "--out", out, "--watch", "--interval", 0.05]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "farout", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for_rows(count: int) -> None:
        deadline = time.monotonic() + WAIT
        while not (out / "scores.csv").exists() or (out / "scores.csv").read_bytes().count(b"\n") < count + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with start() as process:
        wait_for_rows(3)
        process.kill()
    pictures(incoming / "more", 2, seed=9)
    with start() as process:
        wait_for_rows(5)
        process.terminate()
        output, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0, errors
    assert "stopped; 2 new images; in all 5 ok" in output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(set(read_scores(out).keys)) == len(table(incoming)) == 5
