"""Settings of the engine ray; what requires Ray itself is in test_ray.py."""

import sys
from typing import Any

import pytest

from farout.core.errors import FaroutError
from farout.scoring import ray_session
from farout.scoring.ray_session import RaySettings

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


def test_workers_for_which_there_is_no_gpu_are_refused_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resources = {"CPU": 2.0}
    ray_session.check_resources(resources, TWO)
    with pytest.raises(FaroutError, match="requires 1 GPUs, of which there are 0"):
        ray_session.check_resources(resources, RaySettings(gpus_per_worker=1))


def test_a_cluster_may_grow(caplog: pytest.LogCaptureFixture) -> None:
    ray_session.check_resources({"CPU": 0.0}, RaySettings(ray_address="head:6379"))
    assert "waiting for the Ray cluster to grow: a worker requires 1 CPUs" in caplog.text
