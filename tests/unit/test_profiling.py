"""`--profile`: seconds by stage."""

import json
import threading
from itertools import count
from pathlib import Path

import pytest

import farout
from farout.cli import main
from farout.core import profiling
from farout.core.profiling import STAGES, count_images, is_profiling, record_profile, timed
from small import pictures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later than the one before."""
    ticks = count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_a_stage_inside_another_counts_for_itself_only() -> None:
    @timed("reading")
    def read(depth: int) -> int:
        return read(depth - 1) if depth else 7

    with record_profile() as profile:  # 0
        with timed("listing"):  # 1
            assert read(1) == 7  # 2, 3, 4, 5
            with pytest.raises(KeyError), timed("decoding"):  # 6
                raise KeyError  # 7
        count_images(3)  # 8
    assert profile.seconds == {"listing": 3, "reading": 3, "decoding": 1}  # of 8 between 1 and 8, less the turns
    assert (profile.wall, profile.other, profile.images) == (9, 2, 3)


def test_threads_and_processes_are_counted_separately() -> None:
    with record_profile() as profile:
        thread = threading.Thread(target=timed("decoding")(lambda: None))
        thread.start()
        thread.join()
        profiling.add_process_profile({"images": 2, "seconds": {"network": 4.0}, "thread_seconds": {"decoding": 1.0}})
        with timed("network"):
            pass
    assert set(profile.thread_seconds) == {"decoding"}
    assert set(profile.seconds) == {"network"}
    assert profile.process_seconds == {"network": 4.0, "decoding": 1.0}
    assert profile.to_dict()["images"] == 2
    assert list(profile.to_dict()["process_seconds"]) == ["decoding", "network"]


def test_nothing_is_recorded_outside_and_a_profile_may_begin_and_end_inside_a_stage() -> None:
    with timed("reading"):
        recorded = record_profile()
        profile = recorded.__enter__()
        assert is_profiling()
    with timed("page"):
        recorded.__exit__(None, None, None)
    with timed("network"):
        count_images(1)
    assert not is_profiling()
    assert not profile.seconds
    assert not profile.images


def test_score_prints_the_stages_and_writes_the_same_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pictures(tmp_path / "images", 40)
    farout.KNN(size=32).fit(images, statistics=20, alpha=0.1).save(tmp_path / "knn")
    words = ["score", str(tmp_path / "knn"), str(tmp_path / "images"), "--no-cache", "--limit", "8"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert "seconds by stage" not in capsys.readouterr().out
    assert not (tmp_path / "plain" / "profile.json").exists()
    assert main([*words, "--out", str(tmp_path / "profiled"), "--profile"]) == 0
    printed = capsys.readouterr().out
    for word in ("loading", "listing", "reading", "decoding", "resizing", "network", "statistics", "writing", "page"):
        assert f"\n{word} " in printed
    assert "8 images measured" in printed
    for name in ("scores.csv", "measurements.parquet"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "profiled" / name).read_bytes()
    stored = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert stored["images"] == 8
    assert 0 < stored["seconds"]["network"] < stored["wall"]
    assert stored["thread_seconds"]["resizing"] > 0
    assert set(stored["seconds"]) <= set(STAGES)
    assert main(["score", *words[1:], "--out", str(tmp_path / "profiled"), "--profile"]) == 0  # finished results
    assert not is_profiling()
