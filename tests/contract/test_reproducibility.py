"""The same command gives the same bytes in another process, whatever the order of Python's sets and dictionaries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from farout import load
from small import pictures

pytestmark = pytest.mark.slow


def farout(*words: object, hash_seed: int) -> None:
    command = [sys.executable, "-m", "farout", *map(str, words)]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings", [["pca", "--size", 32], ["semantic", "--size", 32, "--updates", 8]])
def test_the_hash_seed_of_python_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[object]
) -> None:
    normal, new = pictures(tmp_path / "normal", 60), pictures(tmp_path / "new", 20, low=0, spread=255)
    tables, fingerprints = [], []
    for seed in (1, 2):
        monkeypatch.setenv("FAROUT_CACHE", str(tmp_path / f"cache{seed}"))
        detector, results = tmp_path / f"d{seed}", tmp_path / f"r{seed}"
        more = ["--alpha", 0.1, "--statistics", 20, "--precision", "fp32"]
        farout("fit", settings[0], normal, "--out", detector, *settings[1:], *more, hash_seed=seed)
        farout("score", detector, new, "--out", results, hash_seed=seed)
        tables.append((results / "scores.csv").read_bytes())
        fingerprints.append(load(detector).fingerprint)
    assert tables[0] == tables[1]
    assert fingerprints[0] == fingerprints[1]
