"""Running the service: one process, or several that share a port."""

from __future__ import annotations

import ipaddress
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farout.core.errors import FaroutError, FaroutWarning, MissingExtraError
from farout.core.interruption import end_with_parent, handle_signals
from farout.data.read_settings import ReadSettings
from farout.detectors.base import find_detector
from farout.scoring.scorer import Scorer
from farout.scoring.service.settings import METRICS_VARIABLE, ServiceSettings, read_token

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["run_service"]

logger = logging.getLogger(__name__)

_STARTUP_FAILURE = 3
"""Exit status of a process that could not load the detector."""
_CUT_OFF = 4
"""Exit status of a process that stopped before all accepted requests were finished."""
_SOON_S = 10.0
"""A process that ends so soon after its start has probably ended for a reason that remains."""
_MAX_SOON = 3


@dataclass(frozen=True)
class _Arguments:
    """What a process needs to serve."""

    folder: Path
    settings: ServiceSettings
    reading: ReadSettings
    runtime: Mapping[str, Any]
    token: str | None


def run_service(
    detector: str | Path,
    *,
    host: str,
    port: int,
    processes: int,
    settings: ServiceSettings,
    reading: ReadSettings,
    runtime: Mapping[str, Any],
) -> None:
    """Serve a detector until SIGINT or SIGTERM; accepted requests are finished first.

    Args:
        detector: folder of a fitted detector.
        host: address to listen on.
        port: port to listen on; 0: one that is free.
        processes: number of processes, each of which loads the detector.
        settings: limits and times.
        reading: limits of an image.
        runtime: runtime settings that replace those of the fit; features of clients' images are not stored on disk
            unless `cache` is given.

    Raises:
        FaroutError: the detector cannot be loaded, the port is not available, or requests were not finished within
            `settings.stop_timeout` seconds after the signal.
        MissingExtraError: without the extra `farout[serve]`.
    """
    try:
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'the service requires `pip install "farout[serve]"` ({error})') from error
    if reading.frames != "first":
        raise FaroutError("the service gives one score per image; frames must be first")
    if not 1 <= processes <= 1024:
        raise FaroutError(f"processes is {processes}; expected 1 to 1024")
    token = read_token(settings)
    arguments = _Arguments(find_detector(detector), settings, reading, {"cache": False, **runtime}, token)
    with _listen(host, port) as listener:
        if token is None and not _is_loopback(listener.getsockname()[0]):
            message = f"the service listens on {host} without a token, so whoever reaches it can use it"
            warnings.warn(f"{message}; set FAROUT_TOKEN or --token-file", FaroutWarning, stacklevel=2)
        cut_off = _serve(arguments, listener) if processes == 1 else _supervise(arguments, listener, processes)
    if cut_off:
        raise FaroutError(
            f"some requests were not finished within {settings.stop_timeout:g} s after the signal (--stop-timeout)"
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # on Windows, it would let two programs use the same port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
            listener.set_inheritable(True)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FaroutError(f"cannot listen on {host}, port {port}: {reason}; give another --host or --port") from error
    return listener


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _serve(arguments: _Arguments, listener: socket.socket) -> bool:
    """Serve in this process until a signal arrives; returns whether requests were cut off."""
    import uvicorn

    from farout.scoring.service.app import create_app

    scorer = Scorer(arguments.folder, reading=arguments.reading, **arguments.runtime)
    message = f"serving {arguments.folder} at {_url_of(listener)} (GET /docs describes the requests)"
    app = create_app(
        scorer,
        arguments.settings,
        reading=arguments.reading,
        token=arguments.token,
        on_start=lambda: logger.info(message),
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(arguments.settings.stop_timeout)),
    )
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        server.run(sockets=[listener])
    return bool(app.state.service.cut_off)


def _serve_in_process(arguments: _Arguments, listener: socket.socket) -> None:
    """The main function of one of several processes."""
    logging.getLogger("farout").setLevel(logging.INFO)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    with handle_signals():
        end_with_parent()
        try:
            status = _CUT_OFF if _serve(arguments, listener) else 0
        except FaroutError as error:
            logger.error("%s", error)
            status = _STARTUP_FAILURE
        except KeyboardInterrupt:  # before it could serve
            status = 0
    raise SystemExit(status)


def _supervise(arguments: _Arguments, listener: socket.socket, processes: int) -> bool:
    """Serve in several processes until a signal arrives, and replace those that end; returns whether requests were cut
    off.
    """
    metrics = tempfile.mkdtemp(prefix="farout-metrics-")
    before = os.environ.get(METRICS_VARIABLE)
    os.environ[METRICS_VARIABLE] = metrics  # read by prometheus_client when the processes import it
    context = multiprocessing.get_context("spawn")

    def start() -> tuple[SpawnProcess, float]:
        process = context.Process(target=_serve_in_process, args=(arguments, listener), name="farout serve")
        process.start()
        return process, time.monotonic()

    running: list[tuple[SpawnProcess, float]] = []
    cut_off, soon = False, 0
    try:
        try:
            logger.info("starting %d processes at %s", processes, _url_of(listener))
            running += [start() for _ in range(processes)]
            while True:
                wait([process.sentinel for process, _ in running])
                for index, (process, started) in enumerate(running):
                    if process.is_alive():
                        continue
                    if process.exitcode == _STARTUP_FAILURE:
                        raise FaroutError("a process could not start, see the message above")
                    soon = soon + 1 if time.monotonic() - started < _SOON_S else 0
                    if soon == _MAX_SOON:
                        raise FaroutError(f"processes end soon after their start (exit status {process.exitcode})")
                    logger.warning("process %d ended with status %s; it is replaced", process.pid, process.exitcode)
                    _forget_gauges(process, metrics)
                    running[index] = start()
        except KeyboardInterrupt:  # the signal that ends the service: what follows stops its processes
            pass
    finally:
        listener.close()  # with this one open, new connections would wait for a process to accept them
        for process, _ in running:
            process.terminate()
        deadline = time.monotonic() + arguments.settings.stop_timeout + _SOON_S
        for process, _ in running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            # a process that was still starting has accepted no request
            cut_off |= process.exitcode not in (0, _STARTUP_FAILURE, -signal.SIGTERM)
        if before is None:
            del os.environ[METRICS_VARIABLE]
        else:
            os.environ[METRICS_VARIABLE] = before
        shutil.rmtree(metrics, ignore_errors=True)
    return cut_off


def _forget_gauges(process: SpawnProcess, folder: str) -> None:
    """Remove the gauges of a process that has ended; its counters stay in the sums."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(process.pid, path=folder)  # type: ignore[no-untyped-call]
