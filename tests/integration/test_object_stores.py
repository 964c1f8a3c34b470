"""A detector on images of an object store: the same detector and scores as on the same files in a folder."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from farout import PCA, Scorer, load
from farout.cli import main
from farout.core.storage import write_bytes
from image_files import pixels, write_folder
from tolerances import SCORE_TOLERANCE


@pytest.mark.slow
def test_a_detector_is_fitted_and_used_on_a_store(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "good", pixels(40, 3), [f"{number:02}.png" for number in range(40)])
    write_folder(tmp_path / "new", pixels(6, 3, seed=1), [f"{number % 2}/{number}.png" for number in range(6)])
    (tmp_path / "new" / "0" / "broken.png").write_bytes(b"no image")
    for file in (file for name in ("good", "new") for file in (tmp_path / name).rglob("*.png")):
        write_bytes(f"{bucket}/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images
        local = PCA(size=8).fit(tmp_path / "good", statistics=15, alpha=0.1)
        PCA(size=8).fit(f"{bucket}/good", statistics=15, alpha=0.1).save(tmp_path / "detector")
        detector = load(tmp_path / "detector")
        assert detector.provenance["source"] == f"{bucket}/good"
        assert detector.provenance["data_fingerprint"] == local.provenance["data_fingerprint"]
        expected = local.score(tmp_path / "new")
        assert main(["score", str(tmp_path / "detector"), f"{bucket}/new", "--out", str(tmp_path / "out")]) == 0
        assert main(["features", "extract", f"{bucket}/good", "--size", "8"]) == 0
    assert "unreadable: 0/broken.png: not an image" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "data:image" in (tmp_path / "out" / "page.html").read_text(), "thumbnails come from the store"
    assert manifest["location"] == f"{bucket}/new"
    table = Scorer(tmp_path / "detector")({"path": [f"{bucket}/new/{key}" for key in expected.keys]})
    scale = np.std(detector.calibration_scores[detector.score_name])
    np.testing.assert_allclose(table["score"], expected.score, rtol=0, atol=SCORE_TOLERANCE * scale)
    assert list(table["status"]) == list(expected.status)
