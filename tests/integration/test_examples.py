"""Each script in examples/ runs on the built-in sample and finds what its text says."""

import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from farout.evaluation.metrics import auroc

ROOT = Path(__file__).parents[2]


def run_example(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script, check its figure, and return its variables."""
    matplotlib.use("Agg")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(out)])
    variables = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert (out / "figure.png").stat().st_size > 5000
    return variables


def test_the_tutorials_are_the_scripts() -> None:
    pages = runpy.run_path(str(ROOT / "tools" / "make_tutorials.py"))["pages"]()
    tutorials = ROOT / "docs" / "tutorials"
    assert {page.name: page.read_text(encoding="utf-8") for page in tutorials.glob("*.md")} == pages, "run `make docs`"
    assert {page.stem for page in tutorials.glob("*.png")} == {Path(name).stem for name in pages}


@pytest.mark.slow
def test_own_folder_finds_digits_among_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = run_example("own_folder", tmp_path, monkeypatch)
    table, is_digit = variables["table"], variables["is_digit"]
    assert auroc(table["score"][~is_digit], table["score"][is_digit]) > 0.9
    assert (tmp_path / "results" / "scores.csv").is_file()
    assert (tmp_path / "results" / "page.html").is_file()


@pytest.mark.slow
def test_compare_methods_evaluates_every_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run_example("compare_methods", tmp_path, monkeypatch)["table"]
    assert len(table) == 8
    assert (table["auroc"] > 0.9).all()
    assert (table["low"] < table["auroc"]).all()


@pytest.mark.slow
def test_synthetic_outliers_trains_two_classifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = run_example("synthetic_outliers", tmp_path, monkeypatch)
    assert len(list((tmp_path / "outliers" / "images").rglob("*.png"))) == 64
    assert list(variables["classifiers"]) == ["without outliers", "with outliers"]
    assert 0 < variables["metrics"].auroc < 1


@pytest.mark.slow
def test_heat_maps_are_higher_at_the_defects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = run_example("heat_maps", tmp_path, monkeypatch)
    maps, mask = np.asarray(variables["maps"]), np.asarray(variables["mask"])
    assert auroc(maps[~mask], maps[mask]) > 0.8


@pytest.mark.slow
def test_new_detector_finds_digits_among_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = run_example("new_detector", tmp_path, monkeypatch)
    assert variables["metrics"].auroc_low > 0.7
