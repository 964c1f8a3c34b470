"""Chains of commands from YAML: they do what their commands do, once; mistakes are told before the first is run."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from farout import load
from farout.benchmark.job_graph import RECORD_FILE
from farout.classifiers.model import Classifier
from farout.cli import main
from farout.cli.command_table import COMMANDS
from farout.cli.flags import format_flags
from farout.cli.parsers import command_parameters, parse, positional_parameters
from farout.cli.steps import INPUT_SETTINGS, builtin_chains, read_steps
from farout.detectors import DETECTORS
from farout.diffusion.model import DiffusionModel
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.writer import ImageWriter
from farout.training.loop import TrainingRun
from small import conditional, pictures

FEW = {"statistics": 20, "alpha": 0.1}
SHORT = {"steps": 2, "batch_size": 4, "precision": "fp32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, others, and a generator that knows three."""
    root = tmp_path_factory.mktemp("chain")
    for number, name in enumerate(["a", "b"]):
        pictures(root / "good" / name, 40, low=150 * number, spread=60, seed=number)
    pictures(root / "near", 12, seed=5)
    pictures(root / "far", 10, low=0, spread=255, seed=7)
    conditional().save(root / "model")
    return root


def steps_of(place: Path) -> dict[str, Any]:
    """A whole chain, as short as can be."""
    good = {"source": str(place / "good"), "steps": []}
    steps: list[dict[str, Any]] = [
        {"train diffusion": {"preset": "classes", "training": SHORT, **FEW, "out": "classes"}},
        {"synthesize class_noise": {"diffusion": "classes", "count": 6, "steps": 2, "out": "outliers"}},
        {"reconstruct": {"diffusion": "classes", "limit": 6, "steps": 2, "out": "again"}},
        {
            "train classifier": {
                "outliers": "outliers",
                "reconstructions": "again",
                "training": {**SHORT, "batch_size": 8},
                **FEW,
                "out": "knows",
            }
        },
        {"fit posthoc": {"classifier": "knows", "score": "msp", **FEW, "out": "detector"}},
        {
            "evaluate": {
                "detector": "detector",
                "id": str(place / "near"),
                "ood": [str(place / "far"), "again@vflip"],
                "controls": False,
                "out": "rated",
            }
        },
    ]
    return {**good, "steps": steps}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def run(*words: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["chain", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a mistake is answered with."""
    capsys.readouterr()
    assert run(*words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("farout: ")


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """The folder of a chain that has been run."""
    assert run(written(place / "chain.yaml", steps_of(place)), "--out", place / "done") == 0
    return place / "done"


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """The same elsewhere: a chain may be moved."""
    return Path(shutil.copytree(done, tmp_path / "moved"))


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changed(place: Path, path: Path, number: int, **settings: Any) -> Path:
    """The chain with other settings of one step."""
    content = steps_of(place)
    next(iter(content["steps"][number].values())).update(settings)
    return written(path, content)


# -- what is done -------------------------------------------------------------------------------------------------


def test_a_chain_does_what_its_commands_do(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that a dry run shows, typed one by one, make the same."""
    assert run(done.parent / "chain.yaml", "--out", done, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["train", "synthesize", "reconstruct", "train", "fit", "evaluate"]
    for number, name in ((3, "knows"), (4, "detector")):
        words = shlex.split(lines[number])[1:]
        words[words.index("--out") + 1] = str(tmp_path / name)
        assert main(words) == 0
    assert Classifier.load(tmp_path / "knows").content_hash == Classifier.load(done / "knows").content_hash
    assert load(tmp_path / "detector").fingerprint == load(done / "detector").fingerprint
    frame = pd.read_csv(done / "rated" / "metrics.csv")
    assert [Path(ood).name for ood in frame["ood"].unique()] == ["far", "again@vflip"]
    assert DiffusionModel.load(done / "classes").provenance["training"]["steps"] == 2


def test_what_is_done_is_not_done_again(copied: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(copied)
    capsys.readouterr()
    assert run(place / "chain.yaml", "--out", copied) == 0
    printed = capsys.readouterr().out
    assert printed.count("already done") == 6
    assert printed.splitlines()[-1] == f"  {copied / 'rated'}  (evaluate)"
    assert stamps(copied) == before


@pytest.mark.slow
def test_other_settings_are_refused_or_made_anew(
    copied: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(place, tmp_path / "other.yaml", 3, seed=1, training={**SHORT, "batch_size": 8, "workers": 1})
    before = stamps(copied)
    line = refused(capsys, other, "--out", copied)
    assert line.startswith("step 4 (train classifier) was run with other settings (seed: 0 before, 1 now)")
    assert "knows, detector, rated" in line
    assert "--redo" in line
    assert stamps(copied) == before
    assert run(other, "--out", copied, "--redo") == 0
    printed = capsys.readouterr().out
    assert printed.count("already done") == 3, "what does not depend on it stays"
    now = stamps(copied)
    assert {name: stamp for name, stamp in now.items() if name.split("/")[0] in ("classes", "outliers", "again")} == {
        name: stamp for name, stamp in before.items() if name.split("/")[0] in ("classes", "outliers", "again")
    }
    assert Classifier.load(copied / "knows").content_hash != Classifier.load(place / "done" / "knows").content_hash
    assert load(copied / "detector").classifier.content_hash == Classifier.load(copied / "knows").content_hash


def test_what_goes_on_from_a_lost_folder_is_not_kept_in_silence(
    copied: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "again")
    line = refused(capsys, place / "chain.yaml", "--out", copied)
    assert "step 4 (train classifier)" in line
    assert "again is run again" in line
    assert "knows, detector, rated" in line


def test_what_no_chain_has_made_is_left_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = pictures(tmp_path / "run" / "knows", 1)
    line = refused(capsys, place / "chain.yaml", "--out", tmp_path / "run", "--redo")
    assert "was not written by this command" in line
    assert list(mine.iterdir()) == [mine / "000.png"]
    assert not (tmp_path / "run" / RECORD_FILE).exists()


def test_an_interrupted_training_goes_on(
    place: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**steps_of(place), "steps": steps_of(place)["steps"][:1]}
    file, update, calls = written(tmp_path / "one.yaml", content), TrainingRun._update, list[int]()

    def interrupted(self: TrainingRun, batches: Any) -> None:
        calls.append(self.completed)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        update(self, batches)

    monkeypatch.setattr(TrainingRun, "_update", interrupted)
    assert run(file, "--out", tmp_path / "run") == 130
    assert "again to continue\n" in capsys.readouterr().err
    assert run(file, "--out", tmp_path / "run") == 0
    assert calls == [0, 1, 1], "the first update is not made again"
    assert (
        DiffusionModel.load(tmp_path / "run" / "classes").content_hash
        == DiffusionModel.load(done / "classes").content_hash
    )


def test_interrupted_outliers_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the generator may come from elsewhere."""
    step = {"diffusion": str(place / "model"), "count": 6, "steps": 2, "batch_size": 3, "out": "outliers"}
    content = {"source": str(place / "good"), "steps": [{"synthesize class_noise": step}]}
    file, write = written(tmp_path / "one.yaml", content), ImageWriter.write

    def interrupted(self: ImageWriter, indices: Any, *rest: Any) -> None:
        if 3 in indices:
            raise KeyboardInterrupt
        write(self, indices, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(ImageWriter, "write", interrupted)
        assert run(file, "--out", tmp_path / "run") == 130
    written(file, {**content, "steps": [{"synthesize class_noise": {**step, "seed": 1}}]})
    assert "seed: 0 before, 1 now" in refused(capsys, file, "--out", tmp_path / "run")
    written(file, {**content, "steps": [{"synthesize class_noise": {**step, "batch_size": 2}}]})
    assert run(file, "--out", tmp_path / "run") == 0
    assert "6 outliers, 3 new" in capsys.readouterr().out


def test_a_step_that_fails_is_named_and_mended_without_redo(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {"diffusion": str(place / "model"), "count": 0, "steps": 2, "out": "outliers"}
    content = {"source": str(place / "good"), "steps": [{"synthesize class_noise": step}]}
    file = written(tmp_path / "one.yaml", content)
    assert refused(capsys, file, "--out", tmp_path / "run").startswith("step 1 (synthesize class_noise): count")
    written(file, {**content, "steps": [{"synthesize class_noise": {**step, "count": 2}}]})
    assert run(file, "--out", tmp_path / "run") == 0


# -- what is written ----------------------------------------------------------------------------------------------

FIT = "- fit posthoc: {source: sample_fashion:test, out: d}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: [", ["not valid YAML"]),
        ("- fit", ["no steps"]),
        ("steps: []", ["no steps"]),
        (f"sources: x\nsteps:\n {FIT}", ["sources"]),
        ("steps: [fit]", ["step 1", "'fit'"]),
        ("steps: [{fitt posthoc: {out: d}}]", ["step 1 (fitt posthoc)", "no command"]),
        ("steps: [{fit: {out: d, source: x}}]", ["step 1 (fit)", "fit METHOD"]),
        ("steps: [{evaluate posthoc: {out: d}}]", ["no command 'evaluate posthoc'"]),
        ("steps: [{features list: {out: d}}]", ["features list", "cannot be a step"]),
        ("steps: [{chain: {out: d}}]", ["chain", "cannot be a step"]),
        ("steps: [{fit posthoc: }]", ["settings"]),
        ("steps: [{fit posthoc: {source: sample_fashion:test}}]", ["step 1 (fit posthoc)", "lacks out"]),
        ("steps: [{fit posthoc: {out: d}}]", ["lacks source"]),
        ("steps: [{score: {source: sample_fashion:test, out: d}}]", ["lacks detector"]),
        ("steps: [{fit posthoc: {source: [a, b], out: d}}]", ["source", "single string"]),
        ("steps: [{fit posthoc: {source: sample_fashion:test, out: ../d}}]", ["out '../d'", "plain name"]),
        ("steps: [{fit posthoc: {source: sample_fashion:test, out: d, help: true}}]", ["help"]),
        (f"steps:\n {FIT}\n {FIT.replace('out: d', 'out: D')}", ["step 2", "'D'", "step 1 (fit posthoc)"]),
        (f"steps:\n {FIT[:-1]}, levls: 3}}", ["step 1 (fit posthoc)", "--levls"]),
        (f"steps:\n {FIT[:-1]}, score: mps}}", ["step 1", "--score", "mps"]),
        (f"steps:\n {FIT[:-1]}, k: -1}}", ["step 1", "-1"]),
        (f"steps:\n {FIT[:-1]}, classifier: lost}}", ["step 1", "classifier", "'lost'"]),
        ("steps: [{fit posthoc: {source: sample_fashon:test, out: d}}]", ["step 1", "did you mean sample_fashion"]),
        ("steps: [{fit posthoc: {source: 'sample_fashion:test@classes=Bagg', out: d}}]", ["step 1", "Bag"]),
        (f"steps:\n {FIT[:-1]}, classifier: knows}}\n - train classifier: {{source: x, out: knows}}", ["step 2"]),
        (f"steps:\n {FIT}\n - evaluate: {{detector: d, id: sample_fashion:test, out: r}}", ["step 2", "--ood"]),
        ("steps: [{train classifier: {source: sample_fashion:test, loss: oe, out: d}}]", ["step 1", "loss oe"]),
        ("steps: [{synthesize ncis: {source: sample_fashion:test, out: d}}]", ["step 1", "--diffusion"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_run(
    text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, written(tmp_path / "c.yaml", text), "--out", tmp_path / "run")
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_chain_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean sona_sample" in refused(capsys, "sona_sampel", "--out", tmp_path / "run")


def test_settings_read_as_in_a_file_for_config(tmp_path: Path) -> None:
    """However YAML writes them, they reach the command as its own file of settings would bring them."""
    body = {
        "levels": [50, 200],
        "density_metrics": ["mse", "eps_error"],
        "training": {"ema": None, "nesterov": False, "learning_rate": 1e-5, "batch-size": 4},
        "link": False,
        "statistics": None,
    }
    text = yaml.safe_dump({"steps": [{"fit reconstruction": {"source": "sample_fashion:test", **body, "out": "o"}}]})
    [step] = read_steps(str(written(tmp_path / "c.yaml", text)))
    body["training"]["batch_size"] = body["training"].pop("batch-size")
    config = written(tmp_path / "config.yaml", body)
    words = ["reconstruction", "sample_fashion:test", "--out", "o", "--config", str(config)]
    assert step.settings == parse("fit", words).settings
    assert step.settings["training.ema"] is None
    assert step.settings["levels"] == [50, 200]


def test_words_survive_a_shell_and_a_sign() -> None:
    assert format_flags("a_b", {"c": -1.5, "d": [1, -2], "e": ["x y", "z"], "f": []}) == [
        "--a-b.c=-1.5", "--a-b.d=[1, -2]", "--a-b.e", "x y", "z", "--a-b.f=[]",
    ]  # fmt: skip


def test_names_stand_for_folders_only_where_folders_are_meant(place: Path, tmp_path: Path) -> None:
    """A folder called as a preset or a score is, does not take its place; nor a set whose name only begins so."""
    content = {
        "source": str(place / "good"),
        "steps": [
            {"train diffusion": {"preset": "classes", "out": "classes"}},
            {"train diffusion": {"preset": "classes", "out": "sample_fashion"}},
            {"sample": {"model": "classes", "classes": ["classes"], "out": "samples"}},
            {"fid": {"generated": "samples/a", "source": "sample_fashion:test", "out": "fid.json"}},
        ],
    }
    steps = read_steps(str(written(tmp_path / "c.yaml", content)))
    folder = Path("run")
    assert steps[1].command_line(folder)[3:] == ["--preset", "classes", "--out", str(folder / "sample_fashion")]
    assert steps[2].command_line(folder)[1:4] == [str(folder / "classes"), "--classes", "classes"]
    assert steps[3].command_line(folder)[1:3] == [f"{folder / 'samples'}/a", "sample_fashion:test"]
    assert [step.inputs for step in steps] == [(), (), ("classes",), ("samples",)]


def test_every_place_that_takes_a_folder_takes_a_name() -> None:
    commands = [command_parameters(name) for name in COMMANDS if name not in ("list", "chain")]
    typed = {parameter.name for parameters in commands for parameter in positional_parameters(parameters)}
    assert typed - {"name", "preset"} <= INPUT_SETTINGS


@pytest.mark.parametrize("name", list(builtin_chains()))
def test_built_in_chains_are_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--out", tmp_path / "run", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("farout ") and f"--out {tmp_path / 'run'}/" in line for line in lines)
    assert lines[-1].startswith("farout evaluate")
    assert not (tmp_path / "run").exists()


def test_built_in_chains_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "presets"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "synthesize sona, reconstruct" in printed
    assert all(name in printed for name in builtin_chains())


@pytest.mark.slow
def test_settings_of_every_method_can_be_kept() -> None:
    for command, registry, more in (("fit", DETECTORS, []), ("synthesize", SYNTHESIZERS, ["--diffusion", "m"])):
        for name in registry:
            kept = parse(command, [name, "images", "--out", "o", *more]).settings
            assert json.loads(json.dumps(kept, allow_nan=False)) == kept
            assert kept["source"] == "images"


def test_a_record_that_is_none_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / RECORD_FILE, '{"jobs": []}')
    assert "not a record of jobs" in refused(capsys, place / "chain.yaml", "--out", tmp_path)
