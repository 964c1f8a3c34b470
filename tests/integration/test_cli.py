"""The command line: what is typed is understood, wrong words get one clear line, and nothing ends in a traceback."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from farout import load
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.presets import PRESETS as CLASSIFIER_PRESETS
from farout.cli import main
from farout.cli.command_parser import CommandParser, parse
from farout.cli.command_table import COMMANDS, import_object
from farout.cli.commands.score import print_scored_folder
from farout.diffusion.config import PRESETS as DIFFUSION_PRESETS
from farout.diffusion.config import DiffusionConfig
from farout.scoring.folder import ScoredFolder, read_scores
from farout.training.config import TrainingConfig
from small import model, pictures
from tolerances import assert_same_scores

FIT = ["--statistics", "30", "--alpha", "0.1", "--levels", "50", "200"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and far images, a model, and a detector fitted by the command line."""
    root = tmp_path_factory.mktemp("cli")
    pictures(root / "good", 60)
    pictures(root / "near", 12, seed=5)
    pictures(root / "far", 10, low=0, spread=255, seed=7)
    model().save(root / "model")
    status = run(["fit", "reconstruction", root / "good", "--diffusion", root / "model", "--out", root / "d", *FIT])
    assert status == 0
    return root


def run(words: list) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], words: list, status: int) -> str:
    """The one line that a mistake is answered with."""
    capsys.readouterr()
    assert run(words) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("farout: ")
    return lines[0]


# -- help ---------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "pandas", "jsonargparse", "diffusers", "numpy")
    code = (
        "import sys, farout.cli\n"
        "assert farout.cli.main(['--help']) == 0\n"
        f"assert not [m for m in {heavy} if m in sys.modules]\n"
        "assert farout.cli.main(['list', 'detectors']) == 0\n"
        "assert farout.cli.main(['list', 'sets']) == 0\n"
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"  {command}" in done.stdout
    assert "reconstruction" in done.stdout
    assert "sample_fashion" in done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "list"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split() + {"fit": ["reconstruction"], "synthesize": ["class_noise"]}.get(command, [])
    assert main([*words, "--help"]) == 0
    text = (
        capsys.readouterr()
        .out.replace("--null-class NULL_CLASS", "")
        .replace("null\n", "")
        .replace("null condition", "")
    )
    flags = {word.strip("[],") for word in text.split() if word.startswith("--")}
    assert not [flag for flag in flags if "_" in flag], "flags are shown with dashes"
    for clutter in ("Literal", "Union", "null", "required", "type:", "--groups+", "{true,false}"):
        assert clutter not in text, clutter
    assert "--config" in text
    assert ("--precision" in text) == ("precision {auto,fp32,bf16,fp16}" in text)


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """A flag without a word of explanation is of no use."""
    assert main(["fit", "reconstruction", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):
            alone = len(line) < 24 or "  " not in line.strip()
            text = following if alone else line[24:]
            assert text.startswith(" " * 20) or not alone, line
            assert text.strip(), line
            assert not text.strip().startswith("(default"), line


def parsers() -> list[Any]:
    """The parser of every command, and of every method."""
    found = []
    for name, command in COMMANDS.items():
        methods = import_object(command.methods).values() if command.methods else [None]
        found += [CommandParser(name, method).parser for method in methods if name != "list"]
    return found


def test_flags_have_descriptions_of_their_own() -> None:
    """Two flags with one text leave the reader guessing what the difference is."""
    for parser in parsers():
        described: dict[str, str] = {}
        for _, action in parser.flags():
            text = " ".join((action.help or "").split())
            assert len(text) > 8, f"{parser.prog}: {action.dest} has no description"
            assert text not in described, (
                f"{parser.prog}: {action.dest} and {described[text]} have the same description"
            )
            described[text] = action.dest


@pytest.mark.parametrize("words", [["train"], ["train", "--help"], ["features", "-h"]])
def test_a_first_word_alone_lists_its_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(listed) > 1
    assert set(listed) == {words[0]}


def test_a_reader_that_stops_reading_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`farout | head -1`."""

    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main([]) == 0


def test_version_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("farout ")
    wanted = {
        "detectors": "reconstruction",
        "sets": "fashion_mnist",
        "presets": "--mode exact",
        "synthesizers": "class_noise",
    }
    for what, text in wanted.items():
        assert main(["list", what]) == 0
        assert text in capsys.readouterr().out
    assert main([]) == 0
    assert "usage" in capsys.readouterr().out


# -- wrong usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["scor", "a"], 2, ["scor", "did you mean score"]),
        (["train", "a"], 2, ["train diffusion"]),
        (["list", "set"], 2, ["did you mean sets"]),
        (["fit", "reconstructoin", "a", "--out", "b"], 2, ["reconstructoin", "did you mean reconstruction"]),
        (["fit", "--out", "b"], 2, ["METHOD", "`farout fit --help` lists the methods"]),
        (["score", "a", "b"], 2, ["--out"]),
        (["score", "--out", "b"], 2, ["DETECTOR", "SOURCE"]),
        (
            ["score", "a", "b", "--out", "c", "--batch-size", "many"],
            2,
            ["--batch-size", "whole number or auto", "many"],
        ),
        (["score", "a", "b", "--out", "c", "--policy", "ignore"], 2, ["--policy", "raise", "skip", "nan", "ignore"]),
        (["score", "a", "b", "--out", "c", "--batch-siz", "4"], 2, ["did you mean --batch-size?"]),
        (["fit", "reconstruction", "a", "--out", "b", "--levels", "[50,x]"], 2, ["--levels", "list of"]),
        (["fit", "reconstruction", "a", "--out", "b", "--preset", "papr"], 2, ["papr", "did you mean paper"]),
        (["fit", "reconstruction", "a", "--out", "b", "--diffusion-preset", "big"], 2, ["big", "tiny, small, paper"]),
        (["fit", "reconstruction", "a", "--out", "b", "--training.steps", "0"], 1, ["steps", "1 or more"]),
        (["fit", "reconstruction", "a", "--out", "b", "--link"], 1, ["--link requires --diffusion"]),
        (["score", "a", "b", "--out", "c", "--fdr", "nan"], 2, ["--fdr must be a number"]),
        (["score", "a", "b", "--out", "c", "--fdr", ".nan"], 2, ["--fdr must be a number"]),
        (["fit", "knn", "a", "--out", "b", "--seed=-1"], 2, ["--seed must be 0 or more", "-1"]),
        (["fit", "semantic", "a", "--out", "b", "--learning-rate", "0"], 1, ["learning_rate", "positive"]),
        (["train", "diffusion", "a", "--out", "b", "--model.b-scale", "0"], 1, ["b_scale", "positive"]),
        (["reconstruct", "a", "--diffusion", "b", "--out", "c", "--batch-size", "0"], 1, ["batch_size", "at least 1"]),
        (["fid", "a", "b", "--workers=-1"], 1, ["workers is -1", "0 or more"]),
        (["demo", "--out", "nowhere/demo", "--limit", "0"], 1, ["limit must be at least 1"]),
        (["demo", "--out", "nowhere/demo", "--train", "--steps", "0"], 1, ["steps is 0"]),
        (["demo", "--out", "nowhere/demo", "--steps", "5"], 2, ["--steps has no effect without --train"]),
        (["evaluate", "a", "--id", "b"], 2, ["missing --ood, --out (see `farout evaluate --help`)"]),
        (["evaluate", "a", "--scores", "b", "c"], 2, ["--scores"]),
        (["evaluate", "--scores", "b", "c", "--limit", "5"], 2, ["limit has no effect"]),
        (["evaluate", "--scores", "b", "c", "--batch-size", "5"], 2, ["batch_size has no effect"]),
        (
            ["fit", "reconstruction", "a", "--out", "b", "--diffusion", "c", "--training.batch-size", "5"],
            2,
            ["--training.batch-size has no effect with --diffusion"],
        ),
        (
            ["fit", "posthoc", "a", "--out", "b", "--classifier", "c", "--classifier-preset", "small"],
            2,
            ["--classifier-preset has no effect with --classifier"],
        ),
    ],
)
def test_wrong_usage_gets_one_line(
    words: list[str], status: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, words, status)
    for part in parts:
        assert part in line


def test_mistakes_in_the_input_get_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    fit = ["fit", "reconstruction", "--diffusion", place / "model", "--out", out, *FIT]
    assert "nowhere" in refused(capsys, [*fit, tmp_path / "nowhere"], 1)
    assert "no images" in refused(capsys, [*fit, tmp_path / "empty"], 1)
    assert "did you mean" in refused(capsys, [*fit, "sample_fashon:train"], 1)
    assert "no split" in refused(capsys, [*fit, "sample_fashion:tset"], 1)
    few = pictures(tmp_path / "few", 3)
    assert "needs 9 images" in refused(capsys, [*fit, few], 1)
    other = ["fit", "knn", place / "good", "--out", place / "d"]
    assert "contains a fitted reconstruction detector; give another folder" in refused(capsys, other, 1)
    assert "is not a detector folder" in refused(capsys, ["score", few, few, "--out", out], 1)
    train = ["train", "diffusion", few, "--out", out, "--model.size", "0"]
    assert "expected positive pixels" in refused(capsys, train, 1)
    for rate in ("0", "2"):
        assert "between 0 and 1" in refused(capsys, [*train[:-2], "--alpha", rate], 1)
    lost = ["fit", "reconstruction", place / "good", "--diffusion", tmp_path / "lost", "--out", out, *FIT]
    assert "no folder" in refused(capsys, lost, 1)
    score = ["score", place / "model", place / "near", "--out", out]
    assert "expected a detector" in refused(capsys, score, 1)
    assert not out.exists(), "a mistake leaves no folder behind"


def test_a_model_without_its_weights_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model().save(tmp_path / "model")
    weights = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    weights.unlink()
    fit = ["fit", "reconstruction", place / "good", "--diffusion", tmp_path / "model", "--out", tmp_path / "d", *FIT]
    assert "weights" in refused(capsys, fit, 1)
    (tmp_path / "model" / "config.json").unlink()
    refused(capsys, fit, 1)


@pytest.mark.parametrize("damage", ["text.png", pytest.param("cut.jpg", marks=pytest.mark.slow)])
def test_a_damaged_file_stops_a_fit_and_is_listed_by_a_score(
    damage: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "images", 60)
    if damage == "text.png":
        (folder / damage).write_text("not a picture")
    else:
        Image.effect_noise((64, 64), 80).save(folder / damage)
        (folder / damage).write_bytes((folder / damage).read_bytes()[:300])
    fit = ["fit", "reconstruction", folder, "--diffusion", place / "model", "--out", tmp_path / "d", *FIT]
    assert damage in refused(capsys, fit, 1)
    assert run(["score", place / "d", folder, "--out", tmp_path / "r", "--limit", "null"]) == 0
    printed = capsys.readouterr().out
    assert "1 unreadable" in printed
    assert f"  unreadable: {damage}: " in printed
    frame = pd.read_csv(tmp_path / "r" / "scores.csv").set_index("key")
    assert frame.loc[damage, "status"] == "unreadable"
    assert pd.isna(frame.loc[damage, "is_ood"])
    assert damage in json.loads((tmp_path / "r" / "manifest.json").read_text())["unreadable"]
    strict = ["score", place / "d", folder, "--out", tmp_path / "s", "--policy", "raise"]
    assert damage in refused(capsys, strict, 1)


def test_some_unreadable_images_are_named_and_the_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable = {f"{number}.png": "cannot be decoded" for number in range(7)}
    print_scored_folder(ScoredFolder(tmp_path, {"ok": 3, "unreadable": 7}, 0, unreadable, 3, 1.0))
    printed = capsys.readouterr().out
    assert printed.startswith("10 images: 3 scored (0 flagged), 7 unreadable; all new\n")
    assert printed.count("unreadable: ") == 5
    assert "  unreadable: 4.png: cannot be decoded\n" in printed
    assert "and 2 more unreadable images, listed in manifest.json" in printed


@pytest.mark.parametrize("policy", ["nan", "skip"])
def test_a_score_of_nothing_but_unreadable_images_fails_after_it_has_written_them(
    policy: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_text("not a picture")
    for _ in range(2):
        assert run(["score", place / "d", tmp_path / "images", "--out", tmp_path / "r", "--policy", policy]) == 1
        printed = capsys.readouterr()
        assert "; none new" in printed.out
        assert "no image could be read: all 3 are unreadable (0.png: not an image" in printed.err
        assert len(json.loads((tmp_path / "r" / "manifest.json").read_text())["unreadable"]) == 3
        assert len(pd.read_csv(tmp_path / "r" / "scores.csv")) == (3 if policy == "nan" else 0)
    fit = ["fit", "reconstruction", tmp_path / "images", "--diffusion", place / "model", "--out", tmp_path / "d"]
    assert "3 cannot be read, such as 0.png: not an image" in refused(capsys, [*fit, "--policy", "skip"], 1)


def test_a_fit_names_all_unreadable_images_at_once_or_says_how_many_it_skips(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "images", 44)
    for name in "abcd":
        (folder / f"{name}.png").write_text("not a picture")
    fit = ["fit", "reconstruction", folder, "--diffusion", place / "model", "--out", tmp_path / "d", *FIT]
    message = refused(capsys, fit, 1)
    assert "4 of 48 images" in message
    assert all(f"{name}.png: not an image" in message for name in "abcd")
    assert main([*map(str, fit), "--policy", "skip"]) == 0  # shows warnings
    assert "4 of 48 images could not be read: a.png: not an image" in capsys.readouterr().err
    assert json.loads((tmp_path / "d" / "config.json").read_text())["provenance"]["unreadable"] == 4


def test_a_benchmark_with_its_splits_is_refused_by_fit_and_scored_without_masks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bottle"
    for name in ("train/good", "test/bent", "ground_truth/bent"):
        pictures(root / name, 2)
    assert main(["score", str(place / "d"), str(root), "--out", str(tmp_path / "r")]) == 0  # shows warnings
    assert "2 in ground_truth/ (masks)" in capsys.readouterr().err
    keys = pd.read_csv(tmp_path / "r" / "scores.csv")["key"]
    assert len(keys) == 4
    assert not keys.str.startswith("ground_truth").any()
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["left_out"] == {"in ground_truth/ (masks)": 2}
    fit = ["fit", "reconstruction", root, "--diffusion", place / "model", "--out", tmp_path / "d", *FIT]
    assert f"give {root}/train/good" in refused(capsys, fit, 1)
    for words in (["calibrate", place / "d", root], ["train", "diffusion", root, "--out", tmp_path / "m"]):
        assert f"give {root}/train/good" in refused(capsys, words, 1)


# -- fit ----------------------------------------------------------------------------------------------------------


def test_a_fit_keeps_the_resolved_configuration(place: Path) -> None:
    config = json.loads((place / "d" / "config.json").read_text())
    assert config["config"]["levels"] == [50, 200]
    assert config["config"]["mode"] == "oneshot"
    assert config["alpha"] == 0.1
    assert config["provenance"]["images"]["statistics"] >= 30
    assert config["provenance"]["fit_s"] > 0


def test_a_fit_says_that_it_replaces_a_detector(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "pca", place / "good", "--size", "32", "--alpha", "0.1", "--out", tmp_path / "d"]
    assert run(words) == 0
    assert "is replaced" not in capsys.readouterr().err
    assert run(words) == 0
    assert "contains a detector, which is replaced" in capsys.readouterr().err


def resolved(*words: object) -> dict[str, Any]:
    """What `farout fit reconstruction` would run with; nothing is run."""
    given = ["reconstruction", "images", "--out", "out", *map(str, words)]
    return dict(parse("fit", given).settings)


@pytest.mark.parametrize("levels", [["--levels", "[50,200]"], ["--levels=[50, 200]"], ["--levels", "50", "200"]])
def test_lists_are_written_either_way(levels: list[str]) -> None:
    values = resolved(*levels, "--density-metrics", "mse", "eps_error", "--batch-size", "4")
    assert values["levels"] == [50, 200]
    assert values["density_metrics"] == ["mse", "eps_error"]
    assert values["batch_size"] == 4
    assert values["source"] == "images"


def test_numbers_end_where_a_word_comes() -> None:
    """`--levels 50 200 images/` is natural to type; the folder is no level."""
    call = parse("fit", ["reconstruction", "--levels", "50", "200", "images", "--out", "o"])
    assert call.settings["levels"] == [50, 200]
    assert call.settings["source"] == "images"


@pytest.mark.slow
def test_a_preset_lies_under_yaml_and_yaml_under_flags(place: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("levels: [50, 200]\nsteps: 2\ndraws: 3\nseed: 4\nbatch_size: auto\n")
    given = ["fit", "reconstruction", place / "good", "--diffusion", place / "model", "--out", tmp_path / "d"]
    settings = ["--statistics", "30", "--alpha", "0.1", "--preset", "fast", "--steps", "1", "--config", yaml]
    assert run([*given, *settings]) == 0
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["config"]["mode"] == "fast", "of the preset"
    assert config["config"]["score"] == "mean_z", "of the preset"
    assert config["config"]["draws"] == 3, "YAML over the preset"
    assert config["config"]["steps"] == 1, "the flag over YAML"
    assert config["seed"] == 4
    assert config["runtime"]["batch_size"] == "auto"


def test_a_preset_named_in_yaml_is_applied(tmp_path: Path) -> None:
    """It would be bitter if `preset: fast` in a file were read and passed over."""
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("preset: fast\nlevels: [50, 200]\ndraws: 3\n")
    assert resolved("--config", yaml)["mode"] == "fast"
    assert resolved("--config", yaml, "--preset", "exact")["mode"] == "exact"


def test_printed_settings_are_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "reconstruction", "x", "--out", "y", "--levels", "50", "200", "--draws", "1", "--print-config"]
    assert main(words) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    values = resolved("--config", tmp_path / "c.yaml", "--draws", "2")
    assert values["levels"] == [50, 200]
    assert values["draws"] == 2
    assert values["source"] == "images", "what is typed overrides the file"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["train", "diffusion", "--preset", "classes"], ["preset: classes", "  classes: true"]),
        (["train", "classifier", "--preset", "ncis_tiny", "--loss", "vos"], ["preset: ncis_tiny", "  loss: vos"]),
        (["fit", "reconstruction", "x", "--preset", "fast", "--steps", "3"], ["mode: fast", "steps: 3", "source: x"]),
        (["synthesize", "sdedit", "--preset", "paper"], ["guidance: 7.5", "diffusion: null"]),
    ],
)
def test_printed_settings_are_those_of_the_preset(
    words: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--print-config"]) == 0
    assert set(lines) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("preset", DIFFUSION_PRESETS)
def test_a_training_preset_has_nothing_of_the_default_preset(preset: str) -> None:
    """`paper` trained a network on patches that predicts v, because `tiny` does."""
    given = parse("train diffusion", ["x", "--out", "y", "--preset", preset]).arguments
    assert given["model"] == DiffusionConfig(**DIFFUSION_PRESETS[preset]["model"])
    assert given["training"] == TrainingConfig(**DIFFUSION_PRESETS[preset]["training"])
    fitted = parse("fit", ["reconstruction", "x", "--out", "y", "--diffusion-preset", preset]).arguments
    assert (fitted["model"], fitted["training"]) == (given["model"], given["training"])


@pytest.mark.parametrize("preset", CLASSIFIER_PRESETS)
def test_a_preset_of_classifiers_has_nothing_of_the_default_preset(preset: str) -> None:
    outliers = [] if preset == "vos" else ["--outliers", "z"]
    given = parse("train classifier", ["x", "--out", "y", "--preset", preset, *outliers]).arguments
    assert given["model"] == ClassifierConfig(**CLASSIFIER_PRESETS[preset]["model"])
    assert given["training"] == TrainingConfig(**CLASSIFIER_PRESETS[preset]["training"])


def test_switches_need_no_value() -> None:
    assert resolved("--link", "--batch-size", "auto")["link"] is True
    assert resolved("--no-link")["link"] is False
    assert resolved("--no-training.nesterov")["training.nesterov"] is False


@pytest.mark.slow
def test_a_network_is_trained_where_none_is_given(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "good", 60)
    words = ["--levels", "50", "--training.steps", "1", "--training.batch-size", "4", "--training.ema", "None"]
    assert (
        run(["fit", "reconstruction", folder, "--out", tmp_path / "d", "--statistics", 20, "--alpha", 0.1, *words]) == 0
    )
    diffusion = load(tmp_path / "d").diffusion
    assert diffusion is not None
    assert diffusion.provenance["training"]["batch_size"] == 4
    assert diffusion.provenance["training"]["ema"] is None
    short = ["--device", "cpu", "--precision=fp32"]
    assert run(["train", "diffusion", folder, "--out", tmp_path / "m", "--statistics", 20, *words[2:], *short]) == 0
    assert (tmp_path / "m" / "config.json").is_file()


# -- score, calibrate, evaluate -----------------------------------------------------------------------------------


def test_score_then_score_again(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", place / "d", place / "far", "--out", tmp_path / "r", "--batch-size", "4"]
    assert run(words) == 0
    first = capsys.readouterr().out
    assert re.match(r"10 images: 10 scored \(\d+ flagged\); all new\n", first)
    for file in ("scores.csv", "measurements.parquet", "manifest.json", "page.html"):
        assert str(tmp_path / "r" / file) in first.replace("\n", "")
    assert run(words) == 0
    assert "; none new" in capsys.readouterr().out
    other = [*words[:2], place / "near", *words[3:]]
    assert "another run" in refused(capsys, other, 1)
    foreign = pictures(tmp_path / "mine", 2)
    assert "not empty" in refused(capsys, [*words[:4], foreign], 1)
    assert sorted(path.name for path in foreign.iterdir()) == ["000.png", "001.png"]
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, [*words[:4], tmp_path / "file"], 1)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size(place: Path, tmp_path: Path) -> None:
    for size in ("3", "auto"):
        assert run(["score", place / "d", place / "far", "--out", tmp_path / size, "--batch-size", size]) == 0
    assert_same_scores(read_scores(tmp_path / "3"), read_scores(tmp_path / "auto"), load(place / "d"))


def test_calibrate_keeps_the_given_detector(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load(place / "d").fingerprint
    words = ["calibrate", place / "d", place / "near", "--out", tmp_path / "c", "--alpha", "0.2"]
    assert run(words) == 0
    assert "12 calibration" in capsys.readouterr().out
    assert load(tmp_path / "c").alpha == 0.2
    assert load(place / "d").fingerprint == before


@pytest.mark.parametrize("form", ["spaced", "bracketed"])
@pytest.mark.slow
def test_evaluate_takes_several_sources(
    form: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"{place / 'far'}", f"{place / 'near'}@vflip"]
    ood = ["--ood", *sources] if form == "spaced" else ["--ood", f"[{','.join(sources)}]"]
    words = ["evaluate", place / "d", "--id", place / "near", *ood, "--out", tmp_path / "e", "--no-trivial-baselines"]
    assert run(words) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "e" / "metrics.csv") in printed.replace("\n", "")
    frame = pd.read_csv(tmp_path / "e" / "metrics.csv")
    assert list(dict.fromkeys(frame["ood"])) == sources
    assert set(frame["detector"]) == {"reconstruction"}


def test_evaluate_rates_anyones_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for name, scores in {"in": [0, 1, 2], "out": [2, 3, 4], "far": [7, 8, 9]}.items():
        names.append(tmp_path / f"{name}.csv")
        pd.DataFrame({"key": ["a", "b", "c"], "score": scores}).to_csv(names[-1], index=False)
    assert run(["evaluate", "--scores", *names, "--out", tmp_path / "e"]) == 0
    assert "0.944" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "e" / "metrics.csv")
    assert frame["auroc"].round(3).tolist() == [0.944, 1.0]
    assert "two files" in refused(capsys, ["evaluate", "--scores", names[0]], 1)
    assert "lost.csv" in refused(capsys, ["evaluate", "--scores", names[0], tmp_path / "lost.csv"], 1)
    (tmp_path / "words.csv").write_text("key,score\na,high\n")
    assert "words.csv" in refused(capsys, ["evaluate", "--scores", names[0], tmp_path / "words.csv"], 1)
    (tmp_path / "other.csv").write_text("name,value\na,1\n")
    assert "key and score" in refused(capsys, ["evaluate", "--scores", names[0], tmp_path / "other.csv"], 1)


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from farout.cli.commands import demo

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert "run the same command again to continue" in refused(capsys, ["demo"], 130)
    monkeypatch.setattr("farout.diffusion.train.open_source", interrupted)
    train = ["train", "diffusion", "images", "--out", tmp_path / "model"]
    assert "run the same command again to continue" in refused(capsys, train, 130)
    (tmp_path / "model.training" / "checkpoints").mkdir(parents=True)
    assert "add --resume to the same command to continue" in refused(capsys, train, 130)


def test_commands_run_without_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PYTHONOPTIMIZE=2` removes them."""
    from farout.cli.command_parser import parse
    from farout.cli.commands.score import score

    monkeypatch.setattr(score, "__doc__", None)
    assert parse("score", ["detector", "images", "--out", "results"]).settings["out"] == "results"
