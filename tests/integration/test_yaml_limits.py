"""YAML of users: plain values with limits, YAML 1.2's rules, and no value that becomes a flag, a file or an object."""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from farout.cli import main
from farout.cli.command_parser import parse, parse_settings
from farout.cli.steps import read_steps
from farout.core.errors import FaroutError, ReadError, UsageError
from farout.core.yaml_files import MAX_BYTES, MAX_DEPTH, YAMLError, dump_yaml, parse_yaml, read_yaml
from small import pictures

LETTERS = "abcdefghij"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join([f'*{before}'] * 10)}]\n" for before, now in itertools.pairwise(LETTERS)
)
MERGE_BOMB = "a: &a {k0: 1, k1: 1, k2: 1}\n" + "".join(
    f"{now}: &{now} {{<<: [{','.join([f'*{before}'] * 10)}]}}\n" for before, now in itertools.pairwise(LETTERS)
)
REFUSED = {
    BOMB: "counting what aliases",
    MERGE_BOMB: "counting what aliases",
    "[" * 10_000: f"more than {MAX_DEPTH} deep",
    "{a: " * 10_000: f"more than {MAX_DEPTH} deep",
    "- " * 10_000: f"more than {MAX_DEPTH} deep",
    "&a [*a]": "inside of its own anchor",
    "a: *secret": "an alias (*) without its anchor",
    "alpha: 1\nalpha: 2": "the key 'alpha' is given twice",
    "? [a]\n: b": "as a key",
    "!!python/object/apply:os.system [id]": "a tag (!)",
    "a: !!python/name:os.system": "a tag (!)",
    "a: !!binary aGk=": "a tag (!)",
    "a: !!int x": "a whole number was expected",
    "a:\n\t- b": "a tab",
    "a: 1\n---\nb: 2": "a second document",
    "a: [1, 2": "line 1",
    "a: \x1b[31m": "not allowed",
    "a: \x00": "not allowed",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_plain_yaml_is_refused_at_once(text: str) -> None:
    begins = time.monotonic()
    with pytest.raises(YAMLError) as raised:
        parse_yaml(text, "settings.yaml")
    assert REFUSED[text] in str(raised.value)
    assert str(raised.value).startswith("settings.yaml is not valid YAML: ")
    assert "\n" not in str(raised.value)
    assert time.monotonic() - begins < 20  # 40 s and much more for PyYAML


def test_anchors_are_allowed_within_the_limits() -> None:
    assert parse_yaml("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: *x", "f") == {
        "a": {"k": 1, "l": 2},
        "b": {"k": 3, "l": 2},
        "c": {"k": 1, "l": 2},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("no", "off", "yes", "on", "y", "012", "08", "1_000", "1:30", "2024-01-01", "NaN")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-3", -3),
        ("0x1F", 31),
        ("1e5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1e400", math.inf),
        ("'12'", "12"),
        ("!!str 12", "12"),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}", "f")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value", ["1e5", "012", "no", "0o17", "true", "null", "", ".5", "1:30", "=", "<<", "~", "a: b", "é\n", 1e20, 1e-7]
)
def test_written_yaml_is_read_back_by_any_parser(value: Any) -> None:
    text = dump_yaml({"key": value})
    assert parse_yaml(text, "f") == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


# -- files -----------------------------------------------------------------------------------------------------------


def test_only_regular_files_of_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("a: " + "x" * MAX_BYTES)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    (tmp_path / "bom.yaml").write_bytes("a: café\n".encode("utf-8-sig"))
    with pytest.raises(YAMLError, match="1,048,576 bytes"):
        read_yaml(tmp_path / "large.yaml")
    with pytest.raises(YAMLError, match="byte 6 is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    assert read_yaml(tmp_path / "bom.yaml") == {"a": "café"}
    with pytest.raises(ReadError, match=f"^cannot read {tmp_path}: "):
        read_yaml(tmp_path)
    with pytest.raises(ReadError, match=r"lost\.yaml: No such file"):
        read_yaml(tmp_path / "lost.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        with pytest.raises(ReadError, match="not a regular file"):
            read_yaml(tmp_path / name)
        for words in (["fit", "pca", "x", "--out", "o", "--config", tmp_path / name], ["bench", tmp_path / name]):
            assert main([*map(str, words), *(["--out", "o"] if words[0] == "bench" else [])]) == 1


SECRET = "hunter2:x:0:0:hunter2:/bin/bash\nsecret:$6$salt$hash:1:0\n"


@pytest.mark.parametrize(
    "content", [SECRET, f"- {SECRET}", f"&a [{SECRET}", f"{SECRET}\t: x", f"*{SECRET}"], ids=range(5)
)
@pytest.mark.parametrize("command", ["fit", "chain", "bench", "train diffusion"])
def test_errors_do_not_show_the_content_of_files(
    command: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shadow.yaml"
    path.write_text(content)
    words = {
        "fit": ["fit", "pca", "x", "--config", str(path)],
        "chain": ["chain", str(path)],
        "bench": ["bench", str(path)],
        "train diffusion": ["train", "diffusion", "x", "--training", str(path)],
    }
    assert main([*words[command], "--out", str(tmp_path / "out")]) in (1, 2)
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err
    assert "salt" not in shown.out + shown.err
    assert len(shown.err.splitlines()) == 1
    assert "shadow.yaml" in shown.err


# -- settings --------------------------------------------------------------------------------------------------------


def config(path: Path, text: str, *words: str) -> dict[str, Any]:
    path.write_text(text)
    return dict(parse("fit", ["reconstruction", *words, "--out", "o", "--config", str(path)]).settings)


def test_text_stays_text_and_names_may_be_numbers(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert config(file, "source: 2024")["source"] == "2024"
    assert config(file, "source: 012")["source"] == "012"
    assert config(file, "source: 2024-01-01")["source"] == "2024-01-01"
    assert config(file, "source: no")["source"] == "no"
    assert config(file, "source: x\ncache: no")["cache"] is False, "where true or false is expected"
    assert config(file, "source: x\nalpha: 1e-2")["alpha"] == 0.01
    assert config(file, "source: '$(id)'\ndiffusion: ${HOME}")["diffusion"] == "${HOME}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha: [1]", "--alpha must be a number"),
        ("source: {a: 1}", "source must be text"),
        ("source: 1.50", "source must be text"),
        ("alpha:", "--alpha must be a number, got nothing"),
        ("seed: null", "--seed must be a whole number, got nothing"),
        ("cache: ~", "--cache must be true or false, got nothing"),
        ("steps: 1.5", "--steps must be a whole number"),
        ("chain: 1", "there is no flag --chain"),
        ("training: os.path", "training must be settings by name, got text"),
        ("training: {class_path: os.path}", "there is no setting 'class_path'"),
        ("class_path: os.path", "there is no setting 'class_path'"),
    ],
)
def test_wrong_settings_are_named(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        config(tmp_path / "c.yaml", text, *([] if text.startswith("source") else ["x"]))
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    "value", ["[1]", "{a: b}", "@x", "1e5", "012", "true", "&a", "#x", "x:", "*a", "!x", "~", "'q'", "a\nb", "$HOME"]
)
def test_words_stay_text(value: str) -> None:
    assert parse("score", ["det", value, "--out", value]).settings["source"] == value
    assert parse("fit", ["reconstruction", "x", "--out", "o", "--diffusion", value]).settings["diffusion"] == value
    assert list(parse("evaluate", ["d", "--id", value, "--ood", value, "x", "--out", "o"]).settings["ood"]) == [
        value,
        "x",
    ]


# -- chains ----------------------------------------------------------------------------------------------------------

ODD_VALUES = ["--config=secret.yaml", "--config", "-x", "--help", "--out=elsewhere", "a\nb", "$(touch y)", "`id`", "--"]


@pytest.mark.parametrize("value", ODD_VALUES)
def test_a_value_of_a_chain_stays_a_value(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.yaml").write_text("password: hunter2\n")
    settings = parse_settings("score", {"detector": value, "source": value, "out": "o"}).settings
    assert (settings["detector"], settings["source"], settings["out"]) == (value, value, "o")

    Path("chain.yaml").write_text(dump_yaml({"steps": [{"fit pca": {"source": value, "out": "detector"}}]}))
    assert main(["chain", "chain.yaml", "--out", "o"]) == 1
    printed = capsys.readouterr()
    assert "step 1 (fit pca): " in printed.err
    assert "hunter2" not in printed.err + printed.out
    assert not Path("y").exists()

    if "/" in value:
        return
    pictures(tmp_path / value, 3)
    (step,) = read_steps("chain.yaml")
    words = step.command_line(Path("o"))
    assert parse("fit", words[1:]).settings["source"] in (value, f"./{value}"), "what --dry-run prints does the same"


@pytest.mark.parametrize("out", ["../x", "/tmp/x", "a/b", "", ".", "..", "-x", "~", "a\nb", [1], {"a": 1}, "--out"])
def test_a_step_writes_into_the_folder_of_the_chain(out: object, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump_yaml({"steps": [{"fit pca": {"source": "x", "out": out}}]}))
    with pytest.raises(FaroutError, match="step 1"):
        read_steps(str(tmp_path / "c.yaml"))
