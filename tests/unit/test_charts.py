"""Charts of the pages: equal bytes for equal data, text that stays text, and marks where the numbers are."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from farout.detectors.plots import draw_score_histogram
from farout.evaluation.metrics import auroc
from farout.report.charts import (
    cost_scatter,
    distance_histogram,
    draw_auroc_intervals,
    evidence_chart,
    pareto_front,
    rate_chart,
    roc_curves,
    roc_points,
    score_histogram,
)

HOSTILE = '</svg><script>alert("$x$")</script> & --> a$b'
RATES = ["window_rate", "window_low", "window_high", "expected_low", "expected_high"]
NORMAL = np.random.default_rng(0).normal(size=(2, 300))


def charts(name: str = "knn") -> list[str]:
    costs = pd.DataFrame({"cost": [0.0, 3.0], "auroc": [0.6, 0.9], "is_baseline": [True, False]}, index=["zero", name])
    return [
        score_histogram({name: NORMAL[0], "new": NORMAL[1] + 1}, 1.5, name),
        distance_histogram({name: np.exp(NORMAL[0])}, name, name),
        roc_curves({name: (NORMAL[0], NORMAL[1] + 1)}, name),
        cost_scatter(costs, name, name),
        cost_scatter(costs.iloc[1:], name, name, higher_is_cheaper=True),
    ]


def test_equal_data_give_equal_bytes() -> None:
    assert charts() == charts()


def test_names_are_text_and_never_markup() -> None:
    for chart in charts(HOSTILE):
        assert "<script" not in chart
        assert chart.count("</svg>") == 1
        assert "$b" in chart, "dollar signs are no formula"
        assert not re.search("https?:", chart)


@pytest.mark.parametrize("high", [1.5, 9.0, 5000.0])
def test_logarithmic_axes_have_plain_numbers(high: float) -> None:
    """Formulas are not rendered: their markup would be on the page."""
    costs = pd.DataFrame({"cost": [0.3, high], "auroc": [0.6, 0.9], "is_baseline": False}, index=["a", "b"])
    for chart in (distance_histogram({"a": np.array([0.3, high])}, "x", ""), cost_scatter(costs, "x", "")):
        assert "$" not in chart
        assert {">1</text>", ">0.5</text>"} & set(re.findall(">[0-9.]+</text>", chart))


def test_charts_of_one_page_share_no_ids() -> None:
    ids = [name for chart in charts() for name in set(re.findall(r' id="(.*?)"', chart))]
    assert len(ids) == len(set(ids))
    for chart in charts():
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', chart)) <= set(re.findall(r' id="(.*?)"', chart))


def test_colors_follow_the_page() -> None:
    chart = score_histogram({"a": NORMAL[0], "b": NORMAL[1]}, 1.5, "")
    assert {"currentColor", "var(--in)", "var(--out)", "var(--line)"} <= set(
        re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)
    )
    assert not re.findall(r"#[0-9a-f]{6}\b", chart)


def test_matplotlib_is_imported_with_the_first_chart() -> None:
    code = "import sys, farout.report.score_page, farout.report.overlays; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def drawn(samples: dict[str, np.ndarray], threshold: float | None) -> tuple[list[str], list[float], str]:
    axes = Figure().add_subplot()
    draw_score_histogram(axes, samples, threshold)
    lines = [float(np.asarray(line.get_xdata())[0]) for line in axes.lines]
    return axes.get_legend_handles_labels()[1], lines, axes.get_xlabel()


def test_the_histogram_marks_the_threshold_and_says_what_it_cuts_off() -> None:
    labels, lines, xlabel = drawn({"a": NORMAL[0], "b": np.append(NORMAL[1], [50, np.inf, np.nan])}, 1.25)
    assert lines == [1.25]
    assert labels == ["a", "b", "threshold 1.25"]
    assert "the last bar includes all scores above" in xlabel
    assert drawn({"a": NORMAL[0]}, np.inf)[1] == []
    assert drawn({"a": np.array([2.0, 2.0])}, None)[2] == "score"
    assert drawn({"a": np.array([np.nan])}, None)[0] == []


def test_bars_add_up_to_all_images() -> None:
    axes = Figure().add_subplot()
    draw_score_histogram(axes, {"a": NORMAL[0], "b": np.append(NORMAL[1], 50)}, None)
    for patch in axes.patches:
        vertices = patch.get_path().vertices[1::2, 1]
        assert vertices[: len(vertices) // 2].sum() == pytest.approx(1)


def test_charts_over_time_stay_small() -> None:
    """Of many images, of which after a change every second one raises an alarm."""
    count = 20_000
    images, values = np.arange(1, count + 1), np.random.default_rng(0).normal(size=count)
    windows = pd.DataFrame(dict.fromkeys(RATES, np.linspace(0, 1, count)))
    for chart in (
        evidence_chart(images, values, 1.0, images[count // 2 :: 2], "martingale", ""),
        rate_chart(images, windows, 0.05, ""),
    ):
        assert len(chart) < 200_000
    lines = [
        evidence_chart(images, values, 1.0, np.array(alarms, dtype=int), "m", "").count("<path")
        for alarms in ([], [7], [7, 9000])
    ]
    assert lines[1] - lines[0] > lines[2] - lines[1] == 1, "a legend entry, and a line for each alarm"


@pytest.mark.parametrize("ties", [False, True])
def test_roc_points_enclose_the_area(ties: bool) -> None:
    generator = np.random.default_rng(0)
    id_scores, ood_scores = generator.normal(size=3000), generator.normal(size=2000) + 1
    if ties:
        id_scores, ood_scores = id_scores.round(), ood_scores.round()
    false_positive_rate, true_positive_rate = roc_points(id_scores, ood_scores)
    assert (false_positive_rate[0], true_positive_rate[0]) == (0, 0)
    assert (false_positive_rate[-1], true_positive_rate[-1]) == (1, 1)
    assert len(true_positive_rate) <= 128
    area = np.trapezoid(true_positive_rate, false_positive_rate)
    assert area == pytest.approx(auroc(id_scores, ood_scores), abs=0.005)


@pytest.mark.parametrize(
    ("higher_is_cheaper", "expected"), [(False, [True, True, False, False]), (True, [False, True, False, True])]
)
def test_nothing_beats_the_pareto_front(higher_is_cheaper: bool, expected: list[bool]) -> None:
    cost, area = np.array([1.0, 10.0, 10.0, 100.0]), np.array([0.8, 0.9, 0.85, 0.7])
    assert pareto_front(cost, area, higher_is_cheaper=higher_is_cheaper).tolist() == expected


def test_costs_without_a_number_are_left_out() -> None:
    table = pd.DataFrame({"cost": [np.nan, 1.0], "auroc": [0.9, 0.8], "is_baseline": False}, index=["unknown", "knn"])
    chart = cost_scatter(table, "GMACs", "")
    assert "knn" in chart
    assert "unknown" not in chart
    assert "</svg>" in cost_scatter(table.iloc[:1], "GMACs", "")


def test_intervals_are_drawn_around_their_dots() -> None:
    table = pd.DataFrame(
        {
            "detector": ["knn", "knn", "msp"],
            "ood": ["near", "far", "far"],
            "auroc": [0.7, 0.9, 0.8],
            "auroc_low": [0.6, 0.85, 0.7],
            "auroc_high": [0.8, 0.95, 0.9],
        }
    )
    axes = Figure().add_subplot()
    draw_auroc_intervals(axes, table)
    assert axes.get_legend_handles_labels()[1] == ["knn", "msp"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["near", "far"]
    segments = np.concatenate([np.array(bars.get_segments())[:, :, 0] for bars in axes.collections])
    np.testing.assert_allclose(segments, table[["auroc_low", "auroc_high"]])
