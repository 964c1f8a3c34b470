"""A benchmark that takes seconds: what it writes, how it continues, what it refuses."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from farout import load
from farout.benchmark import runner
from farout.benchmark.benchmark_plan import BenchmarkPlan, plan_benchmark
from farout.benchmark.job_graph import RECORD_FILE, FinishedJob
from farout.benchmark.runner import BenchmarkReport, run_benchmark, write_report
from farout.benchmark.yaml_reader import parse_benchmark, read_benchmark
from farout.cli import main
from farout.core.errors import FaroutError
from farout.core.store import read_json, write_json
from farout.detectors import fitting
from farout.evaluation.evaluate import COLUMNS
from small import classifier, pictures

CONTENT: dict[str, Any] = {
    "train": "sample_fashion:train@classes=0,1",
    "id": "sample_fashion:test@classes=0,1",
    "ood": {"held out": ["sample_fashion:test@classes=2"], "far": ["svhn:test"]},
    "limit": 10,
    "train_limit": 100,
    "baseline_limit": 60,
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
BASELINES = {"trivial_baselines", "posthoc, random weights", "mahalanobis, random weights"}


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
def without_data_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set except the samples is on the machine."""
    monkeypatch.setenv("FAROUT_DATA", str(file.parent))


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def plan_of(folder: Path) -> BenchmarkPlan:
    return plan_benchmark(read_benchmark(folder / "bench.yaml"), folder, {"svhn:test": "it is not here"})


# -- results -----------------------------------------------------------------------------------------------


def test_one_table_contains_every_detector_and_baseline(out: Path) -> None:
    metrics = table(out / "metrics.csv")
    assert list(metrics.columns) == [*COLUMNS, "bench", "marker"]
    assert set(metrics["detector"]) == NAMES | BASELINES
    own = metrics[metrics["indicator"] == "score"].set_index("detector")
    assert set(own["ood_group"]) == {"held out"}, "the benchmark's own groups"
    assert set(own["ood"]) == {"sample_fashion:test@classes=2"}, "sets that are not here have no rows"
    assert set(own["bench"]) == {"tiny"}
    assert (own["images_per_s"] > 0).all()
    assert own.loc["posthoc", "nfe"] == 1
    backbones = [own.loc[name, "gmacs"] for name in ("mahalanobis", "mahalanobis, random weights")]
    assert backbones[0] == backbones[1], "whether its features were in the cache or not"
    is_baseline = own["marker"].fillna("").str.split(";").map(lambda words: "baseline" in words)
    assert set(own.index[is_baseline]) == BASELINES
    is_pretrained = own["marker"].fillna("").str.contains("pretrained")
    assert set(own.index[is_pretrained]) == {"mahalanobis"}, "random weights are not"
    areas = ["auroc", "auroc_low", "fpr95", "n_ood"]
    pd.testing.assert_frame_equal(metrics[areas], pd.read_parquet(out / "metrics.parquet")[areas])


def test_every_job_has_its_folder(out: Path) -> None:
    assert {path.name for path in (out / "networks").iterdir()} == {"generator-0", "plain-0", "exposed-0"}
    assert {path.name for path in (out / "outliers").iterdir()} == {"noise-0"}
    assert {path.name for path in (out / "evaluations").iterdir()} == {f"{name}-0" for name in NAMES | BASELINES}
    scores = list((out / "evaluations" / "mahalanobis, random weights-0" / "scores").glob("*/scores.csv"))
    assert len(scores) == 2
    pairs = table(out / "evaluations" / "posthoc-0" / "differences.csv")
    assert set(pairs["first"]) == {"posthoc"}
    groups = table(out / "metrics.csv")[["ood", "ood_group"]].drop_duplicates()
    assert pairs[["ood", "ood_group"]].drop_duplicates().to_numpy().tolist() == groups.to_numpy().tolist()
    assert set(pairs["second"]) == (NAMES | BASELINES) - {"posthoc"}
    back = table(out / "evaluations" / "exposed-0" / "differences.csv").set_index("second")
    there = pairs.set_index("second").loc["exposed"]
    assert there["difference"] == pytest.approx(-back.loc["posthoc", "difference"])


def test_provenance_and_groups_are_written(out: Path) -> None:
    about = read_json(out / "provenance.json")
    assert about["untested"].keys() == {"svhn:test"}
    assert not about["unfinished"]
    assert about["seconds"]["networks/generator-0"] > 0
    assert about["random_weights"]["exposed"] == "posthoc, random weights"
    assert about["sources"]["sample_fashion:test@classes=2"]["used"] == 10
    groups = table(out / "groups.csv")
    own = groups[(groups["detector"] == "posthoc") & (groups["indicator"] == "score")].iloc[0]
    assert (own["sets"], own["seeds"], own["untested"]) == (1, 1, 0)
    text = (out / "results.md").read_text()
    assert "untested (far): svhn:test" in text
    assert "untested (far): svhn:test" in (out / "results.tex").read_text()


# -- continuing -----------------------------------------------------------------------------------------------


def test_finished_jobs_are_not_run_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (out / "metrics.csv").read_bytes()
    monkeypatch.setattr(runner, "execute_job", lambda *job: pytest.fail("all jobs are finished"))
    items = list(run_benchmark(plan_of(out)))
    assert all(isinstance(item, FinishedJob) and item.seconds is None for item in items[:-1])
    assert isinstance(items[-1], BenchmarkReport)
    assert (out / "metrics.csv").read_bytes() == before


def test_an_interrupted_benchmark_continues(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the scores of one detector were written, and before its fit was recorded."""
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    before = table(copy / "metrics.csv")
    records = read_json(copy / RECORD_FILE)
    records["jobs"]["detectors/exposed-0"]["done"] = False
    del records["jobs"]["evaluations/exposed-0"]
    shutil.rmtree(copy / "evaluations" / "exposed-0")
    write_json(copy / RECORD_FILE, records)
    (copy / "evaluations" / "posthoc-0" / "metrics.csv").unlink()
    report = write_report(plan_of(copy))
    unfinished = {"detectors/exposed-0", "evaluations/exposed-0", "evaluations/posthoc-0"}
    assert {job.name for job in report.unfinished} == unfinished
    assert "posthoc" not in set(table(copy / "metrics.csv")["detector"])
    measured: list[str] = []
    original = fitting.measure_source
    monkeypatch.setattr(
        fitting,
        "measure_source",
        lambda detector, source, *rest: measured.append(source.name) or original(detector, source, *rest),
    )
    seconds = {item.job.name: item.seconds for item in run_benchmark(plan_of(copy)) if isinstance(item, FinishedJob)}
    assert {name for name, value in seconds.items() if value is not None} == unfinished
    assert not measured, "a finished detector is not fitted again"
    columns = ["auroc", "fpr95", "n_ood", "marker"]
    pd.testing.assert_frame_equal(table(copy / "metrics.csv")[columns], before[columns])


@pytest.mark.slow
def test_a_dry_run_lists_jobs_with_inputs_and_settings(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(file, "--out", tmp_path / "new", "--dry-run") == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert re.search(r"networks/exposed-0 +to do +outliers/noise-0 .*--preset ncis_tiny", text)
    assert "--training.steps 2" in text
    assert "15 jobs, 15 to do" in text
    assert "untested (far): svhn:test" in text


def test_the_time_left_is_estimated_from_finished_jobs(out: Path) -> None:
    graph = plan_of(out).graph
    detectors = [job for job in graph.jobs if job.kind == "detectors"]
    for job, seconds in zip(detectors, (10.0, 20.0, 30.0)):
        graph.records[job.name]["seconds"] = seconds
    for job in detectors[3:]:
        del graph.records[job.name]
    assert graph.estimate_seconds(detectors[:2]) == pytest.approx(40)
    graph.records.clear()
    assert graph.estimate_seconds(detectors) is None


def test_other_settings_are_refused(out: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "bench.yaml").read_text()
    assert bench(file, "--out", out, "--limit", 11) == 1
    assert "limit: 10 before, 11 now" in capsys.readouterr().err
    assert (out / "bench.yaml").read_text() == before
    assert bench(file, "--out", out, "--dry-run", "--report-only") == 1
    assert "give one of them" in capsys.readouterr().err
    assert bench(file, "--out", file.parent / "new", "--report-only") == 1
    assert "nothing is evaluated" in capsys.readouterr().err


def test_missing_images_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("openood_cifar100", "--out", tmp_path / "out") == 1
    assert "cifar100:train is not on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert bench("openood_cifar100", "--out", tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "cannot be run on this machine" in text
    assert "untested (far): places365:test" in text


@pytest.mark.slow
def test_existing_networks_are_not_trained(tmp_path: Path) -> None:
    """The table says that they were trained on other images."""
    classifier().save(tmp_path / "given")
    for name, count, seed in (("normal", 60, 0), ("test", 12, 1), ("far", 12, 2)):
        pictures(tmp_path / name, count, seed=seed, spread=120 if name == "far" else 80)
    content = {
        "name": "given",
        "train": str(tmp_path / "normal"),
        "id": str(tmp_path / "test"),
        "ood": {"far": [str(tmp_path / "far")]},
        "alpha": 0.1,
        "networks": {"mine": {"kind": "classifier", "folder": str(tmp_path / "given")}},
        "detectors": [{"method": "posthoc", "classifier": "mine", "statistics": 30}],
        "trivial_baselines": False,
        "random_weights_baselines": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, report = run_benchmark(plan_benchmark(parse_benchmark(content), tmp_path / "out"))
    assert isinstance(report, BenchmarkReport)
    assert not (tmp_path / "out" / "networks").exists()
    assert report.metrics["marker"].str.startswith("pretrained").all()
    assert load(tmp_path / "out" / "detectors" / "posthoc-0").classifier.content_hash == classifier().content_hash


def test_methods_refuse_networks_and_settings_before_any_work(tmp_path: Path) -> None:
    """The methods are given untrained networks in place of those that would be trained for hours."""
    wrong = {**CONTENT, "name": "wrong", "detectors": CONTENT["detectors"][1:2]}
    outliers = {"noise": {"method": "ncis", "diffusion": "generator", "limit": 3}}
    with pytest.raises(FaroutError):
        list(run_benchmark(plan_benchmark(parse_benchmark({**wrong, "outliers": outliers}), tmp_path / "out")))
    late = {"method": "reconstruction", "diffusion": "generator", "arguments": {"levels": [5000]}}
    with pytest.raises(FaroutError, match="levels"):
        list(run_benchmark(plan_benchmark(parse_benchmark({**wrong, "detectors": [late]}), tmp_path / "out")))
    again = {"again": {"diffusion": "generator", "level": 2}}
    with pytest.raises(FaroutError, match="levels are fractions"):
        list(run_benchmark(plan_benchmark(parse_benchmark({**wrong, "reconstructions": again}), tmp_path / "out")))
    assert not (tmp_path / "out").exists()
