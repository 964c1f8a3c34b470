"""The package as it is installed: the wheel contains what the package reads, and imports point downwards."""

import ast
import functools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import farout

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "farout"

PACKAGES = {
    "core": [],
    "data": ["core"],
    "training": ["core"],
    "diffusion": ["training", "data", "core"],
    "features": ["diffusion", "training", "data", "core"],
    "classifiers": ["features", "diffusion", "training", "data", "core"],
    "importing": ["classifiers", "features", "diffusion", "training", "data", "core"],
    "detectors": ["classifiers", "features", "diffusion", "training", "data", "core"],
    "synthesis": ["classifiers", "features", "diffusion", "training", "data", "core"],
    "report": ["detectors", "synthesis", "classifiers", "features", "diffusion", "training", "data", "core"],
}
PACKAGES["scoring"] = ["report", *PACKAGES["report"]]
PACKAGES["evaluation"] = ["scoring", *PACKAGES["scoring"]]
PACKAGES["benchmark"] = ["evaluation", *PACKAGES["evaluation"]]
PACKAGES["cli"] = ["benchmark", "importing", *PACKAGES["benchmark"]]
"""Which packages each package may import, from the bottom up."""
MODULES = {
    ".".join(("farout", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def package_of(module: str) -> str:
    return [*module.split("."), ""][1]


@functools.cache
def imports_of(module: str) -> frozenset[tuple[str, str]]:
    """(module of farout, imported name) of all imports, those in functions and under TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {(whole, "")} if whole in MODULES else {(str(node.module), alias.name)}
    return frozenset((name, what) for name, what in found if name in MODULES and name != "farout")


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in PACKAGES])
def test_imports_point_downwards(module: str) -> None:
    """A package that needs the one above it cannot be read, tested or used alone."""
    package = package_of(module)
    for imported, name in imports_of(module):
        assert package_of(imported) in (package, *PACKAGES[package]), f"{module} imports {imported}"
        if package_of(imported) != package:
            private = [part for part in [*imported.split("."), name] if part.startswith("_")]
            assert not private, f"{module} imports the private {private[0]} of {imported}"


def test_every_module_is_in_a_package() -> None:
    assert {package_of(name) for name in MODULES} == {*PACKAGES, "", "__main__"}


def test_modules_import_each_other_in_no_cycle() -> None:
    """A module of the remainder can be reached from itself."""
    edges = {name: {other for other, _ in imports_of(name)} for name in MODULES}
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    while unreached := {name for name in edges if not any(name in others for others in edges.values())}:
        edges = {name: others for name, others in edges.items() if name not in unreached}
    assert not edges, f"import cycle among {sorted(edges)}"


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
    for name in ("py.typed", "report/templates/score_page.html", "sample/sample_digits/test.parquet"):
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
