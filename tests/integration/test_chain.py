"""Chains of commands from YAML: each step does what its command does, once; mistakes are reported before any runs."""

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
from farout.cli.command_parser import command_parameters, parse, positional_parameters
from farout.cli.command_table import COMMANDS
from farout.cli.flags import format_flags
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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, other images, and a generator of three classes."""
    root = tmp_path_factory.mktemp("chain")
    for number, name in enumerate(["a", "b"]):
        pictures(root / "normal" / name, 40, low=150 * number, spread=60, seed=number)
    pictures(root / "near", 12, seed=5)
    pictures(root / "far", 10, low=0, spread=255, seed=7)
    conditional().save(root / "model")
    return root


def steps_of(workspace: Path) -> dict[str, Any]:
    """A complete chain, as short as possible."""
    shared = {"source": str(workspace / "normal"), "steps": []}
    steps: list[dict[str, Any]] = [
        {"train diffusion": {"preset": "classes", "training": SHORT, **FEW, "out": "classes"}},
        {"synthesize class_noise": {"diffusion": "classes", "count": 6, "steps": 2, "out": "outliers"}},
        {"reconstruct": {"diffusion": "classes", "limit": 6, "steps": 2, "out": "copies"}},
        {
            "train classifier": {
                "outliers": "outliers",
                "reconstructions": "copies",
                "training": {**SHORT, "batch_size": 8},
                **FEW,
                "out": "classifier",
            }
        },
        {"fit posthoc": {"classifier": "classifier", "score": "msp", **FEW, "out": "detector"}},
        {
            "evaluate": {
                "detector": "detector",
                "id": str(workspace / "near"),
                "ood": [str(workspace / "far"), "copies@vflip"],
                "trivial_baselines": False,
                "out": "evaluation",
            }
        },
    ]
    return {**shared, "steps": steps}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def run(*words: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["chain", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of the error message."""
    capsys.readouterr()
    assert run(*words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("farout: ")


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    """The folder of a finished chain."""
    assert run(written(workspace / "chain.yaml", steps_of(workspace)), "--out", workspace / "done") == 0
    return workspace / "done"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy in another folder: a chain may be moved."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changed(workspace: Path, path: Path, number: int, **settings: Any) -> Path:
    """The chain with changed settings of one step."""
    content = steps_of(workspace)
    next(iter(content["steps"][number].values())).update(settings)
    return written(path, content)


# -- running -------------------------------------------------------------------------------------------------


def test_a_chain_does_what_its_commands_do(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that a dry run prints give the same results when they are run one by one."""
    assert run(finished.parent / "chain.yaml", "--out", finished, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["train", "synthesize", "reconstruct", "train", "fit", "evaluate"]
    for number, name in ((3, "classifier"), (4, "detector")):
        words = shlex.split(lines[number])[1:]
        words[words.index("--out") + 1] = str(tmp_path / name)
        assert main(words) == 0
    assert (
        Classifier.load(tmp_path / "classifier").content_hash == Classifier.load(finished / "classifier").content_hash
    )
    assert load(tmp_path / "detector").fingerprint == load(finished / "detector").fingerprint
    frame = pd.read_csv(finished / "evaluation" / "metrics.csv")
    assert [Path(ood).name for ood in frame["ood"].unique()] == ["far", "copies@vflip"]
    assert DiffusionModel.load(finished / "classes").provenance["training"]["steps"] == 2


def test_finished_steps_are_not_run_again(copied: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(copied)
    capsys.readouterr()
    assert run(workspace / "chain.yaml", "--out", copied) == 0
    printed = capsys.readouterr().out
    assert printed.count("already done") == 6
    assert printed.splitlines()[-1] == f"  {copied / 'evaluation'}  (evaluate)"
    assert stamps(copied) == before


@pytest.mark.slow
def test_changed_settings_are_refused_or_run_again(
    copied: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(workspace, tmp_path / "other.yaml", 3, seed=1, training={**SHORT, "batch_size": 8, "workers": 1})
    before = stamps(copied)
    line = refused(capsys, other, "--out", copied)
    assert line.startswith("step 4 (train classifier) was run with other settings (seed: 0 before, 1 now)")
    assert "classifier, detector, evaluation" in line
    assert "--redo" in line
    assert stamps(copied) == before
    assert run(other, "--out", copied, "--redo") == 0
    printed = capsys.readouterr().out
    assert printed.count("already done") == 3, "steps that do not depend on it are kept"
    now = stamps(copied)
    assert {name: stamp for name, stamp in now.items() if name.split("/")[0] in ("classes", "outliers", "copies")} == {
        name: stamp for name, stamp in before.items() if name.split("/")[0] in ("classes", "outliers", "copies")
    }
    assert (
        Classifier.load(copied / "classifier").content_hash
        != Classifier.load(workspace / "done" / "classifier").content_hash
    )
    assert load(copied / "detector").classifier.content_hash == Classifier.load(copied / "classifier").content_hash


def test_results_of_a_deleted_input_are_outdated(
    copied: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "copies")
    line = refused(capsys, workspace / "chain.yaml", "--out", copied)
    assert "step 4 (train classifier)" in line
    assert "copies is run again" in line
    assert "classifier, detector, evaluation" in line


def test_files_of_others_are_left_alone(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = pictures(tmp_path / "run" / "classifier", 1)
    line = refused(capsys, workspace / "chain.yaml", "--out", tmp_path / "run", "--redo")
    assert "was not written by this command" in line
    assert list(mine.iterdir()) == [mine / "000.png"]
    assert not (tmp_path / "run" / RECORD_FILE).exists()


def test_an_interrupted_training_continues(
    workspace: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**steps_of(workspace), "steps": steps_of(workspace)["steps"][:1]}
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
    assert calls == [0, 1, 1], "the first update is not repeated"
    assert (
        DiffusionModel.load(tmp_path / "run" / "classes").content_hash
        == DiffusionModel.load(finished / "classes").content_hash
    )


def test_an_interrupted_synthesis_continues(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generator may come from outside the chain."""
    step = {"diffusion": str(workspace / "model"), "count": 6, "steps": 2, "batch_size": 3, "out": "outliers"}
    content = {"source": str(workspace / "normal"), "steps": [{"synthesize class_noise": step}]}
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


def test_a_failed_step_is_named_and_can_be_corrected_without_redo(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {"diffusion": str(workspace / "model"), "count": 0, "steps": 2, "out": "outliers"}
    content = {"source": str(workspace / "normal"), "steps": [{"synthesize class_noise": step}]}
    file = written(tmp_path / "one.yaml", content)
    assert refused(capsys, file, "--out", tmp_path / "run").startswith("step 1 (synthesize class_noise): count")
    written(file, {**content, "steps": [{"synthesize class_noise": {**step, "count": 2}}]})
    assert run(file, "--out", tmp_path / "run") == 0


# -- reading ----------------------------------------------------------------------------------------------

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
        (f"steps:\n {FIT[:-1]}, classifier: judge}}\n - train classifier: {{source: x, out: judge}}", ["step 2"]),
        (f"steps:\n {FIT}\n - evaluate: {{detector: d, id: sample_fashion:test, out: r}}", ["step 2", "--ood"]),
        ("steps: [{train classifier: {source: sample_fashion:test, loss: oe, out: d}}]", ["step 1", "loss oe"]),
        ("steps: [{synthesize ncis: {source: sample_fashion:test, out: d}}]", ["step 1", "--diffusion"]),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, written(tmp_path / "c.yaml", text), "--out", tmp_path / "run")
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_chain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean sona_sample" in refused(capsys, "sona_sampel", "--out", tmp_path / "run")


def test_settings_are_read_as_in_a_file_for_config(tmp_path: Path) -> None:
    """Every way to write a value in YAML gives the same setting as in a file for --config."""
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


def test_values_with_spaces_and_signs_are_quoted() -> None:
    assert format_flags("a_b", {"c": -1.5, "d": [1, -2], "e": ["x y", "z"], "f": []}) == [
        "--a-b.c=-1.5", "--a-b.d=[1, -2]", "--a-b.e", "x y", "z", "--a-b.f=[]",
    ]  # fmt: skip


def test_names_are_resolved_only_in_settings_that_take_folders(workspace: Path, tmp_path: Path) -> None:
    """The name of a result may equal a preset, a class, or the start of the name of a set."""
    content = {
        "source": str(workspace / "normal"),
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


def test_every_positional_setting_accepts_a_name() -> None:
    commands = [command_parameters(name) for name in COMMANDS if name not in ("list", "chain")]
    typed = {parameter.name for parameters in commands for parameter in positional_parameters(parameters)}
    assert typed - {"name", "preset"} <= INPUT_SETTINGS


@pytest.mark.parametrize("name", list(builtin_chains()))
def test_built_in_chains_are_complete(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_settings_of_every_method_can_be_stored() -> None:
    for command, registry, more in (("fit", DETECTORS, []), ("synthesize", SYNTHESIZERS, ["--diffusion", "m"])):
        for name in registry:
            kept = parse(command, [name, "images", "--out", "o", *more]).settings
            assert json.loads(json.dumps(kept, allow_nan=False)) == kept
            assert kept["source"] == "images"


def test_an_invalid_record_is_refused(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / RECORD_FILE, '{"jobs": []}')
    assert "not a record of jobs" in refused(capsys, workspace / "chain.yaml", "--out", tmp_path)
