"""A connection to Ray with the settings of `--engine ray`: quiet, and with the signals of farout."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from farout.core.errors import FaroutError, MissingExtraError

__all__ = ["RaySettings", "WorkItem", "connect_ray", "count_workers", "map_items"]

_MAX_ATTEMPTS = 3
"""How often an item is given to a worker: one that ends the process, such as by exhausting its memory, ends the run."""
_ITEMS_PER_RUN = 4096
"""Items that the driver holds in memory at a time."""


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

    Raises:
        FaroutError: for numbers out of range.
    """

    ray_address: str | None = None
    ray_workers: int | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1

    def __post_init__(self) -> None:
        if self.ray_workers is not None and self.ray_workers < 1:
            raise FaroutError(f"ray_workers is {self.ray_workers}; expected at least 1")
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise FaroutError(f"{name} is {value:g}; expected a whole number, or a part of one such as 0.5")


@dataclass(frozen=True)
class WorkItem:
    """A piece of work for `map_items`.

    Attributes:
        name: what it is, for messages; different for each item.
        pack: returns its content, when it is sent.
    """

    name: str
    pack: Callable[[], bytes]


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
        with _keep_signal_handlers():
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


def map_items(
    worker: Callable[..., Callable[[bytes], Mapping[str, Any]]],
    arguments: Sequence[Any],
    items: Sequence[WorkItem],
    settings: RaySettings,
) -> Iterator[Mapping[str, Any]]:
    """Yield the result of each item as soon as it is there, in any order.

    An item whose worker fails, because its process is killed or its machine disappears, is given to another one, so
    that it may be worked on twice.

    Args:
        worker: a class whose objects are called with the content of an item, and return a dict of JSON values. One is
            created per process, with `arguments`.
        arguments: arguments of the class.
        items: the work.
        settings: number of workers, and what each one requires.

    Raises:
        FaroutError: if a worker raises an error, or if an item ends its worker several times.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:  # another one writes everything to Ray's folder of logs
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    count = settings.ray_workers or count_workers(ray.cluster_resources(), settings)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AttemptCounter).remote()
    for start in range(0, len(items), _ITEMS_PER_RUN):
        rows = [{"name": item.name, "content": item.pack()} for item in items[start : start + _ITEMS_PER_RUN]]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker,
            fn_constructor_args=(worker, tuple(arguments), attempts),
            batch_size=1,
            concurrency=min(count, len(rows)),
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
        )
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise FaroutError(row["error"])
                yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise FaroutError(
                f"a Ray worker failed: {_last_line(error)}; what is finished is kept, and the same command continues "
                "there (Ray's logs are in /tmp/ray/session_latest/logs of its machines)"
            ) from error


class _AttemptCounter:
    """Counts how often the work on an item was begun; one object for all workers."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Count one more attempt and return how many there were."""
        self._counts[name] += 1
        return self._counts[name]


class _RayWorker:
    """Calls a worker of `map_items` for batches of one row, as Ray Data gives them."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...], attempts: Any) -> None:
        self._create, self._attempts = partial(worker, *arguments), attempts
        self._worker: Callable[[bytes], Mapping[str, Any]] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        import ray

        name = str(batch["name"][0])
        # Ray repeats without end what ends a process
        if ray.get(self._attempts.begin.remote(name)) > _MAX_ATTEMPTS:
            reason = f"{_MAX_ATTEMPTS} worker processes ended while they worked on {name}: out of memory, or killed"
            return {"result": [""], "error": [reason]}
        try:
            # here, because Ray repeats a failed construction without end, too
            self._worker = self._worker or self._create()
            return {"result": [json.dumps(self._worker(batch["content"][0]))], "error": [""]}
        except FaroutError as error:
            return {"result": [""], "error": [f"{error} (on {socket.gethostname()})"]}


def count_workers(resources: Mapping[str, float], settings: RaySettings) -> int:
    """The number of workers that fit into the resources of the cluster, at least one: a cluster may grow."""
    required = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    fitting = [int(resources.get(name, 0) / amount) for name, amount in required.items() if amount]
    return max(1, min(fitting, default=1))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    """The error of the worker, which follows its traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
