"""`farout demo`: the model in the package, what is compared, and what is printed."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from farout import DiffusionConfig, DiffusionModel, load
from farout.benchmark.benchmark_plan import plan_benchmark
from farout.benchmark.demo import BASELINES, DIFFUSION, ID, OOD, SAMPLE_MODEL, TRAIN, demo_benchmark, summarize_demo
from farout.benchmark.runner import BenchmarkReport
from farout.cli import main
from farout.cli.commands.demo import print_summary
from farout.data.sources import open_source
from farout.diffusion.train import build_model


def test_the_model_of_the_sample_is_small_and_says_how_it_was_trained() -> None:
    files = [path for path in SAMPLE_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}, "no pickled weights"
    assert "farout train diffusion" in (SAMPLE_MODEL / "README.md").read_text(encoding="utf-8")


def test_the_model_of_the_sample_leaves_images_for_the_fit_and_has_not_seen_the_scored_ones() -> None:
    seen = DiffusionModel.load(SAMPLE_MODEL).trained_on
    training = open_source(TRAIN, limit=demo_benchmark().train_limit)
    unseen = [each for each in training.content_hashes() if each not in seen]
    assert seen
    assert len(unseen) >= 250, "calibration and statistics"
    for source in (ID, *OOD.values()):
        assert not seen & set(open_source(source).content_hashes()), source


def test_every_method_of_the_demo_has_its_defaults() -> None:
    spec = demo_benchmark()
    assert list(spec.detectors) == [*DIFFUSION, *BASELINES]
    assert all(entry.arguments == {} and entry.preset is None for entry in spec.detectors.values())
    assert {entry.limit for entry in spec.detectors.values()} == {None}, "all are fitted on the same number of images"
    assert spec.trivial_baselines
    assert spec.networks["generator"].folder == str(SAMPLE_MODEL)


def test_train_trains_the_model_of_the_package_from_scratch() -> None:
    generator = demo_benchmark(train=True).networks["generator"]
    packaged = DiffusionModel.load(SAMPLE_MODEL)
    assert generator.folder is None
    assert isinstance(generator.model, DiffusionConfig)
    built = build_model(generator.model, packaged.preprocessing)
    assert (built.parameters, built.prediction, built.schedule) == (
        packaged.parameters,
        packaged.prediction,
        packaged.schedule,
    )
    recorded = packaged.provenance["training"]
    settings = {name: value for name, value in asdict(generator.training).items() if name in recorded}
    assert {**settings, "keep": []} == recorded
    assert demo_benchmark(train=True, steps=7).networks["generator"].training.steps == 7


def fake_report() -> BenchmarkReport:
    """A report with the scores of four methods."""
    aurocs = {"msma": (0.7, 0.9), "pca": (0.95, 0.9), "semantic": (0.9, 0.99), "trivial_baselines": (0.4, 0.5)}
    rows = [
        {
            "detector": name,
            "indicator": indicator,
            "ood_group": group,
            "auroc": value if indicator == "score" else 1.0,
            "auroc_low": value - 0.02,
            "auroc_high": value + 0.01,
            "false_alarm": 0.04,
            "images_per_s": 10.0,
            "n_id": 90,
            "n_ood": 80,
        }
        for name, values in aurocs.items()
        for group, value in zip(OOD, values, strict=True)
        for indicator in ("score", "other")
    ]
    plan = plan_benchmark(demo_benchmark(), "demo")
    return BenchmarkReport(plan, pd.DataFrame(rows), pd.DataFrame(), (), (), (Path("demo/page.html"),))


def test_rows_are_sorted_by_the_mean_whatever_the_method() -> None:
    summary = summarize_demo(fake_report())
    assert summary["detector"].tolist() == ["semantic", "pca", "msma", "trivial_baselines"]
    assert summary["mean"].round(3).tolist() == [0.945, 0.925, 0.8, 0.45]
    assert summary["half_width"].round(3).tolist() == [0.015] * 4


def test_the_table_says_which_images_and_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(iter([fake_report()]))
    printed = capsys.readouterr().out
    for text in ("1,000 pictures of clothes", "90 others", "80 handwritten digits", "farout fit semantic", "page.html"):
        assert text in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert rows["semantic"] == ["diffusion", "0.900", "0.990", "0.945", "0.04", "10"]
    assert rows["pca"] == ["baseline", "0.950", "0.900", "0.925", "0.04", "10"]


@pytest.mark.slow
def test_the_demo_prints_one_table_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--limit", "30", "--images", "600"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err.lower()
    assert "nan" not in printed.out
    lines = printed.out.splitlines()
    names = [*DIFFUSION, *BASELINES, "trivial_baselines"]
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0] in names]
    assert sorted(row[0] for row in rows) == sorted(names), "one row for each method"
    means = [float(row[4]) for row in rows]
    assert means == sorted(means, reverse=True)
    assert all(row[1] == ("diffusion" if row[0] in DIFFUSION else "baseline") for row in rows)
    digits = {row[0]: float(row[2]) for row in rows}
    assert all(digits[name] > 0.8 for name in DIFFUSION)
    page = re.search(r"(\S*page\.html)", printed.out)
    assert page is not None
    assert "reconstruction" in Path(page[1]).read_text(encoding="utf-8")
    assert load(tmp_path / "demo" / "detectors" / "reconstruction-0").diffusion is not None

    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == lines, "what is finished is not computed again"
