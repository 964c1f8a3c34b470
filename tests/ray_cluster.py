"""Ray on this machine, for tests: two CPUs, little memory, and its own token."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import farout
from small import pictures

ATTEMPTS = 3


def create_scoring_set(root: Path, count: int) -> Path:
    """Create a detector, and this many images of which one cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        farout.PCA(size=32).fit(pictures(root / "good", 40), statistics=20, alpha=0.1).save(root / "detector")
    pictures(root / "new", count - 1, low=60, spread=150, seed=3)
    (root / "new" / "017-broken.png").write_text("not a picture")
    return root


@contextmanager
def start_ray(cpus: int = 2) -> Iterator[None]:
    """Ray with this many CPUs; its start is repeated, because on a busy machine its processes may miss their deadlines.

    Workers get the environment of this process, `PYTHONPATH` included.
    """
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex * 2)  # else a file in the home folder
    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=80 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            break
        except Exception:  # whatever it is, it is the start
            ray.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(2)
    try:
        yield
    finally:
        ray.shutdown()
