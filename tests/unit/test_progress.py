"""The progress of long work in logs and on displays."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from farout.cli import main
from farout.core import progress
from small import pictures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose only entry is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_first_and_last_unit_and_after_each_interval(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="farout")
    with progress.task("scoring", 100) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance()
    assert caplog.messages == [
        "scoring: 1/100 images, 1.0 images/s, 0:01:39 left",
        "scoring: 31/100 images, 1.0 images/s, 0:01:09 left",
        "scoring: 61/100 images, 1.0 images/s, 0:00:39 left",
        "scoring: 91/100 images, 1.0 images/s, 0:00:09 left",
        "scoring: 100/100 images, 1.0 images/s, took 0:01:40",
    ]


def test_resumed_units_do_not_count_for_the_rate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="farout")
    with progress.task("training", 50, unit="steps", items_per_unit=4) as bar:
        bar.skip(40)
        clock[0] += 2
        bar.advance(1, "loss 0.5")
        clock[0] += 30
        bar.advance(1, "loss 0.25")
    assert caplog.messages == [
        "training: 41/50 steps, loss 0.5, 2.0 images/s, 0:00:18 left",
        "training: 42/50 steps, loss 0.25, 0.2 images/s, 0:02:08 left",
    ]


def test_the_last_completed_unit_of_interrupted_work_is_logged(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="farout")

    def work() -> None:
        with progress.task("benchmark", 9, unit="jobs", item=None) as bar:
            for _ in range(3):
                clock[0] += 1
                bar.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert caplog.messages == ["benchmark: 1/9 jobs", "benchmark: 3/9 jobs"]


def test_short_work_is_not_logged(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="farout")
    with progress.task("reading", 2) as bar:
        for _ in range(2):
            clock[0] += 0.4
            bar.advance()
    assert not caplog.messages


def test_nothing_is_logged_by_default_in_the_library(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="farout"), progress.task("scoring", 1) as bar:
        clock[0] += 60
        bar.advance()
    assert not caplog.messages


def test_a_display_replaces_the_log(caplog: pytest.LogCaptureFixture) -> None:
    events: list[tuple[object, ...]] = []

    class Display:
        def open(self, description: str, total: int | None, unit: str) -> int:
            events.append(("open", description, total, unit))
            return 7

        def advance(self, number: int, units: int, note: str, seconds_left: float | None) -> None:
            events.append(("advance", number, units))

        def close(self, number: int) -> None:
            events.append(("close", number))

    caplog.set_level(logging.INFO, logger="farout")
    with progress.show(Display()), progress.task("scoring", 2) as bar:
        bar.advance(2)
    assert events == [("open", "scoring", 2, "images"), ("advance", 7, 2), ("close", 7)]
    assert not caplog.messages


def test_a_command_without_terminal_logs_split_sizes_and_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, rate and time left of a training whose output goes to a file."""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    monkeypatch.setattr(progress, "MIN_LOGGED_S", 0.0)
    root = pictures(tmp_path / "images", 60)
    options = "--training.steps 4 --training.batch-size 2 --training.validate-every 2 --training.device cpu"
    words = ["train", "diffusion", str(root), "--out", str(tmp_path / "model"), "--statistics", "10", "--alpha", "0.1"]
    assert main([*words, *options.split()]) == 0
    error = capsys.readouterr().err
    assert re.search(r"60 images split into 38 for training, 10 for statistics, 12 for calibration", error)
    assert re.search(r"training: 37 images to train on, 1 for validation; 4 steps with batches of 2", error)
    number = r"[\d.e+-]+"
    for step, rest in {1: "", 2: f"validation loss {number}, ", 3: f"validation loss {number}, "}.items():
        line = rf"\d\d:\d\d:\d\d training: {step}/4 steps, loss {number}, {rest}{number} images/s, 0:\d\d:\d\d left"
        assert re.search(line, error), step
    assert re.search(rf"training: 4/4 steps, loss {number}, validation loss {number}, .* took 0:\d\d:\d\d", error)
