"""Summaries of scores: equal to the whole table, however it is divided, in memory that does not grow with the set."""

import pickle
import random
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farout.core.csv_files import write_csv
from farout.core.errors import ConstantScoresWarning, FaroutError, NaNScoresWarning, StoreError
from farout.detectors.calibration import benjamini_hochberg, compute_p_values, flag_outliers
from farout.detectors.results import Measurements, Scores
from farout.detectors.score_histogram import ScoreHistogram
from farout.detectors.score_summary import ScoreSummary
from farout.scoring import summary as summary_module
from farout.scoring.summary import add_table

CALIBRATION = np.random.default_rng(0).normal(size=199)


def table(score: np.ndarray, calibration: np.ndarray = CALIBRATION, alpha: float = 0.05) -> Scores:
    """Scores of images `0`, `1`, …; NaN: every second one is unreadable, the others are not numbers."""
    p_value = compute_p_values(score, calibration)
    kinds = np.where(np.isfinite(score), "ok", np.where(np.arange(len(score)) % 2, "unreadable", "not a number"))
    return Scores(
        keys=tuple(f"{index:07d}" for index in range(len(score))),
        score=score,
        p_value=p_value,
        is_ood=flag_outliers(p_value, alpha),
        status=tuple(kinds.tolist()),
        indicators={"max": score, "mean": score / 2},
    )


def measurements_of(scores: Scores, start: int = 0) -> Measurements:
    rows = [row for row, status in enumerate(scores.status) if status != "unreadable"]
    vectors = torch.tensor([[start + row, 0.5] for row in rows]).reshape(-1, 2)
    return Measurements(tuple(scores.keys[row] for row in rows), vectors={"features": vectors})


def add_parts(summary: ScoreSummary, scores: Scores, edges: list[int]) -> ScoreSummary:
    for start, stop in pairwise(edges):
        part = scores.select(range(start, stop))
        reasons = {key: f"{key} is empty" for key, status in zip(part.keys, part.status) if status == "unreadable"}
        summary.add(part, start, measurements_of(part, start), reasons)
    return summary


def check_equal(found: ScoreSummary, expected: ScoreSummary) -> None:
    assert found.counts == expected.counts
    assert list(found.unreadable.items()) == list(expected.unreadable.items())
    assert np.array_equal(found.p_value_counts, expected.p_value_counts)
    assert np.array_equal(found.histogram.counts, expected.histogram.counts)
    assert (found.histogram.minimum, found.histogram.maximum) == (
        expected.histogram.minimum,
        expected.histogram.maximum,
    )
    first, second = found.top(1000), expected.top(1000)
    assert first.indices == second.indices
    assert first.scores.keys == second.scores.keys
    for name in ("score", "p_value", "is_ood"):
        assert np.array_equal(getattr(first.scores, name), getattr(second.scores, name))
    if len(first):
        assert all(
            np.array_equal(first.scores.indicators[name], second.scores.indicators[name]) for name in ("max", "mean")
        )
        if first.scores.measurements is None or second.scores.measurements is None:
            assert first.scores.measurements is second.scores.measurements
            return
        assert first.scores.measurements.keys == second.scores.measurements.keys == first.scores.keys
        assert first.scores.measurements.vectors["features"][:, 0].tolist() == list(first.indices)


scores_with_ties = st.lists(st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 3.0, np.nan]), st.floats(-4, 4)), max_size=40)


@given(scores_with_ties, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 12), st.randoms())
def test_the_division_into_parts_changes_nothing(
    values: list[float], cuts: list[int], keep: int, order: random.Random
) -> None:
    scores = table(np.array(values, dtype=np.float64))
    whole = add_parts(ScoreSummary(CALIBRATION, 0.05, keep), scores, [0, len(values)])
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    check_equal(add_parts(ScoreSummary(CALIBRATION, 0.05, keep), scores, edges), whole)
    parts = [add_parts(ScoreSummary(CALIBRATION, 0.05, keep), scores, list(pair)) for pair in pairwise(edges)]
    order.shuffle(parts)
    merged = ScoreSummary(CALIBRATION, 0.05, keep)
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))  # noqa: S301
    check_equal(merged, whole)
    ranked = sorted((-score, key) for score, key in zip(scores.score, scores.keys) if np.isfinite(score))
    assert list(whole.top(keep).scores.keys) == [key for _, key in ranked[:keep]]
    assert whole.flagged == scores.is_ood.sum()
    assert whole.scored == len(ranked)
    assert sum(whole.counts.values()) == len(values)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), min_size=1, max_size=30),
    st.lists(st.sampled_from([-1.0, 0.5, 1.0, 3.0, 4.5, 5.0, 5.5, 6.0, np.nan]), max_size=60),
    st.floats(0.001, 0.999),
)
def test_the_selection_is_that_of_the_whole_table(calibration: list[float], values: list[float], q: float) -> None:
    scores = table(np.array(values, dtype=np.float64), np.array(calibration), q)
    summary = ScoreSummary(calibration, q)
    summary.add(scores, 0)
    selected = benjamini_hochberg(scores.p_value, q)
    largest = summary.benjamini_hochberg(q)
    assert np.array_equal(scores.p_value <= largest, selected)
    assert largest == (scores.p_value[selected].max() if selected.any() else 0.0)
    assert summary.flagged == scores.is_ood.sum()
    assert set(scores.p_value[np.isfinite(scores.p_value)]) <= set(summary.p_values)


@pytest.mark.parametrize("policy", ["nan", "skip"])
def test_the_summary_of_the_table_is_that_of_the_parts(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the table is cut, also where a chunk has no scores, and where skipped images have no rows."""
    scores = table(np.array([*[np.nan] * 7, 0.5, 0.1 + 0.2, np.nan, -1.0, 1e-300, np.nan, np.nan, 3.0, 3.0]))
    rows = [row for row, status in enumerate(scores.status) if policy == "nan" or status != "unreadable"]
    reasons = {key: "empty" for key, status in zip(scores.keys, scores.status) if status == "unreadable"}
    expected = ScoreSummary(CALIBRATION, 0.05)
    expected.add(scores.select(rows), 0, reasons=reasons, indices=rows)
    write_csv(scores.select(rows).to_frame(), tmp_path / "scores.csv")
    for size in (1, 3, 100):
        monkeypatch.setattr(summary_module, "_ROWS", size)
        found = ScoreSummary(CALIBRATION, 0.05)
        add_table(found, tmp_path / "scores.csv", scores.keys, reasons)
        check_equal(found, expected)
    assert len(expected.top(100)) == 6
    with pytest.raises(StoreError, match="has a row 0000000 that is not in the source"):
        add_table(ScoreSummary(CALIBRATION, 0.05), tmp_path / "scores.csv", scores.keys[1:], reasons)


@pytest.mark.parametrize("form", ["vectors", "values"])
def test_measurements_of_some_images_are_read(form: str, tmp_path: Path) -> None:
    """Of a file with a row group per part, of which only those that are needed are read."""
    values = torch.arange(24.0).reshape(6, 2, 1, 2)
    keys = tuple("abcdef")
    whole = Measurements(keys, values, (1.0, 2.0), ("mse", "distance"))
    if form == "vectors":
        whole = Measurements(keys, vectors={"features": values.flatten(1), "logits": values[:, 0, 0]})
    path = tmp_path / "m.parquet"
    with pq.ParquetWriter(path, whole.to_table().schema) as writer:
        for rows in ([0, 1], [2, 3], [4, 5]):
            writer.write_table(whole.select(rows).to_table())
    for sets in ([[0, 1], [2, 3], [4, 5]], [[0], [], [1, 2, 3, 4], [5]], [range(6), []], [[], range(6)]):
        parts = Measurements.read_consecutive(path, [[keys[row] for row in rows] for rows in sets])
        for rows, part in zip(sets, parts, strict=True):
            assert (part is None) == (not rows)
            assert part is None or part.to_table() == whole.select(rows).to_table()
    for chosen in ([1], [0, 3, 2], [5, 0]):
        found = Measurements.read_parquet(path, [keys[row] for row in chosen])
        assert found.to_table() == whole.select(sorted(chosen)).to_table()


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    generator = np.random.default_rng(0)
    parts = [table(generator.normal(size=2_000)) for _ in range(2)]
    summary = ScoreSummary(CALIBRATION, 0.05)
    sizes = []
    tracemalloc.start()
    try:
        for number in range(10):
            part = parts[number % 2]
            summary.add(part, number * len(part), measurements_of(part))
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert summary.scored == 20_000
    assert sizes[-1] < sizes[1] + 100_000, "rows that are not among the highest are not kept"
    assert len(pickle.dumps(summary)) < 2_000_000


def test_rows_of_skipped_images_keep_their_index() -> None:
    summary = ScoreSummary(CALIBRATION, 0.05)
    summary.add(table(np.array([1.0, 3.0, 2.0])), 10, indices=[10, 12, 15])
    assert summary.top(2).indices == (12, 15)
    assert summary.top(2).scores.measurements is None


def test_other_calibrations_are_not_merged() -> None:
    with pytest.raises(FaroutError, match="calibration, alpha and keep"):
        ScoreSummary(CALIBRATION, 0.05).merge(ScoreSummary(CALIBRATION[1:], 0.05))
    with pytest.raises(FaroutError, match="requires scores that are numbers"):
        ScoreSummary([], 0.05)


def test_warnings_are_those_of_the_whole_table() -> None:
    summary = ScoreSummary(CALIBRATION, 0.05)
    summary.add(table(np.array([1.0, np.nan, np.nan, 1.0])), 0)
    with (
        pytest.warns(NaNScoresWarning, match=r"^new: 1 of 3 scores are not numbers"),
        pytest.warns(ConstantScoresWarning, match=r"^new: all 2 scores are 1; they"),
    ):
        summary.warn("new")
    summary.add(table(np.array([2.0])), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConstantScoresWarning)
        warnings.simplefilter("ignore", NaNScoresWarning)
        summary.warn("new")
        ScoreSummary(CALIBRATION, 0.05).warn("nothing")


@pytest.mark.parametrize(
    "calibration", [[0.0], [2.5] * 9, [1e300, -1e300], [1e8, 1e8 + 1e-7], [0.0] * 999 + [1e6], np.arange(1000.0)]
)
def test_histograms_contain_every_score(calibration: list[float]) -> None:
    """Also of scores far outside of a calibration without extent."""
    scores = np.concatenate([calibration, [-1e305, -7.0, 0.0, 1e-12, 3.0, 4e7, 1e305, np.nan, np.inf]])
    histogram = ScoreHistogram(calibration)
    histogram.add(scores)
    values, counts = histogram.values()
    assert counts.sum() == len(histogram) == len(calibration) + 7
    assert (values[0], values[-1]) == (-1e305, 1e305)
    assert (np.diff(values) > 0).all()
