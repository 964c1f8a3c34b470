"""Metrics and intervals against well-kept libraries, ties included; nothing useless ever looks perfect."""

import warnings

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as torchmetrics
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from farout.core.errors import ConstantScoresWarning, FaroutError, MisleadingResultWarning, NaNScoresWarning
from farout.evaluation.intervals import auroc_interval, bootstrap_interval, delong, paired_difference
from farout.evaluation.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    detection_metrics,
    detection_rate,
    false_alarm_rate,
    fpr95,
)

RNG = np.random.default_rng(0)


def pair(shift: float = 1.0, n: int = 300, m: int = 200, decimals: int | None = 1) -> tuple[np.ndarray, np.ndarray]:
    inside, outside = RNG.normal(size=n), RNG.normal(shift, 1, size=m)
    return (inside, outside) if decimals is None else (inside.round(decimals), outside.round(decimals))


@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "ties", "many ties"])
def test_areas_are_the_libraries(decimals: int | None) -> None:
    inside, outside = pair(decimals=decimals)
    truth, scores = np.r_[np.zeros(len(inside)), np.ones(len(outside))], np.r_[inside, outside]
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, scores))
    as_probability = torch.sigmoid(torch.tensor(scores))  # torchmetrics takes probabilities; ranks stay
    theirs = torchmetrics.binary_auroc(as_probability, torch.tensor(truth, dtype=torch.long))
    assert auroc(inside, outside) == pytest.approx(float(theirs), abs=1e-6)
    assert aupr_out(inside, outside) == pytest.approx(average_precision_score(truth, scores))
    assert aupr_in(inside, outside) == pytest.approx(average_precision_score(1 - truth, -scores))
    theirs = torchmetrics.binary_average_precision(as_probability, torch.tensor(truth, dtype=torch.long))
    assert aupr_out(inside, outside) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "ties", "many ties"])
def test_fpr95_is_the_first_roc_point_at_95_percent_recall(decimals: int | None) -> None:
    """In-distribution images as positives: FPR at the first threshold with TPR >= .95; OpenOOD swaps the sides."""
    inside, outside = pair(decimals=decimals)
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    fpr, tpr, _ = roc_curve(truth, -np.r_[inside, outside], drop_intermediate=False)
    assert fpr95(inside, outside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    fpr, tpr, _ = roc_curve(1 - truth, np.r_[inside, outside], drop_intermediate=False)
    assert fpr95(-outside, -inside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_metrics_know_ranks_only() -> None:
    inside, outside = pair()
    one, other = (
        detection_metrics(inside, outside, draws=50),
        detection_metrics(np.exp(inside), np.exp(outside), draws=50),
    )
    assert one == other


def test_delong_is_its_definition() -> None:
    inside, outside = pair(n=23, m=17)
    kernel = (outside[:, None] > inside[None]) + 0.5 * (outside[:, None] == inside[None])
    area, of_id, of_ood = delong(inside, outside)
    assert area == pytest.approx(kernel.mean())
    assert np.allclose(of_ood, kernel.mean(1))
    assert np.allclose(of_id, kernel.mean(0))


def test_the_interval_covers() -> None:
    """95 % intervals hold the true area in about 95 % of experiments."""
    from scipy.stats import norm

    truth = norm.cdf(1.5 / np.sqrt(2))
    hits = 0
    for _ in range(400):
        _, low, high = auroc_interval(*pair(1.5, 60, 40, None))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.99


def test_a_perfect_area_still_has_an_interval() -> None:
    area, low, high = auroc_interval(np.arange(50.0), np.arange(100.0, 130.0))
    assert (area, high) == (1.0, 1.0)
    assert 0.85 < low < 0.95
    assert auroc_interval(np.arange(100.0, 130.0), np.arange(50.0))[:2] == (0.0, 0.0)


def test_intervals_by_bootstrap_agree_with_delong() -> None:
    inside, outside = pair(decimals=None)
    _, low, high = auroc_interval(inside, outside)
    assert bootstrap_interval(auroc, inside, outside, draws=600) == pytest.approx((low, high), abs=0.015)


def test_images_that_share_a_source_are_resampled_together() -> None:
    """The same images on both sides (variants): scores blind to the variant give one half, and no width."""
    scores = RNG.normal(size=80)
    ids = np.arange(80)
    with_groups = detection_metrics(scores, scores, image_ids=(ids, ids), draws=200)
    assert (with_groups.auroc, with_groups.auroc_low, with_groups.auroc_high) == (0.5, 0.5, 0.5)
    without = detection_metrics(scores, scores, draws=50)
    assert without.auroc_high - without.auroc_low > 0.1


def test_a_difference_is_decided_on_the_same_images_only() -> None:
    base = pair(1.0, 400, 400, None)
    noise = [RNG.normal(0, 1.0, size=len(side)) for side in base]
    worse = tuple(side + extra for side, extra in zip(base, noise, strict=True))
    found = paired_difference(base, worse)
    assert found.is_significant
    assert found.low > 0
    by_bootstrap = paired_difference(base, worse, metric=auroc, draws=500)
    assert (by_bootstrap.low, by_bootstrap.high) == pytest.approx((found.low, found.high), abs=0.015)
    same = paired_difference(base, base)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.is_significant
    with pytest.raises(FaroutError, match="same images"):
        paired_difference(base, (base[0][:-1], base[1]))
    with pytest.raises(FaroutError, match="numbers"):
        paired_difference(base, (np.full(400, np.nan), base[1]))


def test_nothing_useless_is_perfect() -> None:
    nans = np.full(20, np.nan)
    with pytest.warns(NaNScoresWarning):
        found = detection_metrics(nans, np.arange(5.0))
    assert np.isnan(found.auroc)
    assert np.isnan(found.fpr95)
    assert (found.n_id, found.n_ood) == (0, 5)
    with pytest.warns(ConstantScoresWarning):
        constant = detection_metrics(np.ones(20), np.ones(10))
    assert constant.auroc == 0.5
    assert constant.fpr95 == 1.0
    some = np.r_[np.arange(10.0), np.nan]
    with pytest.warns(NaNScoresWarning, match="1 of 11"):
        assert detection_metrics(some, np.arange(10.0) + 20, draws=50).n_id == 10
    assert np.isnan(detection_metrics([], [1.0]).auroc)


def test_an_area_below_one_half_warns() -> None:
    with pytest.warns(MisleadingResultWarning, match="below one half"):
        detection_metrics(*pair(-1.0), draws=50)


def test_rates_leave_out_images_without_a_p_value() -> None:
    assert false_alarm_rate([0.01, 0.05, 0.5, np.nan], 0.05) == pytest.approx(2 / 3)
    assert detection_rate([0.01, 0.9], 0.05) == 0.5
    assert np.isnan(detection_rate([], 0.05))


@pytest.mark.parametrize("metric", [auroc, aupr_in, aupr_out, fpr95])
def test_a_nan_given_to_a_metric_is_never_perfect(metric) -> None:
    nans, numbers = np.full(5, np.nan), np.arange(20.0)
    for one, other in ((nans, numbers), (numbers, nans), (numbers, np.r_[nans, numbers])):
        assert np.isnan(metric(one, other))


def test_infinite_scores_have_ranks() -> None:
    inside, outside = np.arange(20.0), np.arange(10.0, 30.0)
    last = np.r_[outside[:-1], np.inf]
    assert detection_metrics(inside, last, draws=50) == detection_metrics(inside, outside, draws=50)


def test_perfect_rates_keep_an_interval_with_and_without_groups() -> None:
    """Fifty images do not prove an FPR of exactly 0, nor an AUROC of exactly 1."""
    inside, outside, ids = np.arange(50.0), np.arange(100.0, 150.0), np.arange(50)
    for groups in (None, (ids, ids), (ids // 5, ids // 5)):
        found = detection_metrics(inside, outside, image_ids=groups, draws=50)
        assert (found.auroc, found.auroc_high, found.fpr95, found.fpr95_low) == (1, 1, 0, 0)
        units = 10 if groups is not None and len(np.unique(groups[0])) == 10 else 50
        assert found.auroc_low == pytest.approx(0.05 ** (1 / units))
        assert found.fpr95_high == pytest.approx(1 - 0.05 ** (1 / units))


def test_grouped_draws_are_whole_groups() -> None:
    """The interval of grouped scores is that of a plain loop over the same drawn groups, uneven groups included."""
    inside, outside = pair(n=40, m=30)
    groups = (RNG.integers(0, 12, size=40), RNG.integers(4, 16, size=30))
    names = np.unique(np.concatenate(groups))
    generator, areas = np.random.default_rng(3), []
    for _ in range(60):
        chosen = names[generator.integers(0, len(names), len(names))]
        drawn = [np.concatenate([side[ids == g] for g in chosen]) for side, ids in zip((inside, outside), groups)]
        areas.append(auroc(*drawn))
    found = detection_metrics(inside, outside, image_ids=groups, draws=60, seed=3)
    assert (found.auroc_low, found.auroc_high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))
    with pytest.raises(FaroutError, match="one id per score"):
        detection_metrics(inside, outside, image_ids=(groups[0][:-1], groups[1]))


def test_a_draw_without_one_side_is_left_out() -> None:
    """Three source images, one of which stands on one side only: some draws miss the other side."""
    ids = np.array([0, 1]), np.array([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference((np.r_[0.0, 1], np.r_[2.0, 3]), (np.r_[0.0, 3], np.r_[2.0, 1]), image_ids=ids)
    assert found.value == 0.5
    assert found.low <= found.value <= found.high


def test_three_images_do_not_decide() -> None:
    """A perfect detector against a constant one: DeLong's variance of the difference is 0."""
    perfect, constant = (np.arange(3.0), np.arange(3.0) + 9), (np.ones(3), np.ones(3))
    assert not paired_difference(perfect, constant).is_significant
    assert not paired_difference(constant, perfect).is_significant
    ids = np.arange(3)
    assert not paired_difference(perfect, constant, image_ids=(ids, ids)).is_significant, "every draw is the same"
    rates = paired_difference(perfect, constant, metric=fpr95)
    assert rates.low < rates.value == -1 < rates.high
    many = np.arange(200.0)
    assert paired_difference((many, many + 900), (np.ones(200), np.ones(200))).is_significant
