"""Prometheus metrics of the service."""

from __future__ import annotations

import os
from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from farout.scoring.service.batching import ImageScore
from farout.scoring.service.settings import METRICS_VARIABLE

__all__ = ["CONTENT_TYPE_LATEST", "ServiceMetrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServiceMetrics:
    """The metrics of one process; with several processes, `render` returns the sum over all of them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "farout_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.request_seconds = Histogram(
            "farout_request_seconds",
            "Time from the head of a request to the end of the response.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._images = Counter("farout_images", "Images by status.", ["status"], registry=self._registry)
        for status in ("ok", "unreadable", "not a number"):
            self._images.labels(status)
        self._flagged = Counter("farout_flagged_images", "Images with is_ood.", registry=self._registry)
        self._batch_images = Histogram(
            "farout_batch_images", "Images per batch.", buckets=_SIZES, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "farout_batch_seconds", "Time for scoring a batch.", buckets=_SECONDS, registry=self._registry
        )
        self.queue_images = Gauge(
            "farout_queue_images",
            "Images that are accepted and not yet answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def count_batch(self, rows: Sequence[ImageScore], seconds: float) -> None:
        """Count the rows of a batch that was scored."""
        for row in rows:
            self._images.labels(row.status).inc()
        self._flagged.inc(sum(row.is_ood is True for row in rows))
        self._batch_images.observe(len(rows))
        self._batch_seconds.observe(seconds)

    def render(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        if METRICS_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
