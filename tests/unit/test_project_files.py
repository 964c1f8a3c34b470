"""The project's own files: workflows, templates and citation parse and agree with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import farout

ROOT = Path(__file__).parents[2]
YAML_FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
)


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_files_parse(name: str) -> None:
    assert isinstance(read_yaml(name), dict)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == farout.__version__ == read_yaml("CITATION.cff")["version"]


def test_workflows_run_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [
        step.get("run", "")
        for name in YAML_FILES
        if "/workflows/" in name
        for job in read_yaml(name)["jobs"].values()
        for step in job["steps"]
    ]
    used = set(re.findall(r"\bmake ([a-z0-9-]+)", "\n".join(steps)))
    assert used >= {"check", "docs", "test", "test-slow", "test-oldest", "test-avx2"}
    assert used <= targets


def test_ci_tests_the_oldest_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matrix = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert f">={matrix['python'][0]}" == project["requires-python"]
    assert {f"Programming Language :: Python :: {version}" for version in matrix["python"]} <= set(
        project["classifiers"]
    )
