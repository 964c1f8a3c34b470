"""Measurements and scores come back from their tables as they went in."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure

from farout.core.errors import FaroutError, StoreError
from farout.detectors.results import Measurements, Scores


def test_grids_and_vectors_round_trip() -> None:
    values = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).reshape(2, 3, 2, 4)
    values[1, 2, 0, 3] = float("nan")
    grid = Measurements(("b/1", "a"), values, (10.0, 50.0, 200.0), ("mse", "x", "y", "z"))
    again = Measurements.from_table(grid.to_table())
    assert (again.keys, again.levels, again.metrics) == (grid.keys, grid.levels, grid.metrics)
    torch.testing.assert_close(again.values, values, equal_nan=True, rtol=0, atol=0)
    assert grid.is_finite().tolist() == [True, False]
    long = Measurements(("b", "a"), vectors={"f": torch.rand(2, 5), "g": torch.rand(2, 1)})
    back = Measurements.from_table(long.to_table())
    assert back.keys == long.keys
    assert all(torch.equal(back.vectors[name], vector) for name, vector in long.vectors.items())
    assert back.select([1]).keys == ("a",)
    joined = Measurements.join([long, back])
    assert joined.vectors["f"].shape == (4, 5)


def test_a_cut_table_is_refused() -> None:
    grid = Measurements(("a", "b"), torch.zeros(2, 1, 1, 3), (1.0,), ("x", "y", "z"))
    with pytest.raises(StoreError, match="incomplete"):
        Measurements.from_table(grid.to_table().slice(0, 5))
    with pytest.raises(StoreError, match="key"):
        Measurements.from_table(pa.table({"name": ["a"]}))


def test_anyones_table_is_read() -> None:
    plain = Scores.from_frame(
        pd.DataFrame({"key": ["a", "b"], "score": [1.0, np.nan], "mine": [3, 4], "text": ["x", "y"]})
    )
    assert plain.status == ("ok", "not a number")
    assert list(plain.indicators) == ["mine"]
    assert np.isnan(plain.p_value).all()
    with pytest.raises(FaroutError, match="score"):
        Scores.from_frame(pd.DataFrame({"key": ["a"]}))


def notebook_scores(count: int = 12) -> Scores:
    score = np.append(np.arange(count - 1, dtype=float), np.nan)
    keys = ("<b>bold</b>.png", *(f"{i}.png" for i in range(1, count)))
    status = ("ok",) * (count - 1) + ("unreadable",)
    return Scores(keys, score, 1 / (1 + score), score > 8.5, status, {"other": -score})


def test_scores_are_summarized() -> None:
    scores = notebook_scores()
    assert repr(scores) == "Scores(12 images, 2 flagged, 1 unreadable)"
    html = scores._repr_html_()
    assert "12 images, 2 flagged, 1 unreadable" in html
    assert html.count("<tr") == 1 + 10
    assert "10 highest of 11 scores" in html
    assert html.index(">10.png<") < html.index(">9.png<") < html.index(">1.png<")
    short = notebook_scores(3)._repr_html_()
    assert "<b>bold" not in short
    assert "&lt;b&gt;bold" in short
    assert "highest" not in short


def test_the_threshold_separates_flagged_scores() -> None:
    scores = notebook_scores()
    assert scores.threshold == 8.5
    assert notebook_scores(4).threshold == np.inf


def test_scores_are_plotted() -> None:
    axes = Figure().add_subplot()
    scores = notebook_scores()
    assert scores.plot(axes) is axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[8.5, 8.5]]
    assert axes.get_legend_handles_labels()[1] == ["11 scored images", "threshold 8.5"]
    known = replace(scores, calibration=np.array([1.0, 2.0]), calibration_threshold=4.0)
    axes = Figure().add_subplot()
    assert known.plot(axes) is axes
    assert axes.get_legend_handles_labels()[1] == ["2 calibration images", "11 scored images", "threshold 4"]
    matplotlib.use("agg")
    assert scores.plot().figure is not None
