"""`farout serve`."""

from __future__ import annotations

from typing import Any

from farout.cli.terminal import print_text
from farout.data.read_settings import ReadSettings
from farout.scoring.service.server import run_service
from farout.scoring.service.settings import ServiceSettings

__all__ = ["print_end", "serve"]


def serve(
    detector: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    processes: int = 1,
    settings: ServiceSettings,
    reading: ReadSettings,
    runtime: dict[str, Any],
) -> None:
    """Serve a detector over HTTP: POST /score, GET /health, /info, /metrics and /docs.

    Args:
        detector: folder of a fitted detector.
        host: address to listen on; 0.0.0.0 for all addresses of this machine.
        port: port to listen on; 0 chooses one that is free.
        processes: number of processes that share the port, each with its own copy of the detector.
        settings: limits and times of the service.
        reading: how images are read.
        runtime: runtime settings that replace those of the fit.
    """
    run_service(
        detector, host=host, port=port, processes=processes, settings=settings, reading=reading, runtime=runtime
    )


def print_end(result: None) -> None:
    """Prints that the service has ended as it should."""
    print_text("stopped; all accepted requests were finished")
