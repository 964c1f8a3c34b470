"""Seconds by stage of a command: what `--profile` prints."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from typing import Any, Literal

__all__ = [
    "STAGES",
    "Profile",
    "Stage",
    "add_process_profile",
    "count_images",
    "is_profiling",
    "record_profile",
    "timed",
]

Stage = Literal[
    "loading",
    "listing",
    "waiting for images",
    "reading",
    "decoding",
    "hashing",
    "resizing",
    "training",
    "network",
    "statistics",
    "writing",
    "page",
]
STAGES: Mapping[Stage, str] = {
    "loading": "networks from files, and the libraries that build them",
    "listing": "listing the source, without decoding",
    "waiting for images": "the main thread waits for the threads that prepare images (--workers)",
    "reading": "bytes from files and object stores",
    "decoding": "from bytes to pixels",
    "hashing": "content hashes of pixels, which seed random numbers and find cached features",
    "resizing": "from pixels to the input of the network, with the resize to the native size",
    "training": "training of networks",
    "network": "evaluation of networks, and what a method computes of their outputs",
    "statistics": "fitting of statistics, and scores from measurements",
    "writing": "files of results, checkpoints and cached features",
    "page": "the HTML report",
}
"""Stages, in the order of an image's way through them."""


class Profile:
    """Wall-clock seconds by stage; a stage inside another one counts only for itself.

    Attributes:
        seconds: in the thread that recorded the profile.
        thread_seconds: in its other threads, all of them together; they run at the same time as that thread.
        process_seconds: in all threads of worker processes.
        images: number of images that were measured.
        wall: from the beginning to the end of the profile.
        startup: CPU seconds of the process before it began, for Python, imports and settings.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.thread_seconds: defaultdict[str, float] = defaultdict(float)
        self.process_seconds: defaultdict[str, float] = defaultdict(float)
        self.images, self.wall, self.startup = 0, 0.0, time.process_time()
        self._thread, self._lock = threading.get_ident(), threading.Lock()

    def add(self, stage: Stage, seconds: float) -> None:
        """Add time that this thread has spent."""
        table = self.seconds if threading.get_ident() == self._thread else self.thread_seconds
        with self._lock:
            table[stage] += seconds

    def add_images(self, count: int) -> None:
        """Count images."""
        with self._lock:
            self.images += count

    def add_process(self, other: Mapping[str, Any]) -> None:
        """Add the profile of a part of the work in a worker process, as `to_dict` returns it."""
        self.add_images(other["images"])
        for name in ("seconds", "thread_seconds"):
            for stage, seconds in other[name].items():
                self.process_seconds[stage] += seconds

    @property
    def other(self) -> float:
        """Seconds that belong to no stage."""
        return max(0.0, self.wall - sum(self.seconds.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the stages in their order."""
        tables = ("seconds", "thread_seconds", "process_seconds")
        ordered = {name: {s: vars(self)[name][s] for s in STAGES if s in vars(self)[name]} for name in tables}
        speed = self.images / self.wall if self.wall else 0.0
        numbers = {"wall": self.wall, "other": self.other, "startup_cpu": self.startup, "images_per_s": speed}
        return {"images": self.images, **numbers, **ordered}


class _Frames(threading.local):
    """The stages that a thread is in: each with its timer and when its time began to count."""

    def __init__(self) -> None:
        self.open: list[tuple[timed, float]] = []


_profile: Profile | None = None
"""One per process, not a context variable: the threads that prepare images have contexts of their own."""
_frames = _Frames()


class timed(ContextDecorator):  # noqa: N801  # used like a function
    """Counts the time inside as that of a stage, if a profile is recorded; a context manager and a decorator.

    Not for code that yields: other stages may run before it continues.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage: Stage = stage

    def __enter__(self) -> None:
        profile = _profile  # another thread may end it meanwhile
        if profile is None:
            return
        now, frames = time.perf_counter(), _frames.open
        if frames:
            outer, since = frames[-1]
            profile.add(outer.stage, now - since)
        frames.append((self, now))

    def __exit__(self, *error: object) -> None:
        frames = _frames.open
        if not frames or frames[-1][0] is not self:  # the profile began inside
            return
        now = time.perf_counter()
        profile, (_, since) = _profile, frames.pop()
        if profile is not None:
            profile.add(self.stage, now - since)
        if frames:
            frames[-1] = (frames[-1][0], now)


def count_images(count: int) -> None:
    """Count images in the profile that is recorded, if any."""
    profile = _profile
    if profile is not None:
        profile.add_images(count)


def add_process_profile(profile: Mapping[str, Any]) -> None:
    """Add what a worker process has recorded, as `Profile.to_dict` returns it, to the profile that is recorded."""
    if _profile is not None:
        _profile.add_process(profile)


def is_profiling() -> bool:
    """Whether a profile is recorded."""
    return _profile is not None


@contextmanager
def record_profile() -> Iterator[Profile]:
    """Record the stages of all threads of this process until the context ends."""
    global _profile
    if _profile is not None:
        raise RuntimeError("a profile is already recorded in this process")
    profile, started = Profile(), time.perf_counter()
    _profile = profile
    try:
        yield profile
    finally:
        profile.wall, _profile = time.perf_counter() - started, None
