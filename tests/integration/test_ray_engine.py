"""The engine ray: the scores of one process, every image once, also if workers or the whole run are killed."""

import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import farout
from farout.cli import main
from farout.core import storage
from farout.core.errors import DamagedFileWarning, FaroutError, MisleadingResultWarning, StoreError
from farout.core.storage import FilePath
from farout.detectors.base import Detector
from farout.scoring import ray_engine
from farout.scoring.folder import ScoredFolder, read_manifest, read_scores, score_folder
from farout.scoring.ray_engine import score_with_ray
from farout.scoring.ray_session import RaySettings
from farout.scoring.score_parts import ScoredPart, read_part, write_part
from ray_cluster import create_scoring_set
from tolerances import assert_same_scores

COUNT, SIZE = 30, 8
PARTS = [range(start, min(start + SIZE, COUNT)) for start in range(0, COUNT, SIZE)]
RAY = RaySettings(ray_workers=2, images_per_part=SIZE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and images of which one cannot be read."""
    return create_scoring_set(tmp_path_factory.mktemp("ray"), COUNT)


@pytest.fixture(scope="module")
def detector(place: Path) -> Detector:
    return farout.load(place / "detector")


@pytest.fixture(scope="module")
def local(place: Path, detector: Detector) -> Path:
    """What the engine local writes."""
    score_folder(detector, place / "new", place / "local", fdr=0.5, top_images=2)
    return place / "local"


def score(place: Path, out: object, source: object = None, **settings: Any) -> ScoredFolder:
    source = place / "new" if source is None else source
    return score_with_ray(place / "detector", source, out, **{"ray": RAY, "top_images": 2, **settings})


def check_results(out: Path, local: Path, detector: Detector) -> None:
    """Every image once, in the order of the source, with the scores of the engine local."""
    actual, expected = read_scores(out), read_scores(local)
    assert actual.keys == expected.keys
    assert actual.status == expected.status
    assert_same_scores(actual, expected, detector)
    manifest, other = read_manifest(out), read_manifest(local)
    for name in ("counts", "unreadable", "source", "left_out", "further_frames"):
        assert manifest[name] == other[name]
    assert "017-broken.png" in (out / "page.html").read_text()


Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The jobs that Ray would be given; they are done in this process, as a worker does them."""
    done: Calls = []

    def run(
        function: Callable[..., Any], jobs: Iterator[Any], settings: RaySettings, describe: Callable[[int], str]
    ) -> Generator[tuple[int, Any], None, None]:
        for index, job in enumerate(jobs):
            done.append(job)
            yield index, function(*pickle.loads(pickle.dumps(job)))  # noqa: S301

    monkeypatch.setattr(ray_engine, "connect_ray", lambda settings: nullcontext())
    monkeypatch.setattr(ray_engine, "run_on_ray", run)
    return done


@pytest.fixture(params=["folder", "store"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> FilePath:
    return storage.as_file_path(str(tmp_path / "out") if request.param == "folder" else f"memory://{tmp_path.name}/out")


def copy_results(out: FilePath, folder: Path) -> Path:
    for name in storage.list_files(out):
        storage.write_bytes(folder / name, storage.read_bytes(out / name))
    return folder


def test_the_results_are_those_of_one_process(
    place: Path, detector: Detector, local: Path, calls: Calls, out: FilePath, tmp_path: Path
) -> None:
    scored = score(place, str(out), fdr=0.5)
    assert (scored.scored_now, len(calls)) == (COUNT - 1, len(PARTS))
    copy = copy_results(out, tmp_path / "copy")
    check_results(copy, local, detector)
    selected = [pd.read_csv(folder / "scores.csv")["selected"].tolist() for folder in (copy, local)]
    assert selected[0] == selected[1]
    parts = [pd.read_parquet(copy / "parts" / f"{part.start:09d}.parquet") for part in PARTS]
    table = pd.read_csv(copy / "scores.csv")
    np.testing.assert_allclose(pd.concat(parts)["score"].to_numpy(), table["score"].to_numpy(), rtol=1e-15)


def test_a_finished_run_is_not_repeated(place: Path, calls: Calls, out: FilePath) -> None:
    first = score(place, str(out))
    before = {name: storage.read_bytes(out / name) for name in storage.list_files(out)}
    again = score(place, str(out))
    assert (again.counts, again.flagged, again.unreadable) == (first.counts, first.flagged, first.unreadable)
    assert (again.scored_now, len(calls)) == (0, len(PARTS))
    score(place, str(out), top_images=5)
    assert len(calls) == len(PARTS), "another page requires no network of a worker"
    after = {name: storage.read_bytes(out / name) for name in storage.list_files(out)}
    assert {name for name in before if before[name] != after[name]} == {"page.html", "manifest.json"}


def test_files_that_killed_workers_left_are_removed(place: Path, calls: Calls, tmp_path: Path) -> None:
    left = tmp_path / "out" / "parts" / ".000000008.parquet.k3x"
    score(place, tmp_path / "out")
    for _ in ("finished", "resumed"):
        left.write_bytes(b"PAR1")
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
        score(place, tmp_path / "out")
        assert not left.exists()
        (tmp_path / "out" / "parts" / "000000008.json").unlink()


def test_an_interrupted_run_scores_the_missing_parts_only(
    place: Path, detector: Detector, local: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ray_engine.write_part

    def interrupted(*given: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*given)

    monkeypatch.setattr(ray_engine, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(place, tmp_path / "out", fdr=0.5)
    with pytest.raises(StoreError, match="not finished"):
        read_scores(tmp_path / "out")
    monkeypatch.setattr(ray_engine, "write_part", original)
    calls.clear()
    scored = score(place, tmp_path / "out", fdr=0.5)
    assert [job[2] for job in calls] == PARTS[2:]
    assert scored.scored_now == sum(map(len, PARTS[2:])) - 1
    check_results(tmp_path / "out", local, detector)


def test_images_that_a_store_did_not_deliver_are_read_again(
    place: Path, detector: Detector, local: Path, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ray_engine.write_part

    def write_without_network(out: FilePath, part: ScoredPart) -> None:
        if part.indices.start == 0:
            keys = part.scores.keys
            scores = part.scores.select(range(1, len(keys))).reindex(keys)
            part = replace(part, scores=scores, unreadable={keys[0]: "network error: it did not answer"})
        original(out, part)

    monkeypatch.setattr(ray_engine, "write_part", write_without_network)
    assert score(place, tmp_path, fdr=0.5).counts["unreadable"] == 2
    monkeypatch.setattr(ray_engine, "write_part", original)
    calls.clear()
    assert score(place, tmp_path, fdr=0.5).counts["unreadable"] == 1
    assert [job[2] for job in calls] == [PARTS[0]]
    check_results(tmp_path, local, detector)


def test_a_damaged_part_or_table_is_written_again(place: Path, calls: Calls, tmp_path: Path) -> None:
    score(place, tmp_path)
    whole = (tmp_path / "scores.csv").read_bytes()
    (tmp_path / "scores.csv").write_bytes(whole[:-1])
    (tmp_path / "parts" / "000000008.parquet").write_bytes(b"PAR1")
    calls.clear()
    with pytest.warns(DamagedFileWarning) as caught:
        score(place, tmp_path)
    assert {"scores.csv" in str(each.message) or "000000008" in str(each.message) for each in caught} == {True}
    assert [job[2] for job in calls] == [PARTS[1]]
    assert (tmp_path / "scores.csv").read_bytes() == whole


def test_skipped_images_have_no_row_and_are_counted(place: Path, calls: Calls, tmp_path: Path) -> None:
    with pytest.warns(farout.core.errors.LeftOutWarning, match=r"1 of 30 .*017-broken"):
        scored = score(place, tmp_path, policy="skip")
    assert list(scored.unreadable) == ["017-broken.png"]
    assert scored.counts == {"ok": COUNT - 1}
    assert "017-broken.png" not in read_scores(tmp_path).keys


def test_an_image_that_must_not_be_unreadable_ends_the_run(place: Path, calls: Calls, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="017-broken"):
        score(place, tmp_path, policy="raise")


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"precision": "bf16"}])
def test_parts_of_another_device_or_precision_are_refused(
    place: Path, calls: Calls, tmp_path: Path, change: dict[str, str]
) -> None:
    score(place, tmp_path)
    (tmp_path / "manifest.json").unlink()
    part = read_part(tmp_path, PARTS[1])
    part.environment.update(change)
    write_part(tmp_path, part)
    with pytest.raises(StoreError, match=r"000000008 .* cannot be mixed"):
        score(place, tmp_path)


def test_parts_of_other_versions_or_processors_are_marked(place: Path, calls: Calls, tmp_path: Path) -> None:
    score(place, tmp_path)
    (tmp_path / "manifest.json").unlink()
    part = read_part(tmp_path, PARTS[1])
    part.environment["cpu"] = "another"
    write_part(tmp_path, part)
    with pytest.warns(MisleadingResultWarning, match="processors"):
        score(place, tmp_path)
    assert [each["cpu"] == "another" for each in read_manifest(tmp_path)["environments"]] == [False, True]


def test_other_settings_and_other_folders_are_refused(
    place: Path, detector: Detector, calls: Calls, out: FilePath, local: Path, tmp_path: Path
) -> None:
    score(place, str(out))
    with pytest.raises(StoreError, match="images_per_part: 8 before, 9 now"):
        score(place, str(out), ray=RaySettings(images_per_part=9))
    with pytest.raises(StoreError, match="precision"):
        score(place, str(out), precision="bf16")
    storage.write_text(out / "other" / "notes.txt", "mine")
    with pytest.raises(StoreError, match="not empty"):
        score(place, str(out / "other"))
    with pytest.raises(StoreError, match="engine: None before, ray now"):
        score(place, local)
    score(place, tmp_path / "ray")
    with pytest.raises(StoreError, match="engine: ray before, None now"):
        score_folder(detector, place / "new", tmp_path / "ray")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cuda"}, "gpus-per-worker"),
        ({"device": "cpu", "ray": RaySettings(gpus_per_worker=1)}, "gpus-per-worker"),
        ({"precision": "auto"}, "fp32, bf16"),
        ({"fdr": 2}, "fdr"),
        ({"top_images": -1}, "top_images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    place: Path, calls: Calls, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FaroutError, match=reason):
        score(place, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_one_process_does_not_write_to_an_object_store(
    place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be a folder with the name `s3:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FaroutError, match="--engine ray"):
        score_folder(detector, place / "new", "s3://bucket/out")
    for words in (["score", str(place / "detector")], ["fit", "knn"]):
        assert main([*words, str(place / "new"), "--out", "s3://bucket/out"]) == 2
        assert "give a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--ray-workers", "2"], ["--engine", "ray", "--maps"]])
def test_flags_that_the_engine_does_not_use_are_refused(place: Path, tmp_path: Path, words: list[str]) -> None:
    command = ["score", str(place / "detector"), str(place / "new"), "--out", str(tmp_path / "out"), *words]
    assert main(command) == 1
    assert not (tmp_path / "out").exists()


def test_the_driver_needs_no_gpu(place: Path, detector: Detector, calls: Calls, tmp_path: Path) -> None:
    """Its networks run only for the pictures of the page."""
    loaded = ray_engine._load_on_driver(place / "detector", {"device": "cuda", "precision": "fp16"}, "fp16")
    assert loaded.fingerprint == detector.fingerprint
