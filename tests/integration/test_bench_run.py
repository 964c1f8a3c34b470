"""A benchmark of seconds, from one command: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from farout import load
from farout.benchmark import sets
from farout.benchmark.jobs import Jobs
from farout.benchmark.plan import make_plan
from farout.benchmark.reading import parse_spec, read_spec
from farout.benchmark.rehearsal import Rehearsal
from farout.benchmark.run import Done, Report, preview, report, run_bench
from farout.cli import main
from farout.core.errors import FaroutError
from farout.core.store import read_json
from farout.data.sources import open_source
from farout.detectors.base import Detector
from farout.diffusion.config import DiffusionConfig
from farout.evaluation.evaluate import COLUMNS
from small import classifier, pictures

CONTENT: dict[str, Any] = {
    "train": "sample_fashion:train@classes=0,1",
    "id": "sample_fashion:test@classes=0,1",
    "ood": {"held out": ["sample_fashion:test@classes=2"], "far": ["svhn:test"]},
    "limit": 10,
    "train_limit": 100,
    "control_limit": 60,
    "alpha": 0.1,
    "statistics": 30,
    "networks": {
        "generator": {"kind": "diffusion", "preset": "classes", "training": {"steps": 1, "batch_size": 4}},
        "plain": {"kind": "classifier", "training": {"steps": 2, "batch_size": 8}},
        "exposed": {
            "kind": "classifier",
            "preset": "ncis_tiny",
            "outliers": "noise",
            "training": {"steps": 2, "batch_size": 8},
        },
    },
    "outliers": {"noise": {"method": "class_noise", "diffusion": "generator", "count": 4, "arguments": {"steps": 1}}},
    "detectors": [
        {"method": "posthoc", "classifier": "plain", "arguments": {"score": "energy"}},
        {"name": "exposed", "method": "posthoc", "classifier": "exposed", "arguments": {"score": "energy"}},
        {"method": "mahalanobis", "limit": 60, "arguments": {"size": 32}},
    ],
}
NAMES = {"posthoc", "exposed", "mahalanobis"}
CONTROLS = {"trivial_controls", "posthoc, random weights", "mahalanobis, random weights"}


def bench(*words: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["bench", *map(str, words), "--device", "cpu", "--precision", "fp32"])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


@pytest.fixture(scope="module")
def out(file: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAROUT_DATA", str(file.parent))
        assert bench(file, "--out", file.parent / "out") == 0
    return file.parent / "out"


@pytest.fixture(autouse=True)
def nowhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set but the samples is on the machine."""
    monkeypatch.setenv("FAROUT_DATA", str(file.parent))


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def plan_of(folder: Path) -> Any:
    return make_plan(read_spec(folder / "bench.yaml"), folder, {"svhn:test": "it is not here"})


# -- what it writes -----------------------------------------------------------------------------------------------


def test_every_detector_and_control_stands_in_one_table(out: Path) -> None:
    metrics = table(out / "metrics.csv")
    assert list(metrics.columns) == [*COLUMNS, "bench", "marker"]
    assert set(metrics["detector"]) == NAMES | CONTROLS
    own = metrics[metrics["indicator"] == "score"].set_index("detector")
    assert set(own["group"]) == {"held out"}, "the benchmark's own groups"
    assert set(own["ood"]) == {"sample_fashion:test@classes=2"}, "sets that are not here have no rows"
    assert set(own["bench"]) == {"tiny"}
    assert (own["images_per_s"] > 0).all()
    assert own.loc["posthoc", "nfe"] == 1
    backbones = [own.loc[name, "gmacs"] for name in ("mahalanobis", "mahalanobis, random weights")]
    assert backbones[0] == backbones[1], "whether its features were in the cache or not"
    control = own["marker"].fillna("").str.split(";").map(lambda words: "control" in words)
    assert set(own.index[control]) == CONTROLS
    backbone = own["marker"].fillna("").str.contains("backbone")
    assert set(own.index[backbone]) == {"mahalanobis"}, "random weights have seen nothing"
    areas = ["auroc", "auroc_low", "fpr95", "n_ood"]
    pd.testing.assert_frame_equal(metrics[areas], pd.read_parquet(out / "metrics.parquet")[areas])


def test_the_folders_are_those_of_the_contract(out: Path) -> None:
    assert {path.name for path in (out / "networks").iterdir()} == {"generator-0", "plain-0", "exposed-0"}
    assert {path.name for path in (out / "outliers").iterdir()} == {"noise-0"}
    assert {path.name for path in (out / "rated").iterdir()} == {f"{name}-0" for name in NAMES | CONTROLS}
    scores = list((out / "rated" / "mahalanobis, random weights-0" / "scores").glob("*/scores.csv"))
    assert len(scores) == 2
    pairs = table(out / "rated" / "posthoc-0" / "paired.csv")
    assert set(pairs["first"]) == {"posthoc"}
    groups = table(out / "metrics.csv")[["ood", "group"]].drop_duplicates()
    assert pairs[["ood", "group"]].drop_duplicates().to_numpy().tolist() == groups.to_numpy().tolist()
    assert set(pairs["second"]) == (NAMES | CONTROLS) - {"posthoc"}
    back = table(out / "rated" / "exposed-0" / "paired.csv").set_index("second")
    there = pairs.set_index("second").loc["exposed"]
    assert there["difference"] == pytest.approx(-back.loc["posthoc", "difference"])


def test_how_it_came_about_is_told(out: Path) -> None:
    about = read_json(out / "provenance.json")
    assert about["untested"].keys() == {"svhn:test"}
    assert not about["missing"]
    assert about["seconds"]["networks/generator-0"] > 0
    assert about["controls"]["exposed"] == "posthoc, random weights"
    assert about["sources"]["sample_fashion:test@classes=2"]["used"] == 10
    groups = table(out / "groups.csv")
    own = groups[(groups["detector"] == "posthoc") & (groups["indicator"] == "score")].iloc[0]
    assert (own["sets"], own["seeds"], own["untested"]) == (1, 1, 0)
    text = (out / "results.md").read_text()
    assert "untested (far): svhn:test" in text
    assert "untested (far): svhn:test" in (out / "results.tex").read_text()


# -- how it goes on -----------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (out / "metrics.csv").read_bytes()
    monkeypatch.setattr(Jobs, "do", lambda *job: pytest.fail("nothing is left to do"))
    steps = list(run_bench(plan_of(out)))
    assert all(isinstance(step, Done) and step.seconds is None for step in steps[:-1])
    assert isinstance(steps[-1], Report)
    assert (out / "metrics.csv").read_bytes() == before


def test_an_interrupted_benchmark_goes_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the scores of one detector, and before the record of a network was written."""
    twin = shutil.copytree(out, tmp_path / "out")
    before = table(twin / "metrics.csv")
    (twin / "networks" / "plain-0" / "job.json").unlink()
    (twin / "rated" / "posthoc-0" / "metrics.csv").unlink()
    halfway = report(plan_of(twin))
    assert {job.id for job in halfway.missing} == {"networks/plain-0", "rated/posthoc-0"}
    assert "posthoc" not in set(table(twin / "metrics.csv")["detector"])
    measured: list[str] = []
    original = Detector.measure_all
    monkeypatch.setattr(Detector, "measure_all", lambda self, *rest, **more: measured.append("fit") or original(self))
    seen = {step.job.id: step.seconds for step in run_bench(plan_of(twin)) if isinstance(step, Done)}
    assert seen["networks/plain-0"] is None, "a finished network is not trained again"
    assert seen["rated/posthoc-0"] is not None
    assert not measured
    pd.testing.assert_frame_equal(table(twin / "metrics.csv"), before)


@pytest.mark.slow
def test_a_plan_is_shown_before_anything_is_done(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(file, "--out", tmp_path / "new", "--dry-run") == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert "networks/generator-0" in text
    assert "15 jobs, 15 to do" in text
    assert "rough estimate" in text
    assert "untested (far): svhn:test" in text


@pytest.mark.slow
def test_estimates_count_what_is_done(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opening(source: Any, **settings: Any) -> Any:
        opened.extend([source] if isinstance(source, str) else [])
        return open_source(source, **settings)

    monkeypatch.setattr(sets, "open_source", opening)
    seen = preview(plan_of(out))
    assert len(opened) == len(set(opened)) == 3, "training images and both scored sources, once each"
    jobs = {job.id: seen.estimates[job.id] for job in seen.plan.jobs}
    assert jobs["networks/plain-0"].rows == 3 * 2 * 8
    assert jobs["networks/exposed-0"].rows == 2 * jobs["networks/plain-0"].rows, "as many outliers as images"
    assert jobs["rated/posthoc-0"].rows == 20
    assert jobs["rated/posthoc-0"].gmacs == pytest.approx(20 * jobs["networks/plain-0"].gmacs / 48)
    assert jobs["rated/trivial_controls-0"].rows == 0
    assert all((found.seconds > 0) == (found.gmacs > 0) for found in jobs.values())
    assert sum(map(seen.seconds, seen.plan.jobs)) == 0, "all is done"


def test_other_settings_are_refused(out: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(file, "--out", out, "--limit", 11) == 1
    assert "limit: 10 before, 11 now" in capsys.readouterr().err
    assert bench(file, "--out", out, "--dry-run", "--report-only") == 1
    assert "give one of them" in capsys.readouterr().err
    assert bench(file, "--out", file.parent / "new", "--report-only") == 1
    assert "nothing is evaluated" in capsys.readouterr().err


def test_images_that_are_not_here_stop_it_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("openood_cifar100", "--out", tmp_path / "out") == 1
    assert "cifar100:train is not on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert bench("openood_cifar100", "--out", tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "cannot be run here" in text
    assert "untested (far): places365:test" in text


@pytest.mark.slow
def test_existing_networks_are_taken_as_they_are(tmp_path: Path) -> None:
    """Nothing is trained, and the table says that what they have seen is not known."""
    classifier().save(tmp_path / "given")
    for name, count, seed in (("good", 60, 0), ("test", 12, 1), ("far", 12, 2)):
        pictures(tmp_path / name, count, seed=seed, spread=120 if name == "far" else 80)
    content = {
        "name": "given",
        "train": str(tmp_path / "good"),
        "id": str(tmp_path / "test"),
        "ood": {"far": [str(tmp_path / "far")]},
        "alpha": 0.1,
        "networks": {"mine": {"kind": "classifier", "folder": str(tmp_path / "given")}},
        "detectors": [{"method": "posthoc", "classifier": "mine", "statistics": 30}],
        "trivial": False,
        "random_weights": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, done = run_bench(make_plan(parse_spec(content), tmp_path / "out"))
    assert isinstance(done, Report)
    assert not [path for path in (tmp_path / "out" / "networks").rglob("*") if path.suffix == ".safetensors"]
    assert done.metrics["marker"].str.startswith("backbone").all()
    assert load(tmp_path / "out" / "detectors" / "posthoc-0").classifier.content_hash == classifier().content_hash


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path) -> None:
    """Found by the methods themselves, with untrained networks in place of those that would be trained for hours."""
    wrong = {**CONTENT, "name": "wrong", "detectors": CONTENT["detectors"][1:2]}
    outliers = {"noise": {"method": "ncis", "diffusion": "generator", "limit": 3}}
    with pytest.raises(FaroutError):
        list(run_bench(make_plan(parse_spec({**wrong, "outliers": outliers}), tmp_path / "out")))
    late = {"method": "reconstruction", "diffusion": "generator", "arguments": {"levels": [5000]}}
    with pytest.raises(FaroutError, match="levels"):
        list(run_bench(make_plan(parse_spec({**wrong, "detectors": [late]}), tmp_path / "out")))
    again = {"again": {"diffusion": "generator", "level": 2}}
    with pytest.raises(FaroutError, match="levels are shares"):
        list(run_bench(make_plan(parse_spec({**wrong, "reconstructions": again}), tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_large_network_is_counted_by_a_small_one_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"method": "reconstruction", "diffusion": "generator", "arguments": {"levels": [50, 200]}}
    detectors = [one, {**one, "name": "more", "arguments": {"levels": [50, 100, 200]}}]
    networks = {"generator": {"kind": "diffusion", "preset": "small", "training": {"steps": 1}}}
    spec = parse_spec({**CONTENT, "name": "large", "networks": networks, "outliers": {}, "detectors": detectors})
    rehearsal = Rehearsal(spec)
    assert rehearsal.network("generator").parameters > 10**7
    whole = spec.detectors["reconstruction"].made()
    whole.preprocessing = rehearsal.network("generator").preprocessing
    whole.use(rehearsal.network("generator"), spec.runtime)
    expected, found = whole.cost(), rehearsal.cost("reconstruction")
    assert found.nfe == expected.nfe == 4, "two levels, two draws"
    assert found.gmacs == pytest.approx(expected.gmacs)
    monkeypatch.setattr(DiffusionConfig, "build", lambda *_, **__: pytest.fail("built for each detector anew"))
    assert rehearsal.cost("more").nfe == 6
