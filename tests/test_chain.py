"""The whole chain on the built-in sample, shorter than `farout demo`: train, fit, score, rate."""

from pathlib import Path

import pandas as pd
import pytest

from farout import load
from farout.evaluation.demo import demo


@pytest.mark.slow
def test_a_short_demo_tells_digits_from_clothes(tmp_path: Path) -> None:
    frame = demo(tmp_path, steps=40, limit=40, images=500, seed=0)
    own = frame[(frame["detector"] == "reconstruction") & (frame["indicator"] == "score")]
    digits = own[own["ood"] == "sample_digits:test"].iloc[0]
    assert digits["auroc_low"] > 0.6, "forty steps of training tell digits from clothes better than chance"
    assert digits["false_alarm"] < 0.2
    assert set(frame["detector"]) == {"reconstruction", "trivial_controls"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results" / "metrics.csv")[["auroc"]], frame[["auroc"]])
    detector = load(tmp_path / "detector")
    assert len(detector.diffusion.trained_on) > 100
    assert list((tmp_path / "results" / "scores").rglob("page.html"))
