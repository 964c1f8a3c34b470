"""Overlays: one picture a scored image, on one scale, inside the folder, and nothing done twice."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from farout import load
from farout.cli import main
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.decoding import from_pil
from farout.detectors.base import Detector
from farout.detectors.declarations import HeatMaps
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.reconstruction import Reconstruction
from farout.report.overlays import draw_overlay, overlay_path, write_overlays
from small import model, pictures

COUNT = 11

HOTTEST = HeatMaps.maximum


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with maps, and images of which one cannot be read and one is in a folder."""
    root = tmp_path_factory.mktemp("overlays")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Reconstruction(levels=(50, 200), draws=1).fit(
            pictures(root / "good", 60), model(), alpha=0.1, statistics=30
        )
    fitted.save(root / "d")
    pictures(root / "new", COUNT, low=60, spread=150, seed=3)
    (root / "new" / "line 2").mkdir()
    shutil.move(root / "new" / "004.png", root / "new" / "line 2" / "004.png")
    (root / "new" / "007-broken.png").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def detector(place: Path) -> Detector:
    return load(place / "d", batch_size=3)


def run(words: list) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all images that are measured."""
    keys: list[str] = []
    original = Reconstruction.measure

    def watching(self: Reconstruction, batch: Batch, maps: bool = False) -> object:
        keys.extend(batch.keys)
        return original(self, batch, maps)

    monkeypatch.setattr(Reconstruction, "measure", watching)
    return keys


# -- the command --------------------------------------------------------------------------------------------------


def test_score_writes_a_map_of_every_readable_image(place: Path, tmp_path: Path) -> None:
    assert run(["score", place / "d", place / "new", "--out", tmp_path / "r", "--maps", "--top-images", 2]) == 0
    maps = contents(tmp_path / "r" / "maps")
    expected = {f"{i:03d}.png.png" for i in range(COUNT) if i != 4} | {"line 2/004.png.png"}
    assert {name for name in maps if name.endswith(".png")} == expected
    explanation = "Maps show standard deviations above normal images. Colors begin at 0 and are brightest at 6"
    assert explanation in maps["README.txt"].decode()
    assert Image.open(tmp_path / "r" / "maps" / "000.png.png").size == (224, 224)
    assert (tmp_path / "r" / "scores.csv").is_file()


def test_a_scored_folder_can_get_maps_afterwards(place: Path, tmp_path: Path) -> None:
    words = ["score", place / "d", place / "new", "--out", tmp_path / "r", "--top-images", 2]
    assert run(words) == 0
    assert not (tmp_path / "r" / "maps").exists()
    scores = (tmp_path / "r" / "scores.csv").read_bytes()
    assert run([*words, "--maps"]) == 0
    assert len(contents(tmp_path / "r" / "maps")) == COUNT + 1
    assert (tmp_path / "r" / "scores.csv").read_bytes() == scores


def test_a_limit_holds_for_the_maps_too(place: Path, tmp_path: Path) -> None:
    assert run(["score", place / "d", place / "new", "--out", tmp_path / "r", "--maps", "--limit", 3]) == 0
    named = {line.partition(",")[0] for line in (tmp_path / "r" / "scores.csv").read_text().splitlines()[1:]}
    maps = {name.removesuffix(".png") for name in contents(tmp_path / "r" / "maps")} - {"README.txt"}
    assert maps == named - {"007-broken.png"}


def test_a_detector_without_maps_says_which_have_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is scored: nobody waits an hour for an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Mahalanobis(size=32).fit(place / "good", alpha=0.1).save(tmp_path / "d")
    capsys.readouterr()
    assert run(["score", tmp_path / "d", place / "new", "--out", tmp_path / "r", "--maps"]) == 1
    line = capsys.readouterr().err
    assert "patches" in line
    assert "reconstruction" in line
    assert "Traceback" not in line
    assert not (tmp_path / "r").exists()


def test_an_unfitted_detector_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="not been fitted"):
        write_overlays(Reconstruction(), place / "new", tmp_path / "m")


# -- resumption ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_overlays(detector, place / "new", tmp_path / "whole") == COUNT
    replace, done = os.replace, []

    def stopping(*paths: object) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_overlays(detector, place / "new", tmp_path / "part")
    there = contents(tmp_path / "part")
    assert len([name for name in there if name.endswith(".png")]) == 5
    keys = measured(monkeypatch)
    assert write_overlays(detector, place / "new", tmp_path / "part") == COUNT - 5
    assert COUNT - 5 <= len(keys) < COUNT - 5 + 3, "at most one batch is measured again"
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    keys.clear()
    assert write_overlays(detector, place / "new", tmp_path / "part") == 0
    assert not keys


def test_no_more_than_a_batch_is_in_memory(
    place: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[int] = []
    original = Reconstruction.measure

    def counting(self: Reconstruction, batch: Batch, maps: bool = False) -> object:
        assert len(batch.keys) <= 3
        on_disk.append(len(list((tmp_path / "m").rglob("*.png"))))
        return original(self, batch, maps)

    monkeypatch.setattr(Reconstruction, "measure", counting)
    write_overlays(detector, place / "new", tmp_path / "m")
    assert on_disk == sorted(set(on_disk)), "pictures are written batch by batch"


# -- names --------------------------------------------------------------------------------------------------------

KEYS = [
    "a.png",
    "folder/b c.jpg",
    "../../etc/passwd",
    "/etc/passwd",
    "etc/passwd",
    "a//b",
    "a/./b",
    ".",
    "..",
    "...",
    "",
    "C:\\windows\\x.png",
    "C%3A\\windows",
    "nul\0byte",
    "new\nline",
    "für/日本.png",
    "x" * 300,
    "x" * 301,
    "日" * 100,
]


@pytest.mark.parametrize("key", KEYS)
def test_no_key_leads_out_of_the_folder(key: str, tmp_path: Path) -> None:
    path = (tmp_path / overlay_path(key)).resolve()
    assert path.is_relative_to(tmp_path)
    assert path.name.endswith(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a file system takes it")


def test_no_two_keys_share_a_name() -> None:
    assert len({overlay_path(key) for key in KEYS}) == len(KEYS)
    assert overlay_path("folder/b c.jpg") == "folder/b c.jpg.png"


# -- pictures -----------------------------------------------------------------------------------------------------


def gray(height: int, width: int, value: int = 100) -> torch.Tensor:
    return torch.full((1, height, width), value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("native", "size"), [((8, 8), (224, 224)), ((10, 20), (224, 112)), ((300, 150), (150, 300)), ((224, 1), (1, 224))]
)
def test_aspect_is_kept_and_small_images_are_enlarged(native: tuple[int, int], size: tuple[int, int]) -> None:
    assert draw_overlay(gray(*native), torch.zeros(4, 4)).size == size


def test_what_is_normal_is_left_as_it_is() -> None:
    image = torch.randint(0, 256, (3, 230, 240), generator=torch.Generator().manual_seed(0)).byte()
    for value in (0.0, -5.0):
        assert torch.equal(from_pil(draw_overlay(image, torch.full((8, 8), value))), image)


def test_the_scale_is_one_for_all_images() -> None:
    """A position of 3 deviations looks the same next to one of 3 and next to one of 100."""
    mild, wild = torch.full((2, 40), 3.0), torch.full((2, 40), 3.0)
    wild[:, -1] = 100
    one, two = (np.asarray(draw_overlay(gray(224, 224), heat))[:, :20] for heat in (mild, wild))
    assert np.array_equal(one, two)
    hottest, beyond = (np.asarray(draw_overlay(gray(224, 224), torch.full((2, 2), v))) for v in (HOTTEST, 50.0))
    assert np.array_equal(hottest, beyond)
    assert not np.array_equal(one, hottest[:, :20])


def test_what_is_not_a_number_never_looks_normal() -> None:
    nan, hottest = (np.asarray(draw_overlay(gray(224, 224), torch.full((2, 2), v))) for v in (float("nan"), HOTTEST))
    assert np.array_equal(nan, hottest)


def test_heat_lies_where_it_belongs() -> None:
    heat = torch.zeros(4, 8)
    heat[0, 7] = 6
    found = np.asarray(draw_overlay(gray(100, 400), heat)).astype(int)
    changed = np.abs(found - 100).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert rows.max() < 50
    assert columns.min() > 290


def test_a_map_of_a_central_crop_lies_in_the_middle() -> None:
    found = np.asarray(draw_overlay(gray(300, 400), torch.full((4, 4), 6.0), crop=100)).astype(int)
    rows, columns = np.nonzero(np.abs(found - 100).sum(2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (100, 199, 150, 249)
