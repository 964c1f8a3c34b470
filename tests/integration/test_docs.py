"""The documentation: its reference is what the signatures say, its links lead somewhere, its examples run."""

import ast
import functools
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import farout
from farout.benchmark.yaml_reader import read_benchmark
from farout.cli.command_parser import parse
from farout.cli.command_table import COMMANDS
from farout.cli.steps import read_steps
from farout.core.errors import TooFewImagesWarning
from farout.core.runtime import Runtime
from farout.detectors import DETECTORS
from farout.synthesis import SYNTHESIZERS
from small import pictures
from tolerances import assert_same_scores

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# -- the reference of commands --------------------------------------------------------------------------------------


def test_the_reference_of_commands_is_what_the_signatures_say_now() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "make_commands.py"))["reference"]()
    written = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert written == made, "docs/commands.md is out of date: `make docs` writes it anew"


def test_the_reference_of_python_has_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = [pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)]
    missing = [name for name in farout.__all__ if getattr(farout, name) not in documented]
    assert not missing, f"docs/reference lacks {', '.join(missing)}"


# -- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name)])
def test_examples_name_what_there_is(name: str) -> None:
    tree = ast.parse("\n".join(blocks(name)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("farout"):
            assert all(hasattr(importlib.import_module(str(node.module)), each.name) for each in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "farout":
            assert hasattr(farout, node.attr), f"{name}: there is no farout.{node.attr}"


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_text_are_there_and_public(name: str) -> None:
    for named in re.findall(r"`(farout(?:\.\w+)+)[`(]", (ROOT / name).read_text(encoding="utf-8")):
        assert "._" not in named, f"{name}: {named} is private"
        pkgutil.resolve_name(named)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples of add-a-detector.md as a package from elsewhere, with entry points as its page says."""
    written = {"spectrum": "farout.detectors", "quarters": "farout.synthesizers"}
    for name, code in zip(written, blocks("docs/add-a-detector.md"), strict=True):
        (tmp_path / f"docs_example_{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"docs_example_{name}", raising=False)
    about = tmp_path / "docs_example-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: docs-example\nVersion: 0.1\n")
    groups = [f"[{room}]\n{name} = docs_example_{name}:{name.title()}\n" for name, room in written.items()]
    (about / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_detector_of_the_page_is_listed_fitted_and_loaded_again(package: Path, tmp_path: Path) -> None:
    detector = DETECTORS["spectrum"].load().from_preset("fine", bands=3)
    good = pictures(tmp_path / "good", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooFewImagesWarning)
        detector.fit(good, alpha=0.1, statistics=30)
    far = detector.score(pictures(tmp_path / "far", 10, low=0, spread=255, seed=7))
    assert far.is_ood.all()
    assert {"distance", "two_sided"} == set(far.indicators)
    detector.save(tmp_path / "d")
    again = farout.load(tmp_path / "d", batch_size=7).score(good)
    assert_same_scores(again, detector.score(good), detector)
    other = detector.with_scoring(score="two_sided")
    assert_same_scores(other.score(good), other.score_measurements(again.measurements), other)


def test_the_synthesizer_of_the_page_makes_the_same_images_for_any_batch(package: Path, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        pictures(tmp_path / "labelled" / name, 6, low=60 * number, seed=number)
    made = SYNTHESIZERS["quarters"].load()().synthesize
    folders = [
        made(tmp_path / "labelled", tmp_path / str(size), count=5, runtime=Runtime(batch_size=size)) for size in (1, 5)
    ]
    one, two = [{p.name: p.read_bytes() for p in (f.folder / "images").rglob("*.png")} for f in folders]
    assert len(one) == 5
    assert one == two


# -- links and commands ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page is called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^( {4}|```).*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for file, _, anchor in (target.partition("#") for target in targets):
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{name}: {file} is not there"
        assert not anchor or anchor in anchors(other), f"{name}: {file} has no heading #{anchor}"


def commands(page: Path) -> list[list[str]]:
    """The `farout …` command lines in the code of a page, as words; comments are left out."""
    code = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^ {4,}(?:[A-Z_]+=\S+ )?(farout .*)$", code, re.MULTILINE)
    parts = [part for line in lines for part in re.split(r" && | \| ", re.sub(r"(^|\s)#.*", "", line))]
    return [shlex.split(part)[1:] for part in parts if part.startswith("farout ")]


@functools.cache
def understand(words: tuple[str, ...]) -> None:
    """Parses a command line as it would be, and does not run it; raises for what is not known."""
    command = next((known for known in COMMANDS if list(words[: len(known.split())]) == known.split()), None)
    assert command is not None, f"there is no command {' '.join(words)}"
    rest = words[len(command.split()) :]
    if command == "list":
        assert rest[0] in ("detectors", "synthesizers", "sets", "presets")
    else:
        parse(command, rest)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/commands.md"])
def test_commands_are_known_with_their_flags(name: str) -> None:
    for words in commands(ROOT / name):
        understand(tuple(words))


def translations(page: Path) -> list[list[str]]:
    """The command lines in the tables of a page about another program, as words.

    A code that begins with `farout` and has flags is a whole command. Below a header with such a command, a code that
    begins with `--` is added to it.
    """
    lines: list[str] = []
    header: list[str] | None = None
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]]
        if not cells:
            header = None
            continue
        lines += [code for codes in cells for code in codes if code.startswith("farout ") and " --" in code]
        if header is None:
            header = [codes[0] if codes and codes[0].startswith("farout ") else "" for codes in cells]
        for base, codes in zip(header, cells, strict=True):
            lines += [f"{base} {code}" for code in codes if base and code.startswith("--")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((DOCS / "from").glob("*.md")), ids=lambda page: page.stem)
def test_flags_for_users_of_another_program_are_known_with_their_values(page: Path) -> None:
    found = translations(page)
    assert len(found) > 10, "tables are no longer found"
    for words in found:
        understand(tuple(words))


def test_the_yaml_of_the_page_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "chains-and-benchmarks.md").read_text(encoding="utf-8")
    code = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]
    monkeypatch.chdir(tmp_path)
    for name, start in (("chain.yaml", "source:"), ("bench.yaml", "name:")):
        Path(name).write_text(next(block for block in code if block.startswith(start)), encoding="utf-8")
    for folder in ("labelled/cat", "judge", "test", "others"):
        pictures(Path(folder), 2)
    assert [step.command for step in read_steps("chain.yaml")][-1] == "evaluate"
    assert len(read_benchmark("bench.yaml").detectors) == 4


def test_the_pages_have_commands() -> None:
    assert len([words for page in PAGES for words in commands(page)]) > 50, "code is no longer found"
