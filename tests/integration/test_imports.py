"""A command imports only what it uses: starting one must not take the time to import every network and library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import farout
from small import pictures

HEAVY_LIBRARIES = (
    "accelerate",
    "datasets",
    "diffusers",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "timm",
    "torch._dynamo",
    "torchmetrics",
    "torchvision",
    "transformers",
    "triton",
)
SCRIPT = """
import json, sys
from farout.cli import main
status = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps([status, sorted(sys.modules)]))
"""


def imported_modules(folder: Path, *words: object) -> set[str]:
    """Names of the modules that are loaded when a command has finished."""
    report = folder / "modules.json"
    command = [sys.executable, "-c", SCRIPT, str(report), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    status, modules = json.loads(report.read_text())
    assert status == 0, result.stderr
    return set(modules)


def check(modules: set[str], *, most: int, used: set[str]) -> None:
    """At most this many modules of farout, and only those of the heavy libraries that the command uses."""
    own = sorted(name for name in modules if name.split(".")[0] == "farout")
    assert len(own) <= most, f"{len(own)} modules: {', '.join(own)}"
    assert {name for name in HEAVY_LIBRARIES if name in modules} <= used


def test_help_imports_almost_nothing(tmp_path: Path) -> None:
    modules = imported_modules(tmp_path, "--help")
    check(modules, most=10, used=set())
    assert not {"torch", "numpy", "jsonargparse", "rich"} & modules


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    images = pictures(folder / "images", 40)
    farout.KNN(size=32).fit(images, statistics=20, alpha=0.1).save(folder / "knn")
    return folder


def test_fit_knn_imports_no_other_method(detector: Path, tmp_path: Path) -> None:
    words = [
        "fit",
        "knn",
        detector / "images",
        "--size",
        32,
        "--statistics",
        20,
        "--alpha",
        0.1,
        "--out",
        tmp_path / "d",
    ]
    modules = imported_modules(tmp_path, *words)
    # timm, the library of the backbone, imports torchvision; scores are tables of pandas; scipy finds near-copies
    check(modules, most=115, used={"timm", "torchvision", "pandas", "scipy"})
    assert "farout.detectors.knn" in modules
    assert not {"farout.detectors.semantic", "farout.diffusion.model", "farout.classifiers.model"} & modules


def test_score_imports_no_training(detector: Path, tmp_path: Path) -> None:
    words = ["score", detector / "knn", detector / "images", "--limit", 6, "--out", tmp_path / "scores"]
    modules = imported_modules(tmp_path, *words)
    # the histogram of the report is a chart of matplotlib
    check(modules, most=115, used={"timm", "torchvision", "pandas", "matplotlib"})
    assert not {"farout.detectors.fitting", "farout.training.loop", "farout.evaluation.evaluate"} & modules


@pytest.mark.slow
def test_evaluate_imports_only_the_networks_of_its_detector(detector: Path, tmp_path: Path) -> None:
    words = ["evaluate", detector / "knn", "--id", detector / "images", "--ood", detector / "images", "--limit", 6]
    modules = imported_modules(tmp_path, *words, "--baseline-limit", 20, "--out", tmp_path / "evaluation")
    counter = {"torch._dynamo", "triton"}  # torch's counter of operations imports its compiler
    check(modules, most=150, used={"timm", "torchvision", "pandas", "matplotlib", "scipy", "sklearn"} | counter)
    assert not {"farout.diffusion.model", "farout.classifiers.model", "farout.training.loop"} & modules


def test_settings_of_a_training_are_parsed_without_its_networks(tmp_path: Path) -> None:
    check(imported_modules(tmp_path, "train", "diffusion", "--help"), most=100, used={"accelerate"})
