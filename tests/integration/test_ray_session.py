"""Work on Ray: every job is done, also if workers fail, and what goes wrong is one clear line."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from farout.core.errors import FaroutError
from farout.scoring import ray_session
from farout.scoring.ray_session import RaySettings, run_on_ray
from ray_cluster import start_ray

TWO = RaySettings(ray_workers=2)


@pytest.mark.parametrize(
    "wrong", [{"ray_workers": 0}, {"gpus_per_worker": -1}, {"gpus_per_worker": 1.5}, {"cpus_per_worker": -0.5}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FaroutError, match=next(iter(wrong))):
        RaySettings(**wrong)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 8),
        ({"cpus_per_worker": 3}, 2),
        ({"gpus_per_worker": 1}, 2),
        ({"gpus_per_worker": 0.5}, 4),
        ({"gpus_per_worker": 4}, 1),
    ],
)
def test_as_many_workers_as_fit_into_the_cluster(settings: dict[str, Any], expected: int) -> None:
    """One at least: a cluster may grow."""
    assert ray_session.count_workers({"CPU": 8.0, "GPU": 2.0}, RaySettings(**settings)) == expected


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FaroutError, match=r"farout\[ray\]"), ray_session.connect_ray(TWO):
        pass


def square(number: int, mark: Path) -> tuple[int, int]:
    """The square of a number; 3 kills the process the first time, 13 always, and 7 is an error of the user."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise FaroutError("seven is unreadable")
    return number, number**2


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    import ray

    with start_ray():
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
        yield ray


@pytest.mark.slow
def test_every_job_is_done_once_also_if_a_worker_is_killed(ray: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    results = list(run_on_ray(square, ((number, mark) for number in range(1, 7)), TWO))
    assert mark.exists(), "a worker was killed"
    assert sorted(results) == [(number - 1, (number, number**2)) for number in range(1, 7)]


@pytest.mark.slow
def test_a_job_that_ends_every_worker_is_named(ray: ModuleType, tmp_path: Path) -> None:
    """Ray alone would repeat it without end."""
    with pytest.raises(FaroutError, match="while they worked on job 1:"):
        list(run_on_ray(square, [(1, tmp_path), (13, tmp_path)], TWO))


@pytest.mark.slow
def test_an_error_of_farout_is_raised_as_it_is(ray: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match=r"^seven is unreadable \(on "):
        list(run_on_ray(square, [(1, tmp_path), (7, tmp_path)], TWO))
