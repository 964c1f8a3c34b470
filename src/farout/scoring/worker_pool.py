"""Worker processes on this machine: each loads the detector once and measures one part after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from farout.core.errors import FaroutError
from farout.core.interruption import end_with_parent
from farout.detectors.base import Detector
from farout.scoring.scorer import Scorer

__all__ = ["open_worker_scorer", "run_in_workers"]

T = TypeVar("T")


@contextmanager
def open_worker_scorer(detector: Detector) -> Iterator[Scorer]:
    """Return a scorer of a detector that can be sent to workers; one that is in memory only is saved meanwhile."""
    runtime = {**asdict(detector.runtime), "device": detector.runtime.device.partition(":")[0]}
    if detector.loaded_from is not None:
        yield Scorer(detector.loaded_from, fingerprint=detector.fingerprint, **runtime)
        return
    with tempfile.TemporaryDirectory(prefix="farout-detector-") as folder:
        detector.save(Path(folder, "detector"))
        yield Scorer(Path(folder, "detector"), fingerprint=detector.fingerprint, **runtime)


def run_in_workers(
    function: Callable[..., T], jobs: Iterable[tuple[Any, ...]], processes: int
) -> Generator[tuple[int, T], None, None]:
    """Call a function once per job in worker processes, and yield the job's index and the result when it is completed.

    The processors are divided among the workers; of several GPUs, the workers use one each in turn. Workers are started
    anew ("spawn"), so that a script that calls this must have the usual `if __name__ == "__main__":`.

    Args:
        function: a function of a module.
        jobs: its arguments for each job, which are taken and pickled when a worker is about to be free.
        processes: number of workers.

    Raises:
        FaroutError: a worker was killed, as by the system when there is too little memory. An exception of the function
            is raised as it is. In both cases, and when the iterator is closed, all workers are ended.
    """

    def wait_for_some() -> Iterator[tuple[int, T]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()

    context = multiprocessing.get_context("spawn")
    started = context.Value("i", 0)
    threads = max(1, torch.get_num_threads() // processes)
    executor = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(started, threads))
    others = multiprocessing.active_children()
    running: dict[Future[T], int] = {}
    is_finished = False
    try:
        for index, job in enumerate(jobs):
            running[executor.submit(function, *job)] = index
            if len(running) >= 2 * processes:  # for each worker, one job waits
                yield from wait_for_some()
        while running:
            yield from wait_for_some()
        is_finished = True
    except BrokenProcessPool as error:
        raise FaroutError(
            "a worker process ended unexpectedly, perhaps because memory was short; finished parts are kept: run the "
            "same command again, with fewer processes"
        ) from error
    finally:
        if not is_finished:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
        executor.shutdown(cancel_futures=True)


def _start_worker(started: Any, threads: int) -> None:
    """Prepare a worker: its share of the processors, its GPU, and no reaction to Ctrl-C, which the parent handles."""
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    os.environ["LOCAL_RANK"] = str(number)  # chooses the GPU, as under a launcher
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)
