"""Worker processes on this machine, which load the detector once and share jobs with this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from farout.core.devices import resolve_device
from farout.core.errors import FaroutError
from farout.core.interruption import end_with_parent
from farout.detectors.base import Detector
from farout.scoring.scorer import Scorer

__all__ = ["open_worker_scorer", "share_with_workers"]

Job = TypeVar("Job")
T = TypeVar("T")


@contextmanager
def open_worker_scorer(detector: Detector) -> Iterator[Scorer]:
    """Return a scorer of a detector that can be sent to workers; one that is in memory only is saved meanwhile."""
    runtime = {**asdict(detector.runtime), "device": detector.runtime.device.partition(":")[0]}
    runtime["backend"] = detector.backend
    if detector.loaded_from is not None:
        yield Scorer(detector.loaded_from, fingerprint=detector.fingerprint, **runtime)
        return
    with tempfile.TemporaryDirectory(prefix="farout-detector-") as folder:
        detector.save(Path(folder, "detector"))
        yield Scorer(Path(folder, "detector"), fingerprint=detector.fingerprint, **runtime)


def share_with_workers(
    jobs: Iterable[Job],
    scorer: Scorer,
    function: Callable[[Scorer, Job], T],
    *,
    collect: Callable[[Job, T], object],
    run_here: Callable[[Job, Callable[[], None]], object],
    processes: int,
    device: str,
) -> None:
    """Run each job once, in this process or in one of `processes - 1` workers, whoever is free first.

    This process starts at once, while the workers load the detector; if it has done all other jobs before, it does
    theirs as well. The processors are divided among the processes; of several GPUs, the workers use those after that of
    this process, in turn. Workers are started anew ("spawn"), so that a script that calls this must have the usual
    `if __name__ == "__main__":`.

    Args:
        jobs: the jobs, which are taken, and pickled for a worker, when a process is about to be free.
        scorer: a scorer that can be sent to workers.
        function: a function of a module; a worker calls it with the scorer and a job.
        collect: called in this process with a job and the result of a worker.
        run_here: runs a job in this process; it should call its second argument often, which collects the results of
            workers and gives them further jobs.
        processes: number of processes, with this one.
        device: the device that this process uses.

    Raises:
        FaroutError: a worker was killed, as by the system when there is too little memory. An exception of a function
            is raised as it is. In both cases all workers are ended.
    """
    remaining = iter(jobs)
    running: dict[Future[T], Job] = {}
    workers, threads = processes - 1, torch.get_num_threads()
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    gpu = resolve_device(device).index or 0
    started = context.Value("i", gpu + 1)
    settings = (started, max(1, threads // processes))
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings)
    loading = {executor.submit(_load, scorer) for _ in range(workers)}

    def exchange() -> None:
        for loaded in [future for future in loading if future.done()]:
            loading.remove(loaded)
            loaded.result()
        for finished in [future for future in running if future.done()]:
            collect(running.pop(finished), finished.result())
        # one job per worker, and another one that waits for each that has loaded the detector
        for job in islice(remaining, 2 * workers - len(loading) - len(running)):
            running[executor.submit(function, scorer, job)] = job

    def end_workers() -> None:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()

    try:
        torch.set_num_threads(settings[1])
        exchange()
        for job in remaining:
            run_here(job, exchange)
            exchange()
        if len(loading) == workers:  # few jobs are done here before any worker is ready
            end_workers()
            for job in running.values():
                run_here(job, lambda: None)
            running.clear()
        while running:
            wait(running, return_when=FIRST_COMPLETED)
            exchange()
        if loading:
            end_workers()
    except BrokenProcessPool as error:
        end_workers()
        raise FaroutError(
            "a worker process ended unexpectedly, perhaps because memory was short; finished parts are kept: run the "
            "same command again, with fewer processes"
        ) from error
    except BaseException:
        end_workers()
        raise
    finally:
        torch.set_num_threads(threads)
        executor.shutdown(cancel_futures=True)


def _start_worker(started: Any, threads: int) -> None:
    """Prepare a worker: its share of the processors, its GPU, and no reaction to Ctrl-C, which the parent handles."""
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    os.environ["LOCAL_RANK"] = str(number)  # chooses the GPU, as under a launcher
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)


def _load(scorer: Scorer) -> None:
    """Load the detector into a worker, which then has it for all scorers of its folder."""
    _ = scorer.detector
