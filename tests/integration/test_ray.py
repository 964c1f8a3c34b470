"""Ray itself, on this machine: every image once, also if workers or the whole run are killed; object stores."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import farout
from farout.core import storage
from farout.core.errors import FaroutError, StoreError, WriteError
from farout.data.image_source import ImageSource
from farout.detectors.base import Detector, Scores
from farout.scoring import ray_engine
from farout.scoring.folder import read_manifest, read_scores, score_folder
from farout.scoring.ray_engine import score_with_ray
from farout.scoring.ray_session import RaySettings, run_on_ray
from ray_cluster import create_scoring_set, start_ray
from tolerances import assert_same_scores

pytestmark = pytest.mark.slow

COUNT, SIZE = 30, 8
TWO = RaySettings(ray_workers=2, images_per_part=SIZE)


@pytest.fixture(scope="module")
def ray(s3_server: str) -> Iterator[ModuleType]:
    """Ray with two CPUs, whose workers know the S3 server of the tests."""
    import ray

    with start_ray():
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
        yield ray


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and images of which one cannot be read."""
    return create_scoring_set(tmp_path_factory.mktemp("ray"), COUNT)


@pytest.fixture(scope="module")
def detector(place: Path) -> Detector:
    return farout.load(place / "detector")


@pytest.fixture(scope="module")
def local(place: Path, detector: Detector) -> Scores:
    """The scores of one process."""
    score_folder(detector, place / "new", place / "local", top_images=2)
    return read_scores(place / "local")


def square(number: int, mark: Path) -> tuple[int, int]:
    """The square of a number; 3 kills the process the first time, 13 always, and 7 is an error of the user."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise StoreError("seven is unreadable")
    if number == 8:
        raise WriteError(mark, os.strerror(errno.ENOSPC), errno.ENOSPC, "eight is too large")
    return number, number**2


def test_every_job_is_done_once_also_if_a_worker_is_killed(ray: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    results = list(run_on_ray(square, ((number, mark) for number in range(1, 7)), TWO))
    assert mark.exists(), "a worker was killed"
    assert sorted(results) == [(number - 1, (number, number**2)) for number in range(1, 7)]


def test_a_job_that_ends_every_worker_is_named(ray: ModuleType, tmp_path: Path) -> None:
    """Ray alone would repeat it without end."""
    with pytest.raises(FaroutError, match="while they worked on job 1:"):
        list(run_on_ray(square, [(1, tmp_path), (13, tmp_path)], TWO))


def test_an_error_of_farout_is_raised_as_it_is(ray: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^seven is unreadable \(on "):
        list(run_on_ray(square, [(1, tmp_path), (7, tmp_path)], TWO))
    with pytest.raises(WriteError, match=r"eight is too large; on ") as raised:
        list(run_on_ray(square, [(1, tmp_path), (8, tmp_path)], TWO))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def score_part_and_die(scorer: farout.Scorer, images: ImageSource, indices: range, out: Path) -> Any:
    """As a worker, whose process is killed once after it has written a part."""
    result = ray_engine._score_part(scorer, images, indices, out)
    mark = out.parent / "mark"
    if indices.start == SIZE and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def test_two_workers_of_which_one_is_killed_give_the_scores_of_one_process(
    ray: ModuleType, place: Path, detector: Detector, local: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "_score_part", score_part_and_die, raising=True)
    scored = score_with_ray(place / "detector", place / "new", tmp_path / "out", ray=TWO, top_images=2)
    assert (tmp_path / "mark").exists(), "a worker was killed"
    actual = read_scores(tmp_path / "out")
    assert actual.keys == local.keys, "every image once, in the order of the source"
    assert actual.status == local.status
    assert_same_scores(actual, local, detector)
    assert scored.unreadable == {"017-broken.png": read_manifest(place / "local")["unreadable"]["017-broken.png"]}
    assert scored.scored_now == COUNT - 1


KILLED = """
import os, signal, sys
from farout.cli import main
from farout.scoring import ray_engine
original = ray_engine.run_on_ray
def run_on_ray(*given):
    for number, result in enumerate(original(*given)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield result
ray_engine.run_on_ray = run_on_ray
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_command_continues_on_an_object_store(
    ray: ModuleType, place: Path, bucket: str, detector: Detector, local: Scores, tmp_path: Path
) -> None:
    """The command starts Ray itself, reads images from S3 and writes there; nothing is scored twice."""
    for path in sorted((place / "new").iterdir()):
        storage.write_bytes(f"{bucket}/new/{path.name}", path.read_bytes())
    words = ["score", place / "detector", f"{bucket}/new", "--out", f"{bucket}/out", "--engine", "ray"]
    words += ["--ray-address", "local", "--ray-workers", "1", "--images-per-part", SIZE, "--top-images", "2"]
    command = [sys.executable, "-c", KILLED, *map(str, words)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = storage.as_file_path(f"{bucket}/out")
    before = {name: storage.read_bytes(out / name) for name in storage.list_files(out)}
    parts = [name for name in before if name.endswith(".parquet")]
    assert 2 <= len(parts) <= 4
    assert "manifest.json" not in before
    scored = score_with_ray(place / "detector", f"{bucket}/new", f"{bucket}/out", ray=TWO, top_images=2)
    assert scored.scored_now <= COUNT - 2 * SIZE
    after = {name: storage.read_bytes(out / name) for name in storage.list_files(out)}
    assert {name: after[name] for name in before} == before
    for name in ("scores.csv", "manifest.json"):
        storage.write_bytes(tmp_path / name, after[name])
    actual = read_scores(tmp_path)
    assert actual.keys == local.keys
    assert_same_scores(actual, local, detector)
    assert b"017-broken.png" in after["page.html"]


def test_a_scorer_is_a_class_for_map_batches(
    ray: ModuleType, place: Path, local: Scores, detector: Detector, tmp_path: Path
) -> None:
    """The way of users of Ray Data, who read and write with it."""
    import ray.data

    files = sorted(path for path in (place / "new").iterdir() if "broken" not in path.name)
    table = pd.DataFrame({"key": [path.name for path in files], "image": [path.read_bytes() for path in files]})
    table.to_parquet(tmp_path / "images.parquet")
    scored = (
        ray.data.read_parquet(str(tmp_path / "images.parquet"))
        .map_batches(farout.Scorer, fn_constructor_args=(str(place / "detector"),), batch_size=8, concurrency=1)
        .to_pandas()
    )
    expected = pd.DataFrame({"key": local.keys, "score": local.score}).set_index("key")["score"]
    actual = scored.set_index("key")["score"]
    assert sorted(actual.index) == [path.name for path in files]
    scale = np.std(detector.calibration_scores[detector.score_name])
    np.testing.assert_allclose(actual, expected[actual.index], atol=1e-4 * scale, rtol=0)
