"""Several processes write the same folder of generated images as one process."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from farout import reconstruct
from farout.classifiers.outlier_images import open_outliers, read_source_hashes
from farout.cli import main
from farout.core.devices import ProcessGroup
from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.synthesis.editing.sona import SONA
from farout.synthesis.generated_folder import read_manifest_rows
from farout.synthesis.ncis import NCIS
from farout.synthesis.writer import ImageWriter
from launch import in_two_processes
from small import conditional, pictures
from tolerances import SONA_SHARE, assert_same_images, assert_same_manifests

pytestmark = pytest.mark.numerics

CPU = Runtime(device="cpu", precision="fp32", batch_size=2, workers=0)


def make_all(root: Path, out: Path, **settings: Any) -> dict[str, tuple[int, int]]:
    """Run every method; return the numbers of all and of new images."""
    given = {"diffusion": conditional(), "runtime": CPU, **settings}
    found = {
        "sona": SONA(steps=4, reconstructions=True).synthesize(root, out / "sona", count=15, **given),
        # it trains a manifold, in stages of the main process
        "ncis": NCIS(**NCIS.test_arguments).synthesize(root, out / "ncis", count=5, **given),
        "again": reconstruct(root, out=out / "again", steps=2, **given),
    }
    return {name: (folder.images, folder.generated) for name, folder in found.items()}


def command(root: Path, out: Path) -> list[str]:
    words = ["synthesize", "class_noise", str(root), "--diffusion", str(root.parent / "model"), "--out", str(out)]
    return [*words, "--steps", "2", "--count", "5", "--device", "cpu", "--precision", "fp32"]


def files(folder: Path) -> dict[str, bytes]:
    """All files except those with the command or times."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.json", "page.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


SCRIPT = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_synthesis_processes as t
torch.set_num_threads(1)
root, out, rank = Path({root!r}), Path({out!r}), os.environ["RANK"]
found = t.make_all(root, out)
assert t.main(t.command(root, out / "command")) == 0
refused = ""
try:
    t.make_all(root, out)
except t.FaroutError as error:
    refused = str(error)
(out / f"{{rank}}.txt").write_text(f"{{found}} {{refused}}")
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Labelled images of the classes that `conditional()` knows, and such a model."""
    for number, name in enumerate("abc"):
        pictures(tmp_path / "images" / name, 4, low=60 * number, seed=number)
    conditional().save(tmp_path / "model")
    return tmp_path / "images"


@pytest.mark.slow
def test_two_processes_write_the_folder_of_one(images: Path, tmp_path: Path) -> None:
    """The same files, with the same images up to rounding."""
    script, shared, single = tmp_path / "script.py", tmp_path / "two", tmp_path / "one"
    shared.mkdir()
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), root=str(images), out=str(shared)))
    done = in_two_processes(script, 600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = make_all(images, single)
    assert alone == {"sona": (15, 15), "ncis": (5, 5), "again": (12, 12)}
    assert main(command(images, single / "command")) == 0
    refusal = f"{shared / 'sona'} already contains outliers; give --resume (resume=True) to continue, or another folder"
    assert [(shared / f"{rank}.txt").read_text() for rank in (0, 1)] == [f"{alone} {refusal}"] * 2
    assert done.stdout.count("5 outliers, 5 new") == 1
    for name in (*alone, "command"):
        assert sorted(files(shared / name)) == sorted(files(single / name)), name
        assert_same_images(shared / name, single / name, SONA_SHARE if name == "sona" else 1)
        assert_same_manifests(shared / name, single / name)
    assert (shared / "sona" / "reconstructions" / "manifest.csv").is_file()
    assert (shared / "command" / "page.html").is_file()


# files of processes that were stopped


def add(
    folder: Path, processes: ProcessGroup, indices: Sequence[int], *, finish: bool = False, resume: bool = True
) -> None:
    writer = ImageWriter(folder, ("a",), 0, "reconstructions", processes)
    writer.begin({"config": {}}, {}, resume=resume)
    columns = {"source_hash": [f"hash {index}" for index in indices]}
    with writer:
        images = torch.stack([torch.full((1, 8, 8), index / 10) for index in indices])
        writer.write(indices, [0] * len(indices), images, [f"image {index}" for index in indices], columns)
        if finish:
            writer.finish()


def test_manifests_of_stopped_processes_become_one(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    add(tmp_path / "whole", ProcessGroup(cpu), range(6), finish=True)
    out = tmp_path / "o"
    add(out, ProcessGroup(cpu), [0, 2])
    shutil.copytree(out, tmp_path / "two")
    # as the second of two processes, which gets the content of the folder from the first one
    add(tmp_path / "two", ProcessGroup(cpu), [1, 3])
    lines = (tmp_path / "two" / "manifest.csv").read_text().splitlines(keepends=True)
    (out / "manifest.1.csv").write_text("".join([lines[0], *lines[3:]])[:-4])
    shutil.copytree(tmp_path / "two" / "images", out / "images", dirs_exist_ok=True)
    source = open_outliers(out, kind="reconstructions")
    hashes = dict(zip(source.keys, read_source_hashes(out, source)))
    assert [hashes[f"a/{index:06d}.png"] for index in (0, 1, 2)] == ["hash 0", "hash 1", "hash 2"]
    writer = ImageWriter(out, ("a",), 0, "reconstructions")
    writer.begin({"config": {}}, {}, resume=True)
    assert writer.missing_indices(6) == [3, 4, 5]
    assert not (out / "manifest.1.csv").exists()
    add(out, ProcessGroup(cpu), [4, 3])
    add(out, ProcessGroup(cpu), [5], finish=True)
    assert files(out) == files(tmp_path / "whole")
    assert list(read_manifest_rows(out)[1]) == list(range(6))


def test_processes_get_disjoint_shares_and_the_main_process_runs_a_function() -> None:
    cpu = torch.device("cpu")
    parts = [ProcessGroup(cpu, 3, index).split_between_processes(range(8)) for index in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(8))
    assert ProcessGroup(cpu).run_on_main_process(lambda: 5) == 5

    def fails() -> None:
        raise FaroutError("no way")

    with pytest.raises(FaroutError, match="no way"):
        ProcessGroup(cpu).run_on_main_process(fails)
