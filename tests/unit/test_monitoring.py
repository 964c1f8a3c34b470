"""Monitoring: alarms without a change are as rare as promised, changes are found, and the state survives a restart."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.detectors.base import Scores
from farout.detectors.calibration import compute_p_values
from farout.evaluation.monitoring import Monitor, expected_flag_range, rate_interval


def p_values(
    n: int, normal: int, changed: int = 0, *, shift: float = 0.0, seed: int = 0, digits: int = 9
) -> np.ndarray:
    """p-values of a stream against n calibration images; after `normal` images the scores are higher by `shift`."""
    generator = np.random.default_rng(seed)
    calibration = generator.normal(size=n).round(digits)
    scores = generator.normal(size=normal + changed).round(digits)
    scores[normal:] += shift
    return compute_p_values(scores, calibration)


def first_alarm(p: np.ndarray, n: int, seed: int = 0, **settings: Any) -> float:
    """Number of the image at the first alarm, infinite if there is none."""
    monitor = Monitor(n, seed=seed, **settings)
    monitor.update(p)
    return monitor.alarms[0].image if monitor.alarms else math.inf


# -- no change ------------------------------------------------------------------------------------------------------


def test_sequential_p_values_are_uniform_and_independent_with_few_calibration_images() -> None:
    streams = [Monitor(20, seed=seed).update(p_values(20, 250, seed=seed)) for seed in range(60)]
    ranks = np.stack([stream["sequential_p_value"] for stream in streams])
    assert stats.kstest(ranks.ravel(), "uniform").pvalue > 0.001
    assert stats.kstest(ranks[:, 200:].ravel(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(ranks[:, 1:].ravel(), ranks[:, :-1].ravel())[0, 1]) < 4 / math.sqrt(ranks.size)
    # the images of one stream share its calibration set; its ranks must not show that
    assert stats.kstest(stats.norm.isf(ranks).mean(1) * math.sqrt(250), "norm").pvalue > 0.001


def test_a_martingale_on_the_p_values_themselves_would_be_wrong() -> None:
    """The reason for sequential ranks: with one calibration set, the same bets on stationary streams raise alarms."""
    p = np.stack([p_values(50, 3000, seed=seed) for seed in range(60)])
    exponents = np.linspace(0.1, 0.9, 9)
    log_capital = np.cumsum(np.log(exponents) + (exponents - 1) * np.log(p)[:, :, None], axis=1)
    martingales = np.exp(log_capital).mean(2)
    assert (martingales.max(1) >= 100).sum() > stats.binom.ppf(0.999, 60, 0.01)
    worst = np.argsort(martingales.max(1))[-9:]
    assert max(Monitor(50, seed=seed).update(p[seed])["log10_martingale"].max() for seed in worst.tolist()) < 2


@pytest.mark.slow
@pytest.mark.parametrize(("n", "digits"), [(20, 9), (50, 9), (50, 0), (1000, 9)])
def test_false_alarms_of_400_stationary_streams_are_within_the_bound(n: int, digits: int) -> None:
    """At a threshold of 10, at most 10 % of all streams. With `digits` 0 the scores are integers, most of them tied."""
    streams = [Monitor(n, seed=seed).update(p_values(n, 300, seed=seed, digits=digits)) for seed in range(400)]
    bound = stats.binom.ppf(0.999, 400, 0.1)
    assert sum(stream["log10_martingale"].max() >= 1 for stream in streams) <= bound
    # an alarm within t images has a probability of at most t / threshold
    assert sum(stream["log10_shiryaev_roberts"].max() >= math.log10(3000) for stream in streams) <= bound


def test_repeated_alarms_are_at_least_the_threshold_apart_on_average() -> None:
    monitor = Monitor(50, statistic="shiryaev-roberts", threshold=100)
    monitor.update(p_values(50, 10_000))
    assert 10 <= len(monitor.alarms) <= 100


def test_ties_only_make_the_martingale_smaller() -> None:
    """Equal scores of calibration images count as higher: a stream of equal images is no evidence of anomalies."""
    monitor = Monitor(50)
    monitor.update(np.ones(2000))
    assert not monitor.alarms
    assert monitor.log10_martingale < 0.5


# -- changes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "normal", "shift", "latest"),
    [(50, 0, 3.0, 25), (50, 500, 3.0, 40), (200, 500, 1.0, 150), (1000, 500, 3.0, 25)],
)
def test_changes_are_found_soon(n: int, normal: int, shift: float, latest: int) -> None:
    """Delay in images of the median of 9 streams; no alarm comes before the change."""
    streams = [p_values(n, normal, 400, shift=shift, seed=seed) for seed in range(9)]
    for statistic in ("martingale", "shiryaev-roberts"):
        delays = [first_alarm(p, n, seed, statistic=statistic) - normal for seed, p in enumerate(streams)]
        assert min(delays) > 0
        assert np.median(delays) <= latest
        assert max(delays) < math.inf


def test_a_few_images_suffice_where_the_calibration_is_large_and_not_where_it_is_tiny() -> None:
    """Five images above all others have the probability 1 / C(n + 5, 5)."""
    assert first_alarm(np.full(5, 1 / 1000), 999) <= 4
    assert first_alarm(np.full(5, 1 / 5), 4) == math.inf


def test_images_that_become_more_normal_raise_no_alarm() -> None:
    assert first_alarm(p_values(200, 100, 800, shift=-2.0), 200) == math.inf


# -- formulas -------------------------------------------------------------------------------------------------------


def test_statistics_by_their_recursions() -> None:
    monitor = Monitor(30, statistic="shiryaev-roberts", threshold=20)
    found = monitor.update(p_values(30, 700, 200, shift=1.0))
    exponents = np.linspace(0.1, 0.9, 9)
    active, repeated = np.zeros(9), np.zeros(9)
    assert found["alarm"].any()
    for t, row in enumerate(found.itertuples(), 1):
        bets = exponents * row.sequential_p_value ** (exponents - 1)
        active = bets * (active + 1 / (t * (t + 1)))
        repeated = bets * (repeated + 1)
        assert row.log10_martingale == pytest.approx(math.log10(active.mean() + 1 / (t + 1)), abs=1e-9)
        assert row.log10_shiryaev_roberts == pytest.approx(math.log10(repeated.mean()), abs=1e-9)
        assert row.alarm == (repeated.mean() >= 20)
        repeated = np.zeros(9) if row.alarm else repeated


def test_statistics_are_those_of_nonconform() -> None:
    martingales = pytest.importorskip("nonconform.martingales", reason="nonconform requires Python 3.12")
    found = Monitor(30).update(p_values(30, 300, 100, shift=1.0))
    mixture = martingales.MixtureMartingale([martingales.PowerMartingale(e) for e in np.linspace(0.1, 0.9, 9)])
    states = mixture.update_many(found["sequential_p_value"].to_numpy())
    for name, column in (("restarted_martingale", "martingale"), ("shiryaev_roberts", "shiryaev_roberts")):
        expected = [getattr(state, f"log_{name}") / math.log(10) for state in states]
        assert found[f"log10_{column}"].to_numpy() == pytest.approx(expected, abs=1e-9)


def test_windows_have_clopper_pearson_intervals() -> None:
    found = Monitor(99, alpha=0.1, window=40).update(p_values(99, 200))
    flags = found["p_value"] <= 0.1
    assert (found["flagged"] == flags).all()
    for row in (0, 17, 39, 40, 150):
        last = flags[max(0, row - 39) : row + 1]
        interval = stats.binomtest(int(last.sum()), len(last)).proportion_ci(0.95, "exact")
        now = found.iloc[row]
        assert now["window_images"] == len(last)
        assert now["window_rate"] == pytest.approx(last.mean())
        assert [now["window_low"], now["window_high"]] == pytest.approx([interval.low, interval.high])
    low, high = rate_interval(np.array([0, 5]), np.array([5, 5]))
    assert low.tolist() == pytest.approx([0, 0.025**0.2])
    assert high.tolist() == pytest.approx([1 - 0.025**0.2, 1])


@pytest.mark.parametrize(("n", "alpha"), [(20, 0.05), (50, 0.1), (1000, 0.05)])
def test_the_expected_range_contains_the_rate_of_normal_images(n: int, alpha: float) -> None:
    rates = [(p_values(n, 100, seed=seed) <= alpha).mean() for seed in range(1000)]
    low, high = expected_flag_range(100, n, alpha)
    inside = np.mean([low <= rate <= high for rate in rates])
    assert inside > 0.93
    assert high < 1
    binomial = stats.binom.ppf(0.975, 100, alpha) / 100
    assert high > binomial or n == 1000, "images of one calibration set vary together"


def test_rounded_p_values_are_flagged_and_selected_as_exact_ones() -> None:
    exact = np.array([2 / 3, 1 / 3, 1])
    settings: dict[str, Any] = {"alpha": 2 / 3, "fdr": 0.5}
    found = Monitor(2, **settings).update(exact.round(6))
    assert found["flagged"].tolist() == [True, True, False]
    pd.testing.assert_frame_equal(
        found.drop(columns="p_value"), Monitor(2, **settings).update(exact).drop(columns="p_value")
    )


def test_the_expected_range_of_many_images_is_that_of_the_whole_distribution() -> None:
    for n, alpha in ((20, 0.05), (1000, 0.001), (1000, 0.5), (19, 0.95)):
        cumulative = stats.betabinom(
            5000, math.floor(alpha * (n + 1) + 1e-9), n + 1 - math.floor(alpha * (n + 1) + 1e-9)
        )
        low, high = (round(5000 * end) for end in expected_flag_range(5000, n, alpha))
        for end, quantile in ((low, 0.025), (high, 0.975)):
            assert cumulative.cdf(end) >= quantile
            assert end == 0 or cumulative.cdf(end - 1) < quantile


def test_too_few_calibration_images_flag_nothing() -> None:
    assert expected_flag_range(100, 10, 0.05) == (0, 0)


# -- use ------------------------------------------------------------------------------------------------------------


def test_parts_give_the_same_as_all_at_once_and_the_state_can_be_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"statistic": "shiryaev-roberts", "threshold": 30, "window": 50, "fdr": 0.2, "seed": 5}
    p = p_values(300, 1300, 50, shift=4.0)
    once = Monitor(300, **settings)
    expected = once.update(p)
    monitor, parts = Monitor(300, **settings), []
    for part in np.split(p, [0, 1, 2, 40, 700, 701, 1320]):
        parts.append(monitor.update(part))
        monitor.save(tmp_path / "monitor.json")
        monitor = Monitor.load(tmp_path / "monitor.json")
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), expected, check_dtype=False)
    assert [alarm.image for alarm in monitor.alarms] == [alarm.image for alarm in once.alarms] != []
    assert monitor.settings == once.settings
    assert (monitor.images, monitor.flagged, monitor.selected) == (1350, once.flagged, once.selected)
    assert monitor.log10_martingale == pytest.approx(once.log10_martingale)


def test_saved_states_that_were_changed_are_refused(tmp_path: Path) -> None:
    monitor = Monitor(50)
    monitor.update(p_values(50, 30))
    path = tmp_path / "monitor.json"
    monitor.save(path)
    path.write_text(path.read_text().replace('"rows": 30', '"rows": 31'))
    with pytest.raises(StoreError, match="was changed"):
        Monitor.load(path)
    content = json.loads(json.dumps(monitor.to_dict()))
    for change in ({"counts": [1, 2]}, {"rows": 29}, {"rows": "x"}, {"settings": {}}, {"more": 1}):
        with pytest.raises(StoreError):
            Monitor.from_dict(content | change)


def test_rows_without_p_value_are_counted_and_change_nothing() -> None:
    p = p_values(50, 60)
    plain, monitor = Monitor(50), Monitor(50)
    expected = plain.update(p)
    table = pd.DataFrame({"key": [f"{i}.png" for i in range(60)], "p_value": p, "status": "ok"})
    broken = pd.DataFrame({"key": ["x", "y"], "p_value": [np.nan, 0.02], "status": ["unreadable", "not a number"]})
    found = monitor.update(pd.concat([table[:20], broken, table[20:]]))
    assert monitor.status == {"not a number": 1, "ok": 60, "unreadable": 1}
    assert (monitor.rows, monitor.images) == (62, 60)
    assert monitor.log10_martingale == plain.log10_martingale
    assert found["status"].tolist()[19:23] == ["ok", "unreadable", "not a number", "ok"]
    assert found.loc[20:21, ["p_value", "sequential_p_value", "flagged", "window_rate"]].isna().all(axis=None)
    assert not found["alarm"][20:22].any()
    kept = found["status"] == "ok"
    assert found.loc[kept, "log10_martingale"].tolist() == expected["log10_martingale"].tolist()
    monitor.update([np.nan])
    assert monitor.status["not a number"] == 2
    monitor.update({"p_value": [p[0], np.nan], "status": [None, None]})
    assert (monitor.status["ok"], monitor.status["not a number"]) == (61, 3)


def test_every_form_of_scores_gives_the_same() -> None:
    p = p_values(50, 10)
    keys = [f"{i}.png" for i in range(10)]
    none = np.zeros(10)
    forms = [
        Scores(tuple(keys), none, p, none.astype(bool), ("ok",) * 10, {}),
        pd.DataFrame({"key": keys, "p_value": p}),
        {"key": keys, "p_value": p.tolist(), "status": ["ok"] * 10},
        pa.table({"key": keys, "p_value": p, "score": none}),
    ]
    expected = Monitor(50).update(p)
    for form in forms:
        found = Monitor(50).update(form)
        assert found["key"].tolist() == keys
        pd.testing.assert_frame_equal(found.drop(columns="key"), expected.drop(columns="key"))
    assert len(Monitor(50).update([])) == 0


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.5, 0.123], "3 has the p-value 0.123, which is no multiple of 1 / 50"),
        ([0.0], "which is no multiple"),
        ([1.02], "which is no multiple"),
        ([[0.1, 0.2]], "one-dimensional"),
        (["high"], "p-values are numbers"),
        ("high", "one-dimensional"),
        ({"key": ["a"], "score": [1.0]}, "requires a column p_value, this table has key, score"),
        ({"key": ["a", "b"], "p_value": [1.0]}, "1 p-values for 2 keys"),
    ],
)
def test_scores_that_do_not_fit_are_refused_and_leave_the_monitor_unchanged(scores: Any, words: str) -> None:
    monitor = Monitor(49)
    monitor.update([0.5])
    before = monitor.to_dict()
    with pytest.raises(FaroutError, match=words):
        monitor.update(scores)
    assert monitor.to_dict() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibration_images": 0}, "calibration_images is 0"),
        ({"window": 0}, "window is 0"),
        ({"threshold": 1.0}, "the threshold is 1.0"),
        ({"threshold": math.nan}, "the threshold is nan"),
        ({"alpha": 0.0}, "alpha is"),
        ({"fdr": 1.0}, "fdr is 1.0"),
        ({"fdr": 0.1, "fdr_method": "bh"}, "expected lond or lord"),
        ({"statistic": "cusum"}, "expected martingale or shiryaev-roberts"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FaroutError, match=words):
        Monitor(**{"calibration_images": 50, **settings})


# -- online selection -----------------------------------------------------------------------------------------------


def test_selection_is_that_of_online_fdr() -> None:
    from online_fdr.p_values import Lond, LordPlusPlus

    p = p_values(1000, 30, 100, shift=3.0)
    # LOND in the form that is proven for p-values of one calibration set
    for method, test in (("lond", Lond(0.2, original=False)), ("lord++", LordPlusPlus(0.2, wealth=0.1))):
        monitor = Monitor(1000, fdr=0.2, fdr_method=method)
        found = monitor.update(p)
        assert found["selected"].tolist() == [test.test_one(float(value)) for value in p]
        assert monitor.selected == found["selected"].sum()
    assert "selected" not in Monitor(1000).update(p)


@pytest.mark.parametrize("method", ["lond", "lord++"])
def test_false_discoveries_with_one_calibration_set_stay_below_the_rate(method: str) -> None:
    """Every other image is an outlier; all p-values share the calibration images."""
    proportions, found = [], 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        is_outlier = generator.random(200) < 0.5
        scores = generator.normal(size=200) + 4 * is_outlier
        p = compute_p_values(scores, generator.normal(size=1000))
        selected = Monitor(1000, fdr=0.2, fdr_method=method).update(p)["selected"].to_numpy(dtype=bool)
        proportions.append((selected & ~is_outlier).sum() / max(1, selected.sum()))
        found += (selected & is_outlier).sum()
    assert np.mean(proportions) < 0.2
    assert found > 500


def test_selection_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *others: Any) -> Any:
        if name.startswith("online_fdr"):
            raise ImportError(name)
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"farout\[monitor\]"):
        Monitor(50, fdr=0.1)
    Monitor(50)
