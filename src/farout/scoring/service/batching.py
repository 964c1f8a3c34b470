"""Joins the images of concurrent requests to batches, which one thread scores."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ImageScore", "ScoringQueue", "SubmittedImage"]

logger = logging.getLogger(__name__)

_RATE_WEIGHT = 0.2
"""Weight of the latest batch in the average time per image."""


@dataclass(frozen=True)
class SubmittedImage:
    """One image of a request.

    Attributes:
        key: key of the image.
        data: the encoded image; None if it could not be obtained.
        reason: why there is no data.
    """

    key: str
    data: bytes | None
    reason: str = ""


@dataclass(frozen=True)
class ImageScore:
    """The row of one image; `score`, `p_value` and `is_ood` are None unless `status` is `ok`."""

    key: str
    score: float | None
    p_value: float | None
    is_ood: bool | None
    status: str
    reason: str | None
    indicators: dict[str, float | None]

    @classmethod
    def unreadable(cls, key: str, reason: str) -> ImageScore:
        """The row of an image that cannot be read."""
        return cls(key, None, None, None, "unreadable", reason, {})


@dataclass
class _Job:
    """The images of one request, of which the first `started` are scored or being scored."""

    images: Sequence[SubmittedImage]
    arrived: float
    future: Future[list[ImageScore]] = field(default_factory=Future)
    rows: list[ImageScore | None] = field(default_factory=list)
    started: int = 0


class ScoringQueue:
    """Scores images in the order of their arrival, in batches over all requests, in one thread.

    A batch starts when it is full, or when its oldest image has waited for `window_s`. Images that arrive while the
    networks are busy wait for the next batch. The scores of an image do not depend on its batch.

    Args:
        score: takes columns `key` and `image`, returns columns `key`, `score`, `p_value`, `is_ood`, `status`, `reason`
            and the indicators, with one row per image in the same order.
        batch_size: maximum number of images in a batch.
        window_s: seconds that an image waits for others.
        on_batch: is called with the rows of each batch and its duration in seconds.
    """

    def __init__(
        self,
        score: Callable[[dict[str, Any]], Mapping[str, Any]],
        batch_size: int,
        window_s: float,
        on_batch: Callable[[Sequence[ImageScore], float], None] = lambda rows, seconds: None,
    ) -> None:
        self._score, self.batch_size, self._window_s, self._on_batch = score, batch_size, window_s, on_batch
        self._jobs: deque[_Job] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        self.seconds_per_image = 0.0
        self._thread = threading.Thread(target=self._run, name="farout scoring", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[SubmittedImage]) -> Future[list[ImageScore]]:
        """Add images; the result has one row per image, in the same order.

        Images of a future that is cancelled are not scored if they have not been started. Raises RuntimeError after
        `close`.
        """
        job = _Job(images, time.monotonic(), rows=[None] * len(images))
        if not images:
            job.future.set_result([])
            return job.future
        with self._condition:
            if self._is_closed:
                raise RuntimeError("the scoring queue is closed")
            self._jobs.append(job)
            self._condition.notify()
        return job.future

    @property
    def is_alive(self) -> bool:
        """Whether the thread that scores is running."""
        return self._thread.is_alive()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse further images and wait until those that were accepted are scored; returns whether they are.

        What is not scored within `timeout` seconds is cancelled.
        """
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._condition:
            for job in self._jobs:
                job.future.cancel()
        return False

    def _run(self) -> None:
        while batch := self._take_batch():
            started = time.monotonic()
            rows = self._score_batch([job.images[index] for job, index in batch])
            seconds = time.monotonic() - started
            before = self.seconds_per_image or seconds / len(batch)
            self.seconds_per_image = (1 - _RATE_WEIGHT) * before + _RATE_WEIGHT * seconds / len(batch)
            self._on_batch([row for row in rows if isinstance(row, ImageScore)], seconds)
            for (job, index), row in zip(batch, rows, strict=True):
                _add_row(job, index, row)

    def _take_batch(self) -> list[tuple[_Job, int]]:
        """Wait for images and return those of the next batch; empty when the queue is closed and all are scored."""
        with self._condition:
            while True:
                while self._jobs and (
                    self._jobs[0].future.done() or self._jobs[0].started == len(self._jobs[0].images)
                ):
                    self._jobs.popleft()
                waiting = sum(len(job.images) - job.started for job in self._jobs if not job.future.done())
                if not waiting and self._is_closed:
                    return []
                if not waiting:
                    self._condition.wait()
                    continue
                seconds_left = self._jobs[0].arrived + self._window_s - time.monotonic()
                if waiting >= self.batch_size or seconds_left <= 0 or self._is_closed:
                    break
                self._condition.wait(seconds_left)
            batch: list[tuple[_Job, int]] = []
            for job in self._jobs:
                while not job.future.done() and job.started < len(job.images) and len(batch) < self.batch_size:
                    batch.append((job, job.started))
                    job.started += 1
            return batch

    def _score_batch(self, images: Sequence[SubmittedImage]) -> list[ImageScore | Exception]:
        """Score images; an error that one of them causes does not affect the others."""
        readable = [image for image in images if image.data is not None]
        scored: list[ImageScore | Exception]
        try:
            columns: dict[str, list[Any]] = {
                "key": [image.key for image in readable],
                "image": [image.data for image in readable],
            }
            scored = [*_split_rows(self._score(columns))] if readable else []
        except Exception as error:  # of one image; the service goes on
            if len(images) > 1:
                logger.warning("a batch of %d images failed (%s); they are scored one by one", len(images), error)
                return [row for image in images for row in self._score_batch([image])]
            logger.exception("an image could not be scored")
            scored = [error]
        rows = iter(scored)
        return [
            next(rows) if image.data is not None else ImageScore.unreadable(image.key, image.reason) for image in images
        ]


def _add_row(job: _Job, index: int, row: ImageScore | Exception) -> None:
    """Store the row of one image; the last one completes the job."""
    with suppress(InvalidStateError):  # cancelled meanwhile
        if isinstance(row, Exception):
            job.future.set_exception(row)
            return
        job.rows[index] = row
        rows = [each for each in job.rows if each is not None]
        if len(rows) == len(job.images):
            job.future.set_result(rows)


def _split_rows(table: Mapping[str, Any]) -> list[ImageScore]:
    """Convert the columns of a scored table to rows; a number that is missing or not finite becomes None."""
    known = ("key", "score", "p_value", "is_ood", "status", "reason")
    columns = {name: list(values) for name, values in table.items()}
    indicators = [name for name in columns if name not in known]
    rows = []
    for index, (key, status) in enumerate(zip(columns["key"], columns["status"], strict=True)):
        reason = columns["reason"][index]
        rows.append(
            ImageScore(
                key=str(key),
                score=_to_number(columns["score"][index]),
                p_value=_to_number(columns["p_value"][index]),
                is_ood=bool(columns["is_ood"][index]) if status == "ok" else None,
                status=str(status),
                reason=str(reason) if isinstance(reason, str) and reason else None,
                indicators={name: _to_number(columns[name][index]) for name in indicators},
            )
        )
    return rows


def _to_number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
