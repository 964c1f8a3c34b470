"""Fitted statistics: what they mean, that they come back from arrays, and what they refuse."""

import numpy as np
import pytest
from scipy import stats
from sklearn.mixture import GaussianMixture as Reference
from sklearn.neighbors import NearestNeighbors

from farout.core.errors import FaroutError, StoreError
from farout.features.densities import (
    ClassMahalanobis,
    GaussianMixture,
    KernelDensity,
    Mahalanobis,
    NearestNeighbor,
    PrincipalComponents,
    ZScore,
    pack_arrays,
    unpack_arrays,
)

pytestmark = pytest.mark.numerics

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 4)) + 3
KINDS = [ZScore, Mahalanobis, GaussianMixture, KernelDensity, NearestNeighbor]


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
    assert np.allclose(z.transform(TABLE).mean(0), 0)
    assert np.allclose(z.transform(TABLE).std(0, ddof=1), 1)
    far = TABLE.mean(0, keepdims=True) - 5 * TABLE.std(0, ddof=1)
    assert z.score(far)[0] == pytest.approx(-5)
    assert z.score_two_sided(far)[0] == pytest.approx(5)


def test_a_column_that_never_varies() -> None:
    table = np.c_[RNG.normal(size=50), np.full(50, 2.0)]
    z = ZScore.fit(table)
    assert z.transform(np.array([[0.0, 2.0]]))[0, 1] == 0
    assert z.transform(np.array([[0.0, 2.1]]))[0, 1] > 1e5
    assert z.transform(np.array([[0.0, np.nextafter(np.float32(2), np.float32(3))]]))[0, 1] <= 1, (
        "float32 rounding is not far"
    )
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
    assert len(fitted.weights) > 1, "two clusters require more than one component"
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
    with pytest.raises(StoreError, match="requires the arrays"):
        kind.from_arrays({"mean": np.zeros(4)})


def test_a_shared_covariance_is_scikit_learns() -> None:
    """With as few rows as full covariances would not allow, clumps are still found."""
    table = np.concatenate([TABLE[:60], TABLE[60:120] + 40])
    fitted = GaussianMixture.fit(table, seed=1, max_components=4, shared=True)
    assert len(fitted.weights) == 2
    assert np.array_equal(fitted.roots[0], fitted.roots[1])
    theirs = Reference(2, covariance_type="tied")
    theirs.weights_, theirs.means_, theirs.precisions_cholesky_ = fitted.weights, fitted.means, fitted.roots[0]
    z = (table - fitted.mean) / fitted.std
    assert np.allclose(fitted.score(table), -theirs.score_samples(z), atol=1e-9)


def test_one_class_is_the_plain_distance() -> None:
    one = ClassMahalanobis.fit(TABLE, np.zeros(len(TABLE)))
    assert np.allclose(one.score(TABLE), Mahalanobis.fit(TABLE).score(TABLE))
    for labels in (np.arange(len(TABLE)), np.zeros(3)):
        with pytest.raises(FaroutError, match="one label per row"):
            ClassMahalanobis.fit(TABLE, labels)


def test_nothing_varies_and_still_far_is_far() -> None:
    """A covariance of zero has no inverse; its pseudo-inverse would call every image normal."""
    fitted = Mahalanobis.fit(np.full((10, 3), 2.0))
    assert fitted.score(np.full((1, 3), 2.0))[0] == 0
    assert fitted.score(np.full((1, 3), 2.5))[0] > 1e6


def test_kernels_are_scipys_with_the_same_width_in_every_direction() -> None:
    one = KernelDensity.fit(TABLE[:, :1])
    theirs = stats.gaussian_kde((TABLE[:, 0] - one.mean[0]) / one.std[0])
    points = np.array([[0.0], [3.0], [6.0]])
    assert np.allclose(one.score(points), -theirs.logpdf((points[:, 0] - one.mean[0]) / one.std[0]))
    far = KernelDensity.fit(TABLE).score(TABLE.mean(0) + np.array([[1e3], [-1e3], [1e4]]) * TABLE.std(0))
    assert np.isfinite(far).all()
    assert far[2] > far[:2].max() > KernelDensity.fit(TABLE).score(TABLE).max(), "both sides are far"


def test_the_nearest_are_scikit_learns() -> None:
    fitted = NearestNeighbor.fit(TABLE[:50], k=5)
    z = (TABLE - fitted.mean) / fitted.std
    distances, _ = NearestNeighbors(n_neighbors=5).fit(z[:50]).kneighbors(z)
    assert np.allclose(fitted.score(TABLE), distances[:, 4])
    assert int(NearestNeighbor.fit(TABLE[:3], k=5).k) == 3, "there are no more than there are"


def test_principal_components_part_a_table() -> None:
    """The fewest components that explain the share; what they keep and what they leave make up the whole."""
    plane = np.random.default_rng(1).normal(size=(200, 2)) @ np.random.default_rng(2).normal(size=(2, 5))
    fitted = PrincipalComponents.fit(plane, explained=0.999)
    assert fitted.axes.shape == (5, 2)
    inside, outside = fitted.project(plane)
    assert np.allclose(outside, 0, atol=1e-9)
    assert PrincipalComponents.fit(TABLE).axes.shape == (4, 4)
    few = PrincipalComponents.fit(TABLE, max_components=1)
    inside, outside = few.project(TABLE)
    z = (TABLE - few.mean) / few.std
    assert np.allclose(inside @ few.axes.T + outside, z)
    assert inside.shape == (400, 1)
    assert np.var(inside) >= np.var(z, axis=0).max(), "the first component varies most"


def test_parts_are_kept_apart() -> None:
    parts = {"one": ZScore.fit(TABLE), "two": ZScore.fit(TABLE[:, :2])}
    packed = pack_arrays(parts)
    assert sorted(packed) == ["one.mean", "one.std", "two.mean", "two.std"]
    assert np.array_equal(ZScore.from_arrays(unpack_arrays(packed, "two")).mean, parts["two"].mean)
    assert unpack_arrays(packed, "three") == {}
