"""Results that are written into the folder of the images are not images at the next run."""

from __future__ import annotations

from pathlib import Path

import pytest

from farout import PCA
from farout.cli import main
from farout.core.errors import LeftOutWarning
from farout.data.sources import open_source
from small import model, pictures


def test_results_in_the_image_folder_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(tmp_path / "images", 40)
    PCA(size=32).fit(images, statistics=20, alpha=0.1).save(images / "detector")
    words = ["score", str(images / "detector"), str(images), "--out", str(images / "results")]
    assert main(words) == 0
    pictures(images / "results" / "maps", 2)
    assert main(words) == 0, "the same images as before"
    printed = capsys.readouterr()
    assert "none new" in printed.out
    with pytest.warns(LeftOutWarning, match=r"in results \(written by farout\)"):
        source = open_source(images)
    assert len(source) == 40
    assert len(open_source(images / "results" / "maps")) == 2, "if it is named itself"


def test_generated_images_and_models_are_left_out(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 3)
    model().save(images / "model")
    pictures(images / "model" / "examples", 2)
    with pytest.warns(LeftOutWarning, match=r"in model \(written by farout\)"):
        assert len(open_source(f"{images}/**/*.png")) == 3
    pictures(images / "mine", 2)
    (images / "mine" / "config.json").write_text('{"farout": 3}')
    with pytest.warns(LeftOutWarning):
        assert len(open_source(images)) == 5, "of another program"


@pytest.mark.parametrize("kind", ["equal", "parent"])
def test_an_out_that_holds_the_images_is_refused(kind: str, tmp_path: Path) -> None:
    images = pictures(tmp_path / "top" / "images", 40)
    PCA(size=32).fit(images, statistics=20, alpha=0.1).save(tmp_path / "d")
    out = images if kind == "equal" else images.parent
    before = sorted(out.rglob("*"))
    assert main(["score", str(tmp_path / "d"), str(images), "--out", str(out)]) == 1
    assert main(["fit", "pca", str(images), "--out", str(out)]) == 1
    assert sorted(out.rglob("*")) == before
