"""Scoring and evaluation in several processes: the results of one process, resumed, and with clear ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
from PIL import Image

from farout import PCA, evaluate, load, score_folder
from farout.core import store
from farout.core.errors import FaroutError, LeftOutWarning, UnreadableImageError
from farout.core.remote_files import NETWORK_ERROR, RemotePath
from farout.data.image_source import ImageSource
from farout.scoring import folder as scoring
from farout.scoring import worker_pool
from farout.scoring.folder import read_scores
from farout.scoring.scorer import Scorer
from launch import in_two_processes
from small import pictures
from tolerances import assert_same_scores

COUNT = 43


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and images of which one cannot be read."""
    root = tmp_path_factory.mktemp("processes")
    PCA(size=8).fit(pictures(root / "good", 60), statistics=30, alpha=0.1).save(root / "d")
    pictures(root / "new", COUNT - 1, low=60, spread=150, seed=3)
    (root / "new" / "017-broken.png").write_text("not a picture")
    return root


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_IMAGES_PER_PART", 8)


@contextmanager
def measuring_after_a_worker(parts: Path, written: int = 1) -> Iterator[None]:
    """Inside this context, this process measures nothing before its workers have written so many parts."""
    measure = Scorer.measure

    def wait_and_measure(scorer: Scorer, source: ImageSource, advance: Callable[[int], object] | None = None) -> Any:
        ends = time.monotonic() + 200
        while len(list(parts.glob("*.json"))) < written and time.monotonic() < ends:
            if advance is not None:
                advance(0)
            time.sleep(0.01)
        return measure(scorer, source, advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "measure", wait_and_measure)
        yield


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_number_of_processes_is_checked(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="processes is 0"):
        score_folder(load(place / "d"), place / "new", tmp_path / "r", processes=0)


def test_an_image_that_a_store_did_not_deliver_is_read_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_url = f"memory://{tmp_path.name}"
    for path in sorted((place / "new").glob("*.png"))[:12]:
        fsspec.filesystem("memory").pipe_file(f"{store_url}/{path.name}", path.read_bytes())
    read, measure_part = RemotePath.read, scoring._measure_part

    def read_or_fail(path: RemotePath, limit: int) -> bytes:
        if path.name.startswith("002"):
            raise ConnectionError(errno.EIO, f"{NETWORK_ERROR}: reset", path.url)
        return read(path, limit)

    def measure_one_part(*arguments: Any) -> Any:
        monkeypatch.setattr(scoring, "_measure_part", interrupt)
        return measure_part(*arguments)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "read", read_or_fail)
        monkeypatch.setattr(scoring, "_measure_part", measure_one_part)
        with pytest.raises(KeyboardInterrupt):
            score_folder(load(place / "d"), store_url, tmp_path / "r")
    monkeypatch.setattr(scoring, "_measure_part", measure_part)
    assert score_folder(load(place / "d"), store_url, tmp_path / "r").counts == {"ok": 12}
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "read", read_or_fail)
        assert score_folder(load(place / "d"), store_url, tmp_path / "s").counts == {"ok": 11, "unreadable": 1}
    again = score_folder(load(place / "d"), store_url, tmp_path / "s")
    assert again.counts == {"ok": 12}
    assert again.scored_now == 8, "the part of this image"
    assert (tmp_path / "s" / "scores.csv").read_bytes() == (tmp_path / "r" / "scores.csv").read_bytes()


def test_an_evaluation_scores_in_processes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farout.evaluation import evaluate as module

    given = []
    original = module.score_folder
    monkeypatch.setattr(module, "score_folder", lambda *a, processes, **k: given.append(processes) or original(*a, **k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(load(place / "d"), place / "good", [place / "new"], tmp_path / "e", processes=3)
    assert given[:2] == [3, 3]
    assert given[-2:] == [1, 1], "trivial baselines are not registered, and fast"


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(place: Path, tmp_path: Path) -> None:
    """Of a detector that is in memory only, and of images of which one is unreadable and one has several frames."""
    detector = PCA(size=6).fit(place / "good", statistics=30, alpha=0.1)
    images = tmp_path / "images"
    shutil.copytree(place / "new", images)
    frames = [Image.new("L", (8, 8), level) for level in (0, 50, 100)]
    frames[0].save(images / "stack.tif", save_all=True, append_images=frames[1:])
    with pytest.warns(LeftOutWarning, match="2 frames after the first of 1 file"):
        one = score_folder(detector, images, tmp_path / "one")
    with (
        pytest.warns(LeftOutWarning, match="2 frames after the first of 1 file"),
        measuring_after_a_worker(tmp_path / "two" / "parts"),
    ):
        two = score_folder(detector, images, tmp_path / "two", processes=2)
    assert (two.counts, two.flagged, two.unreadable) == (one.counts, one.flagged, one.unreadable)
    assert two.scored_now == one.scored_now == COUNT
    assert store.read_sealed_json(tmp_path / "two" / "manifest.json")["further_frames"] == 2
    first, second = read_scores(tmp_path / "one"), read_scores(tmp_path / "two")
    assert second.keys == first.keys
    assert_same_scores(second, first, detector)
    again = score_folder(detector, images, tmp_path / "two", processes=2)
    assert again.scored_now == 0
    assert not multiprocessing.active_children()


def test_results_continue_with_the_parts_that_they_were_begun_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise results of an earlier version, with parts of another size, would be refused."""
    score_folder(load(place / "d"), place / "new", tmp_path / "r")
    monkeypatch.setattr(scoring, "_IMAGES_PER_PART", 16)
    assert score_folder(load(place / "d"), place / "new", tmp_path / "r").scored_now == 0
    (tmp_path / "r" / "manifest.json").unlink()
    score_folder(load(place / "d"), place / "new", tmp_path / "r")
    assert len(store.read_sealed_json(tmp_path / "r" / "manifest.json")["contents"]) == -(-COUNT // 8)


def test_few_images_do_not_wait_for_workers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_load", time.sleep)  # a worker that never has loaded
    monkeypatch.setattr(scoring, "open_worker_scorer", lambda _: nullcontext(600))
    scored = score_folder(load(place / "d"), place / "new", tmp_path / "r", processes=2)
    assert scored.scored_now == COUNT - 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_run(place: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(place / "new", images)
    # the worker gets the first part, and this process waits for it
    (images / "017-broken.png").rename(images / "000-broken.png")
    with (
        pytest.raises(UnreadableImageError, match="000-broken"),
        measuring_after_a_worker(tmp_path / "r" / "parts"),
    ):
        score_folder(load(place / "d"), images, tmp_path / "r", policy="raise", processes=2)
    assert [path.name for path in (tmp_path / "r" / "parts").iterdir()] == [], "this process had not begun"
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_worker_that_is_killed_ends_the_run_and_finished_parts_are_kept(place: Path, tmp_path: Path) -> None:
    parts = tmp_path / "r" / "parts"

    def kill_a_worker() -> None:
        ends = time.monotonic() + 200
        while time.monotonic() < ends:
            children = multiprocessing.active_children()
            if len(children) == 1:
                os.kill(children[0].pid or 0, signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    # more parts than there are
    with (
        pytest.raises(FaroutError, match="a worker process ended unexpectedly"),
        measuring_after_a_worker(parts, written=COUNT),
    ):
        score_folder(load(place / "d"), place / "new", tmp_path / "r", processes=2)
    killer.join()
    assert not multiprocessing.active_children()
    assert parts.is_dir()
    done = score_folder(load(place / "d"), place / "new", tmp_path / "r")
    assert sum(done.counts.values()) == COUNT


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_signal_to_the_parent_ends_its_workers(number: str, place: Path, tmp_path: Path) -> None:
    # waits with a part in each worker, so that the signal comes before the last one on a machine of any speed
    arguments = ["score", place / "d", place / "new", "--out", tmp_path / "r", "--processes", "2"]
    script = tmp_path / "score.py"
    script.write_text(f"""
import sys, time
from farout.cli import main
from farout.scoring import folder
folder._IMAGES_PER_PART = 8

def measure_part_slowly(*arguments):
    result = measure_part(*arguments)
    time.sleep(600)
    return result

measure_part, folder._measure_part = folder._measure_part, measure_part_slowly
if __name__ == "__main__":
    sys.exit(main({[str(argument) for argument in arguments]!r}))
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, script], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ends = time.monotonic() + 300
    while len(list((tmp_path / "r" / "parts").glob("*.json"))) < 2 and time.monotonic() < ends:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.Signals[number])
    _, errors = process.communicate(timeout=120)
    if number == "SIGTERM":
        assert process.returncode == 143, errors
        assert "Traceback" not in errors
        assert "run the same command again to continue" in errors
    ends = time.monotonic() + 60
    while has_processes(process.pid) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not has_processes(process.pid)


@pytest.mark.slow
def test_the_processes_of_a_launcher_share_the_images(place: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, os, sys
import farout
from farout.scoring import folder
folder._IMAGES_PER_PART = 8
if __name__ == "__main__":
    detector = farout.load({str(place / "d")!r})
    counted, measure = [], detector.measure
    detector.measure = lambda batch, maps=False: counted.extend(batch.keys) or measure(batch, maps)
    farout.score_folder(detector, {str(place / "new")!r}, {str(tmp_path / "two")!r})
    with open({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".json", "w") as file:
        json.dump(counted, file)
    evaluation = farout.evaluate(detector, {str(place / "good")!r}, [{str(place / "new")!r}], {str(tmp_path / "e2")!r})
    assert len(evaluation.metrics)
""")
    in_two_processes(script, 400)
    detector = load(place / "d")
    score_folder(detector, place / "new", tmp_path / "one")
    assert_same_scores(read_scores(tmp_path / "two"), read_scores(tmp_path / "one"), detector)
    shares = [set(pd.read_json(tmp_path / f"{rank}.json")[0]) for rank in (0, 1)]
    assert all(shares)
    assert not shares[0] & shares[1], "no image was measured twice"
    assert len(shares[0] | shares[1]) == COUNT - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(detector, place / "good", [place / "new"], tmp_path / "e1")
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("e1", "e2"))
    assert one["detector"].tolist() == two["detector"].tolist()
    assert one["auroc"].to_numpy() == pytest.approx(two["auroc"].to_numpy(), abs=1e-3, nan_ok=True)
