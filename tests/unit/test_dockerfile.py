"""The Dockerfile where no Docker is: its linter, and what would be noticed only in production."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of each line, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, arguments in instructions():
        if name == "FROM":
            base, _, stage = arguments.partition(" AS ")
            found[stage] = list(found.get(base, []))
            current = found[stage]
        elif found:
            current.append((name, arguments))
    return found


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(
        [shutil.which("hadolint", path=str(Path(sys.executable).parent)), "--no-color", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_containers_have_no_privileges_and_the_service_is_checked() -> None:
    for name in ("cli", "server"):
        stage = stages()[name]
        users = [arguments for instruction, arguments in stage if instruction == "USER"]
        assert users == ["10001:10001"], "a number, which Kubernetes can check with runAsNonRoot"
        assert stage.index(("USER", users[0])) > max(i for i, each in enumerate(stage) if each[0] in ("RUN", "COPY"))
        assert not [arguments for instruction, arguments in stage if instruction == "ADD"]
        assert ("ENTRYPOINT", '["farout"]') in stage, "the process that receives the signals, without a shell"
    names = [name for name, _ in stages()["server"]]
    assert "HEALTHCHECK" in names
    assert list(stages())[-1] == "server", "built without --target"
    command = [arguments for name, arguments in stages()["server"] if name == "CMD"][-1]
    assert json.loads(command) == ["serve", "/detector", "--host", "0.0.0.0"]


def test_the_build_uses_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    arguments = dict(value.split("=", 1) for name, value in instructions() if name == "ARG")
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    assert f"Programming Language :: Python :: {arguments['PYTHON_VERSION']}" in project["classifiers"]
    assert "cpu" in arguments["TORCH_INDEX"]


def test_the_build_receives_the_sources_only() -> None:
    """A folder of images, a virtual environment or a token next to the sources must not get into an image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert next(line for line in lines if not line.startswith("#")) == "*"
    copied = {path for name, arguments in stages()["build"] if name == "COPY" for path in arguments.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.slow
def test_the_check_of_the_weights_in_the_build_passes() -> None:
    code = re.search(r'python -c "([^"]+)"', TEXT)
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], check=True)


def test_ci_builds_and_runs_the_image() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = "\n".join(step.get("run", "") for step in jobs["image"]["steps"])
    assert "docker build" in steps
    assert "/health" in steps
