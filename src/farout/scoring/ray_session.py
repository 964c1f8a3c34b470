"""A connection to Ray with the settings of `--engine ray`: quiet, and with the signals of farout."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from farout.core.errors import FaroutError, MissingExtraError, ReadError, WriteError

__all__ = ["RaySettings", "check_resources", "connect_ray", "count_workers", "run_on_ray"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_ATTEMPTS = 3
"""How often a job is given to a worker: one that ends the process, such as by exhausting its memory, ends the run."""
_JOBS_PER_RUN = 4096
"""Jobs that are in memory at a time; after them, workers are started anew."""


@dataclass(frozen=True)
class RaySettings:
    """How `--engine ray` distributes the work; the other engine uses none of it.

    Args:
        ray_address: address of a running Ray cluster, such as `auto` on one of its machines; default: that of the
            variable RAY_ADDRESS, else Ray is started on this machine.
        ray_workers: number of Ray workers, each with a detector of its own; default: as many as the cluster has CPUs or
            GPUs for.
        gpus_per_worker: GPUs of a Ray worker, also a part of one such as 0.5; 0: its networks run on the CPU.
        cpus_per_worker: CPUs of a Ray worker.
        images_per_part: number of images that a Ray worker is given at a time; its scores are one file in OUT/parts.

    Raises:
        FaroutError: for numbers out of range.
    """

    ray_address: str | None = None
    ray_workers: int | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    images_per_part: int = 256

    def __post_init__(self) -> None:
        for name in ("ray_workers", "images_per_part"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FaroutError(f"{name} is {value}; expected at least 1")
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise FaroutError(f"{name} is {value:g}; expected a whole number, or a part of one such as 0.5")


@contextmanager
def connect_ray(settings: RaySettings) -> Iterator[None]:
    """Connect to Ray, or start it on this machine, and disconnect at the end; a connection of the caller is kept.

    Ray's messages and progress bars are not shown, there is no dashboard, and signals keep the handlers of farout.

    Raises:
        MissingExtraError: if Ray is not installed.
        FaroutError: if Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of the C++ part, which writes to the terminal
    # Ray is about to change what workers without GPUs see, and says so; farout chooses the device of its workers itself
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f'the engine ray requires Ray ({error}); pip install "farout[ray]"') from error
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    try:
        with _keep_signal_handlers(), _silence_libraries():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as error:
        what = f"the Ray cluster {address} cannot be reached" if address else "Ray cannot be started on this machine"
        raise FaroutError(f"{what} ({_first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Drop what libraries in C++ write to the error stream, of which Ray announces that it will write less."""
    sys.stderr.flush()
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def run_on_ray(
    function: Callable[..., T],
    jobs: Iterable[tuple[Any, ...]],
    settings: RaySettings,
    describe: Callable[[int], str] = "job {}".format,
) -> Generator[tuple[int, T], None, None]:
    """Call a function once per job in Ray workers, and yield the job's index and the result when it is completed.

    A job whose worker is lost, because its process is killed or its machine disappears, is given to another one: it may
    be done twice.

    Args:
        function: a function of a module that the workers can import.
        jobs: its arguments for each job, which are taken and pickled when they are sent.
        settings: number of workers, and what each one requires.
        describe: names a job by its index, for messages.

    Raises:
        FaroutError: if a job ends its worker several times. One that the function raises has its class, and names the
            machine.
    """
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:  # another one writes everything to Ray's folder of logs
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    resources = ray.cluster_resources()
    check_resources(resources, settings)
    count = settings.ray_workers or count_workers(resources, settings)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AttemptCounter).remote()
    numbered = enumerate(jobs)
    while rows := [{"index": index, "job": pickle.dumps(job)} for index, job in islice(numbered, _JOBS_PER_RUN)]:
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker,
            fn_constructor_args=(function, attempts),
            batch_size=1,
            concurrency=min(count, len(rows)),
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
        )
        try:
            for row in results.iter_rows():
                index = int(row["index"])
                if row["lost"]:
                    raise FaroutError(
                        f"{_MAX_ATTEMPTS} worker processes ended while they worked on {describe(index)}: they crashed, "
                        "were killed, or memory was short; finished work is kept: run the same command again"
                    )
                if row["error"]:
                    raise pickle.loads(row["error"])  # noqa: S301  # from a worker
                yield index, pickle.loads(row["result"])  # noqa: S301  # from a worker
        except ray.exceptions.RayError as error:
            raise FaroutError(
                f"a Ray worker failed: {_last_line(error)}; finished work is kept: run the same command again (Ray's "
                "logs are in /tmp/ray/session_latest/logs on its machines)"
            ) from error


class _AttemptCounter:
    """Counts how often each job was begun; one object for all workers."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """Count one more attempt and return how many there were."""
        self._counts[index] += 1
        return self._counts[index]


class _RayWorker:
    """Does the jobs, given as batches of one row, as Ray Data calls it."""

    def __init__(self, function: Callable[..., Any], attempts: Any) -> None:
        self._function, self._attempts = function, attempts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        import ray

        index = int(batch["index"][0])
        row: dict[str, list[Any]] = {"index": [index], "lost": [False], "error": [b""], "result": [b""]}
        # Ray itself repeats without end what ends a process
        if ray.get(self._attempts.begin.remote(index)) > _MAX_ATTEMPTS:
            return row | {"lost": [True]}
        try:
            job = pickle.loads(batch["job"][0])  # noqa: S301  # from the process that started the run
            return row | {"result": [pickle.dumps(self._function(*job))]}
        except FaroutError as error:
            return row | {"error": [pickle.dumps(_name_machine(error))]}


def _name_machine(error: FaroutError) -> FaroutError:
    """An error of the same class whose message also says on which machine it was raised."""
    machine = f"on {socket.gethostname()}"
    if isinstance(error, ReadError | WriteError):
        return type(error)(
            error.filename, str(error.strerror), error.errno, "; ".join(filter(None, (error.hint, machine)))
        )
    return type(error)(f"{error} ({machine})")


def check_resources(resources: Mapping[str, float], settings: RaySettings) -> None:
    """Raise FaroutError if no worker fits on this machine; of a cluster, which may grow, the log says what is missing.

    Ray would wait without end, and without a message.
    """
    missing = [
        f"{amount:g} {name}s, of which there are {resources.get(name, 0):g}"
        for name, amount in _required(settings).items()
        if resources.get(name, 0) < amount
    ]
    if missing and not (settings.ray_address or os.environ.get("RAY_ADDRESS")):
        raise FaroutError(f"a Ray worker requires {' and '.join(missing)} on this machine")
    if missing:
        logger.warning("waiting for the Ray cluster to grow: a worker requires %s", " and ".join(missing))


def _required(settings: RaySettings) -> dict[str, float]:
    return {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}


def count_workers(resources: Mapping[str, float], settings: RaySettings) -> int:
    """The number of workers that fit into the resources of the cluster, at least one: a cluster may grow."""
    required = _required(settings)
    fitting = [int(resources.get(name, 0) / amount) for name, amount in required.items() if amount]
    return max(1, min(fitting, default=1))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    """The error of the worker, which follows its traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
