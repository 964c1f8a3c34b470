"""Fitted statistics: what they mean, that they come back from arrays, and what they refuse."""

import numpy as np
import pytest
from scipy import stats
from sklearn.mixture import GaussianMixture as Reference

from farout.densities import GaussianMixture, Mahalanobis, ZScore
from farout.errors import FaroutError, StoreError

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 4)) + 3
KINDS = [ZScore, Mahalanobis, GaussianMixture]


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_all_there_is(kind: type) -> None:
    fitted = kind.fit(TABLE)
    again = kind.from_arrays(fitted.to_arrays())
    assert np.array_equal(fitted.score(TABLE[:7]), again.score(TABLE[:7]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.full((5, 2), np.nan), np.full((5, 2), np.inf), np.ones((1, 2)), np.ones(5)])
def test_bad_tables_are_refused(kind: type, bad: np.ndarray) -> None:
    with pytest.raises(FaroutError):
        kind.fit(bad)


def test_z_scores_are_standard_and_signed() -> None:
    z = ZScore.fit(TABLE)
    assert np.allclose(z.z(TABLE).mean(0), 0)
    assert np.allclose(z.z(TABLE).std(0, ddof=1), 1)
    far = TABLE.mean(0, keepdims=True) - 5 * TABLE.std(0, ddof=1)
    assert z.score(far)[0] == pytest.approx(-5)
    assert z.two_sided(far)[0] == pytest.approx(5)


def test_a_column_that_never_varies() -> None:
    table = np.c_[RNG.normal(size=50), np.full(50, 2.0)]
    z = ZScore.fit(table)
    assert z.z(np.array([[0.0, 2.0]]))[0, 1] == 0
    assert z.z(np.array([[0.0, 2.1]]))[0, 1] > 1e5
    assert z.z(np.array([[0.0, np.nextafter(np.float32(2), np.float32(3))]]))[0, 1] <= 1, "float32 rounding is not far"
    for kind in KINDS:
        assert np.isfinite(kind.fit(table).score(table)).all()


def test_mahalanobis_of_its_own_is_chi_square() -> None:
    fitted = Mahalanobis.fit(TABLE)
    distances = 4 * fitted.score(TABLE)
    assert stats.kstest(distances, stats.chi2(4).cdf).pvalue > 0.01
    along, across = np.linalg.eigh(np.cov(TABLE.T))[1][:, [-1, 0]].T
    mean = TABLE.mean(0)
    assert fitted.score((mean + 2 * across)[None]) > fitted.score((mean + 2 * along)[None])


def test_mahalanobis_of_fewer_rows_than_columns() -> None:
    table = RNG.normal(size=(10, 30))
    fitted = Mahalanobis.fit(table)
    assert np.isfinite(fitted.score(table)).all()
    assert fitted.score(table + 10).min() > fitted.score(table).max()


def test_the_mixture_is_scikit_learns() -> None:
    table = np.concatenate([TABLE, TABLE[:200] + 12])
    fitted = GaussianMixture.fit(table, seed=1)
    assert len(fitted.weights) > 1, "two clumps want more than one component"
    z = (table - fitted.mean) / fitted.std
    theirs = Reference(len(fitted.weights))
    theirs.weights_, theirs.means_, theirs.precisions_cholesky_ = fitted.weights, fitted.means, fitted.roots
    assert np.allclose(fitted.score(table), -theirs.score_samples(z), atol=1e-9)
    between = table.mean(0, keepdims=True)
    assert fitted.score(between)[0] > np.median(fitted.score(table)), "between two clumps is far from both"


@pytest.mark.parametrize("kind", KINDS)
def test_other_columns_are_refused_and_nan_stays_nan(kind: type) -> None:
    fitted = kind.fit(TABLE)
    for shape in ((3, 1), (3, 5), (4,)):
        with pytest.raises(FaroutError, match="columns fitted on"):
            fitted.score(np.zeros(shape))
    assert np.isnan(fitted.score(np.r_[TABLE[:1], np.full((1, 4), np.nan)])).tolist() == [False, True]
    with pytest.raises(StoreError, match="wants the arrays"):
        kind.from_arrays({"mean": np.zeros(4)})
