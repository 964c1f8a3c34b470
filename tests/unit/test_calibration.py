"""p-values, thresholds, false discovery rate: the rates that they promise are the rates that come."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from farout.core.errors import ConstantScoresWarning, FaroutError, NaNScoresWarning
from farout.data.sources import open_source
from farout.data.splits import split_source
from farout.detectors.calibration import (
    benjamini_hochberg,
    compute_p_values,
    flag_outliers,
    score_threshold,
    warn_about_scores,
)

RNG = np.random.default_rng(0)


def test_p_values_by_the_formula() -> None:
    calibration, scores = RNG.normal(size=50).round(1), RNG.normal(size=200).round(1)
    by_hand = [(1 + sum(c >= s for c in calibration)) / 51 for s in scores]
    assert compute_p_values(scores, calibration).tolist() == pytest.approx(by_hand)
    assert compute_p_values(torch.tensor(scores), torch.tensor(calibration)).tolist() == pytest.approx(by_hand)


def test_no_score_no_p_value() -> None:
    p = compute_p_values([np.nan, 100.0], [1.0, 2.0, 3.0])
    assert np.isnan(p[0])
    assert p[1] == 0.25
    assert flag_outliers(p, 0.5).tolist() == [False, True]
    for bad in ([], [1.0, np.nan]):
        with pytest.raises(FaroutError, match="calibration"):
            compute_p_values([1.0], bad)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("count", [5, 19, 20, 99, 250])
def test_threshold_and_flag_agree(alpha: float, count: int) -> None:
    calibration = RNG.normal(size=count).round(1)
    scores = np.concatenate([calibration, RNG.normal(size=300).round(1), [1e9]])
    flagged = flag_outliers(compute_p_values(scores, calibration), alpha)
    assert np.array_equal(flagged, scores > score_threshold(calibration, alpha))
    assert flagged.any() == (1 / (count + 1) <= alpha)


def test_false_alarms_over_200_resplits() -> None:
    """The mean false-alarm rate at 5 % is within its Monte Carlo interval, with the splits of the detectors."""
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(400, 1, 4, 4, generator=generator) * 255).byte()
    source = open_source(pixels)
    scores = pixels.double().flatten(1).std(1).numpy()
    rates = []
    for seed in range(200):
        parts = split_source(source, alpha=0.05, statistics=150, train=True, seed=seed, groups="none")
        fresh = list(parts.training)
        p = compute_p_values(scores[fresh], scores[list(parts.calibration)])
        rates.append(flag_outliers(p, 0.05).mean())
    n, m = len(parts.calibration), len(fresh)
    flags = np.floor(0.05 * (n + 1))
    expected = flags / (n + 1)
    single = expected * (1 - expected) * (1 / (n + 2) + 1 / m)
    half = 1.96 * np.sqrt(single / 200) + 0.002  # re-splits of one finite set are not independent
    assert abs(np.mean(rates) - expected) < half


def test_benjamini_hochberg_is_scipys_and_leaves_out_the_unknown() -> None:
    p = np.concatenate([RNG.uniform(size=80), RNG.uniform(0, 0.01, size=20), [np.nan] * 3])
    chosen = benjamini_hochberg(p, 0.1)
    assert np.array_equal(chosen[:-3], stats.false_discovery_control(p[:-3]) <= 0.1)
    assert not chosen[-3:].any()
    assert 15 <= chosen.sum() <= 30
    assert not benjamini_hochberg([np.nan], 0.5).any()


def test_false_discoveries_stay_below_q() -> None:
    """Conformal p-values that share one calibration set keep the rate (Bates et al. 2023)."""
    shares = []
    for _ in range(300):
        calibration, good, bad = RNG.normal(size=200), RNG.normal(size=80), RNG.normal(3.5, 1, size=20)
        chosen = benjamini_hochberg(compute_p_values(np.concatenate([good, bad]), calibration), 0.2)
        shares.append(chosen[:80].sum() / max(1, chosen.sum()))
    assert np.mean(shares) < 0.2


def test_useless_scores_warn() -> None:
    with pytest.warns(NaNScoresWarning, match="2 of 4"):
        warn_about_scores([1.0, np.nan, np.inf, 2.0], "set")
    with pytest.warns(ConstantScoresWarning):
        warn_about_scores([1.0, 1.0], "set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_scores([1.0, 2.0], "set")
