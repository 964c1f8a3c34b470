"""What is installed: the wheel carries all that the package reads, and the house's arrows run one way."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import farout

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "farout"

FLOORS = {
    **dict.fromkeys(["core", "errors", "progress", "store", "devices", "registry", "configuration", "runtime"], 0),
    **dict.fromkeys(["training", "training_config", "training_log", "checkpoints", "data_order"], 0),
    "images": 1,
    "diffusion": 2,
    **dict.fromkeys(["features", "classifiers", "calibration", "densities"], 3),
    **dict.fromkeys(["detectors", "outliers"], 4),
    "evaluation": 5,
    "__main__": 6,
    "cli": 6,
}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("farout.")}
    return found - {"__version__"}


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def test_every_module_has_its_floor() -> None:
    assert len(MODULES) > 40
    assert {room(path) for path in MODULES} <= set(FLOORS), "a new room wants its floor"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_nothing_imports_upwards(path: Path) -> None:
    """A room that needs the one above it cannot be read, tested or used alone."""
    above = {name for name in imported(path) if FLOORS[name] > FLOORS[room(path)]}
    assert not above, f"{path.relative_to(SOURCE)} imports from {above}"


def test_rooms_of_one_floor_form_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        edges.setdefault(room(path), set()).update(imported(path) - {room(path)})
    done: set[str] = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done}:
        done |= ready
    assert not set(edges) - done, f"these rooms import each other: {set(edges) - done}"


def test_public_names_are_where_they_are_said_to_be() -> None:
    for name in farout.__all__:
        assert getattr(farout, name).__name__ == name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*") if p.is_file()}
    wanted = {name for name in here if "__pycache__" not in name}
    assert wanted <= names, wanted - names
    for name in ("py.typed", "report/templates/page.html", "sample/sample_digits/test.parquet"):
        assert f"farout/{name}" in names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 10 * 2**20, "the sample is small"


@pytest.mark.slow
def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """The checkout's own source must not be what answers."""
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    script = "import sys, farout, farout.cli; print(farout.__file__); sys.exit(farout.cli.main())"
    environment = {**os.environ, "PYTHONPATH": str(target), "COLUMNS": "120"}

    def run(*words: str) -> str:
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(target)), "not the installed package"
        return done.stdout

    assert "farout 0." in run("--version")
    listed = run("list", "sets")
    assert "sample_fashion" in listed
    assert "built in" in listed
    assert "reconstruction" in run("list", "detectors")
    entry = next(target.glob("*.dist-info")) / "entry_points.txt"
    assert "farout = farout.cli:main" in entry.read_text()
