"""SIGINT, SIGTERM and SIGHUP end a command cleanly: what is finished is kept, and one message says how to continue."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from farout.cli import main
from farout.core.interruption import Interruption, defer_interruption, handle_signals, received_interruption
from small import pictures

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows does not send these signals to processes")

TRAINING = ["--model.size", "8", "--training.steps", "100000", "--training.batch-size", "2", "--statistics", "20"]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send_and_wait(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.02)


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Set the usual handlers: under nohup or as a background job, signals are ignored, also in new processes."""
    inherited = {number: signal.getsignal(number) for number in STATUS}
    for number in STATUS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in inherited.items():
        signal.signal(number, handler)


# -- in this process: the handlers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_raises_an_interruption_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interruption) as raised, handle_signals():
        send_and_wait(number)
    assert raised.value.exit_status == STATUS[number]
    assert signal.getsignal(number) == before


def test_ignored_signals_and_foreign_handlers_stay_in_place() -> None:
    def foreign(*_: object) -> None: ...

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, foreign)
    try:
        with handle_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "nohup"
            assert signal.getsignal(signal.SIGTERM) == foreign
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_other_threads_and_library_use_install_no_handlers() -> None:
    before = [signal.getsignal(number) for number in STATUS]
    seen: list[object] = []

    def list_sets() -> None:
        with handle_signals():
            seen.extend(signal.getsignal(number) for number in STATUS)

    thread = threading.Thread(target=list_sets)
    thread.start()
    thread.join()
    assert seen == before
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in STATUS] == before


def test_a_deferred_signal_raises_when_the_step_is_complete() -> None:
    done = []

    def work() -> None:
        with defer_interruption():
            with defer_interruption():
                send_and_wait(signal.SIGTERM)
                done.append(1)
            assert received_interruption() is not None
            done.append(2)
        done.append(3)

    with pytest.raises(Interruption), handle_signals():
        work()
    assert done == [1, 2]


def test_two_signals_of_one_event_count_once() -> None:
    """`timeout` sends SIGTERM to its child and to the group; a closed terminal may send SIGHUP twice."""

    def work() -> None:
        try:
            send_and_wait(signal.SIGTERM)
        finally:
            send_and_wait(signal.SIGHUP)

    with pytest.raises(Interruption), handle_signals():
        work()


# -- real processes --------------------------------------------------------------------------------------------------


def start(words: Sequence[object], **options: object) -> subprocess.Popen[str]:
    """A process of the command line in a session of its own."""
    command = [sys.executable, "-m", "farout", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )  # type: ignore[call-overload]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > ends:
            process.kill()
            pytest.fail(f"{process.args} did not get there: {process.communicate()}")
        time.sleep(0.05)


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> None:
    """Wait until the error stream has a line with the pattern."""
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(pattern, line):
            return
    pytest.fail(f"{process.args} ended without {pattern!r}")


def end(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send the signal; returns the one line about it."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == STATUS[number], errors
    assert "Traceback" not in errors
    messages = [line for line in errors.splitlines() if line.startswith("farout: ")]
    assert len(messages) == 1, errors
    return messages[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("signals") / "images", 40)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.training").glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
def test_a_training_writes_a_checkpoint(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    train = ["train", "diffusion", images, "--out", out, "--alpha", "0.2", *TRAINING]
    process = start(train)
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    message = end(process, number)
    assert message.endswith("; add --resume to the same command to continue")
    (checkpoint,) = checkpoints(out)
    assert re.fullmatch(r"step_\d{8}", checkpoint)
    assert not out.exists()

    process = start([*train, "--resume"])
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    assert end(process, number).endswith("; run the same command again to continue")
    assert checkpoints(out) >= [checkpoint], "continued from there"


@pytest.mark.slow
def test_ignored_signals_stay_ignored(images: Path, tmp_path: Path) -> None:
    """As under `nohup`, and as `timeout` and shells send SIGTERM: twice."""
    out = tmp_path / "model"
    process = start(
        ["train", "diffusion", images, "--out", out, "--alpha", "0.2", *TRAINING],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    process.send_signal(signal.SIGHUP)
    time.sleep(2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    end(process, signal.SIGTERM)
    assert checkpoints(out)


@pytest.mark.slow
def test_worker_processes_and_a_signal_to_the_group(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = start(
        ["train", "diffusion", images, "--out", out, "--alpha", "0.2", *TRAINING, "--training.workers", "2"]
    )
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert len(checkpoints(out)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_several_processes_end_together(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    """The launcher passes the signal on to processes that may have received it already."""
    out, words = tmp_path / "model", ["--nproc-per-node", "2", "--master-port", str(29700 + number), "-m", "farout"]
    train = ["train", "diffusion", images, "--out", out, "--alpha", "0.2", *TRAINING]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *map(str, train)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    messages = [line for line in errors.splitlines() if line.startswith("farout: ")]
    assert len(messages) == 1, errors
    assert messages[0].endswith("; add --resume to the same command to continue")
    assert len(checkpoints(out)) == 1


@pytest.mark.slow
def test_a_second_signal_ends_at_once(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    # the step after the first signal takes long: torch waits for a lock that nobody releases
    script = """
import sys, time
from farout.cli import main
from farout.training import loop
loop.TrainingRun._save_interrupted = lambda self: time.sleep(600)
sys.exit(main(sys.argv[1:]))
"""
    train = ["train", "diffusion", images, "--out", out, "--alpha", "0.2", *TRAINING]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, train)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_line(process, r"training: [1-9]\d*/100000 steps")
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
def test_a_score_keeps_what_is_finished(number: signal.Signals, tmp_path: Path) -> None:
    from farout import PCA

    many = pictures(tmp_path / "many", 800)
    PCA(size=32).fit(pictures(tmp_path / "good", 60), statistics=30, alpha=0.1).save(tmp_path / "d")
    score = ["score", tmp_path / "d", many, "--workers", "0", "--no-cache"]
    whole = start([*score, "--out", tmp_path / "whole"])
    _, errors = whole.communicate(timeout=500)
    assert whole.returncode == 0, errors
    # waits after its first part, so that the signal comes before the last one on a machine of any speed
    script = """
import sys, time
from farout.cli import main
from farout.scoring import folder
write_part = folder._write_part
folder._write_part = lambda *arguments: (write_part(*arguments), time.sleep(600))
sys.exit(main(sys.argv[1:]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, [*score, "--out", tmp_path / "r"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list((tmp_path / "r" / "parts").glob("*.json")), process)
    assert end(process, number).endswith("; run the same command again to continue")
    left = sorted(path.name for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert not [name for name in left if name.startswith(".")], "nothing half-written"
    assert "scores.csv" not in left
    again = start([*score, "--out", tmp_path / "r"])
    _, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors
    assert (tmp_path / "r" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()
