"""A short `farout demo` on the built-in sample: train, fit, score, evaluate."""

from pathlib import Path

import pandas as pd
import pytest

from farout import load
from farout.benchmark.demo import demo


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.* sampled images are gray:farout.core.errors.MisleadingResultWarning",
    "ignore:.* is below one half:farout.core.errors.MisleadingResultWarning",
)
def test_a_short_demo_distinguishes_digits_from_clothes(tmp_path: Path) -> None:
    evaluations = list(demo(tmp_path, steps=40, limit=40, images=500, seed=0))
    frames = {name: each.metrics for name, each in zip(["semantic", "reconstruction"], evaluations)}
    for name, frame in frames.items():
        own = frame[(frame["detector"] == name) & (frame["indicator"] == "score")]
        digits = own[own["ood"] == "sample_digits:test"].iloc[0]
        assert digits["auroc_low"] > 0.6, "better than chance even after a short training"
        assert digits["false_alarm"] < 0.2
        results = tmp_path / name / "results"
        pd.testing.assert_frame_equal(pd.read_csv(results / "metrics.csv")[["auroc"]], frame[["auroc"]])
        assert len(load(tmp_path / name / "detector").diffusion.trained_on) > 100
        assert list((results / "scores").rglob("page.html"))
    assert set(frames["reconstruction"]["detector"]) == {"reconstruction", "trivial_baselines"}
    baselines = set(frames["semantic"]["detector"]) - {"semantic"}
    assert {"mahalanobis", "trivial_baselines"} <= baselines
    paired = pd.read_csv(tmp_path / "semantic" / "results" / "differences.csv")
    assert set(paired["second"]) == baselines, "methods without diffusion are compared with the method"
