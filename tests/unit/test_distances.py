"""Detectors on pooled features without diffusion: their formulas, few images, nothing that varies, labels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.spatial.distance import cdist
from sklearn import decomposition
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from farout import load
from farout.core.errors import FaroutError
from farout.detectors import knn
from farout.detectors.autoencoder import AutoEncoder
from farout.detectors.base import Measurements
from farout.detectors.feature_detector import VectorDetector
from farout.detectors.gmm import GMM
from farout.detectors.knn import KNN
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.pca import PCA
from farout.features.densities import Mahalanobis as Gaussian
from small import pictures
from tolerances import SCORE_TOLERANCE

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")]

CHANNELS = (3, 5, 8)
WIDTH = sum(CHANNELS)
KINDS = [Mahalanobis, KNN, PCA, GMM, AutoEncoder]
RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(WIDTH, WIDTH)) * np.repeat([100.0, 1.0, 0.01], CHANNELS)
"""A covariance whose layers differ ten thousandfold in scale, as those of real backbones do."""


def gaussian(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)) @ ROOT + 5


def measured(table: np.ndarray, labels: np.ndarray | None = None) -> Measurements:
    vectors = {"features": torch.as_tensor(table, dtype=torch.float32)}
    if labels is not None:
        vectors["label"] = torch.as_tensor(labels, dtype=torch.float32)[:, None]
    return Measurements(tuple(map(str, range(len(table)))), vectors=vectors)


def bare(kind: type[VectorDetector], **settings: object) -> VectorDetector:
    """A detector with a backbone of which only the layers' widths are known."""
    small = {"hidden": 32, "bottleneck": 8, "updates": 400} if kind is AutoEncoder else {}
    detector = kind(**{"standardize": "none", **small, **settings})
    detector.features = SimpleNamespace(channels=CHANNELS, content_hash="")  # type: ignore[assignment]
    return detector


def learnt(
    kind: type[VectorDetector], table: np.ndarray, labels: np.ndarray | None = None, **settings: object
) -> VectorDetector:
    detector = bare(kind, **settings)
    detector.fit_statistics(measured(table, labels))
    return detector


def scored(detector: VectorDetector, table: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in detector.compute_scores(measured(table)).items()}


def test_the_distance_is_that_of_the_known_covariance() -> None:
    """Users rely on the distance being in units of the spread of normal images, whatever the channels' scales."""
    found = scored(learnt(Mahalanobis, gaussian(20000)), gaussian(50, seed=2))["distance"]
    offset = gaussian(50, seed=2) - 5
    exact = (offset @ linalg.inv(ROOT.T @ ROOT) * offset).sum(1)
    # shrinkage of nearly singular directions costs something
    assert np.corrcoef(found * WIDTH, exact)[0, 1] > 0.98
    independent = np.random.default_rng(3).normal(size=(20000, WIDTH)) * np.arange(1, WIDTH + 1)
    plain = scored(learnt(Mahalanobis, independent), independent[:500])["distance"] * WIDTH
    assert np.allclose(plain, np.square(independent[:500] / np.arange(1, WIDTH + 1)).sum(1), rtol=0.1)
    assert stats.kstest(plain, stats.chi2(WIDTH).cdf).pvalue > 0.01


def test_no_layer_drowns_another_in_the_sum_over_layers() -> None:
    """Off in the narrow first layer, or off in the wide last one, the same number of deviations: both are seen."""
    table = np.random.default_rng(4).normal(size=(2000, WIDTH))
    detector = learnt(Mahalanobis, table)
    usual = np.quantile(scored(detector, gaussian_like(400))["layers"], 0.95)
    for columns in (slice(0, 3), slice(3, 8), slice(8, 16)):
        odd = gaussian_like(40)
        odd[:, columns] *= 6
        assert np.median(scored(detector, odd)["layers"]) > usual
    parts = np.stack([d.score(p) for d, p in zip(detector.layers, detector.split_layers(table))], axis=1)
    logs = np.log(parts)
    expected = ((logs - logs.mean(0)) / logs.std(0, ddof=1)).mean(1)
    assert np.allclose(scored(detector, table)["layers"], expected, atol=1e-4), "features are kept in float32"


def gaussian_like(count: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, WIDTH))


def classes(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Four narrow classes far apart."""
    generator = np.random.default_rng(6)
    labels = np.arange(count) % 4
    return 8 * np.eye(4, WIDTH)[labels] + generator.normal(size=(count, WIDTH)), labels


def test_the_nearest_class_counts() -> None:
    """In the middle between classes one Gaussian sees nothing; with labels, users see it."""
    table, labels = classes()
    detector = learnt(Mahalanobis, table, labels, classes=True)
    between = table.mean(0) + np.random.default_rng(7).normal(size=(40, WIDTH))
    good, odd = scored(detector, table), scored(detector, between)
    assert detector.score_name == "conditional"
    for name, least, most in (("distance", 0, 0.6), ("conditional", 0.9, 1), ("relative", 0.95, 1)):
        assert least <= roc_auc_score(np.r_[np.zeros(300), np.ones(40)], np.r_[good[name], odd[name]]) <= most, name
    assert np.allclose(odd["relative"], odd["conditional"] - odd["distance"])
    scale = table.std(0, ddof=1)
    means = np.stack([table[labels == c].mean(0) for c in range(4)]) / scale
    within = Gaussian.fit(table / scale - means[labels])
    inverse = within.precision / within.std / within.std[:, None]
    brute = cdist(between / scale, means, "mahalanobis", VI=inverse).min(1) ** 2 / WIDTH
    assert np.allclose(odd["conditional"], brute, rtol=1e-4)


def test_a_class_may_have_one_image_but_not_every_class() -> None:
    table, labels = classes(40)
    labels[0] = 9
    detector = learnt(Mahalanobis, table, labels, classes=True)
    assert np.isfinite(scored(detector, table)["conditional"]).all()
    with pytest.raises(FaroutError, match="class with two rows"):
        learnt(Mahalanobis, table, np.arange(40), classes=True)


def test_what_labels_are_for_must_be_consistent() -> None:
    with pytest.raises(FaroutError, match="classes=True"):
        Mahalanobis(score="relative")
    with pytest.raises(FaroutError, match="folder per class"):
        learnt(Mahalanobis, gaussian(20), classes=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class."""
    root = tmp_path_factory.mktemp("tree")
    pictures(root / "bright", 20, low=150, spread=60)
    pictures(root / "dark", 20, low=20, spread=60, seed=1)
    return root


def test_labels_come_from_the_source_and_scoring_needs_none(tree: Path, tmp_path: Path) -> None:
    """The chain of a user with a class-per-folder tree: fit, save, load, score images without labels."""
    detector = Mahalanobis(size=32, classes=True).fit(tree, alpha=0.2, statistics=20)
    plain = pictures(tmp_path / "plain", 5)
    scores = detector.score(plain)
    assert set(scores.indicators) == {"distance", "layers", "conditional", "relative"}
    assert np.array_equal(scores.score, scores.indicators["conditional"])
    detector.save(tmp_path / "d")
    assert np.array_equal(load(tmp_path / "d").score(plain).score, scores.score)
    without = Mahalanobis(size=32).fit(tree, alpha=0.2, statistics=20)
    assert set(without.calibration_scores) == {"distance", "layers"}
    later = without.with_scoring(classes=True)
    assert np.array_equal(later.score(plain).score, scores.score), "classes can be learnt from what is stored"
    assert set(later.with_scoring(classes=False).calibration_scores) == {"distance", "layers"}


def test_missing_labels_are_reported_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = Mahalanobis.measure
    monkeypatch.setattr(Mahalanobis, "measure", lambda self, *a, **k: (calls.append(1), original(self, *a, **k))[1])
    plain = pictures(tmp_path / "plain", 200)
    with pytest.raises(FaroutError, match="folder per class"):
        Mahalanobis(size=32, classes=True).fit(plain, alpha=0.2)
    assert not calls, "before any image is measured"


@pytest.mark.parametrize("standardize", ["image", "none"])
def test_the_neighbor_is_scikit_learns(standardize: str) -> None:
    bank, probes = gaussian(700), gaussian(90, seed=2)
    detector = learnt(KNN, bank, k=5, standardize=standardize)
    units = [detector.vectors(measured(x)) for x in (bank, probes)]
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in units]
    theirs = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(units[0]).kneighbors(units[1])[0]
    found = scored(detector, probes)
    assert np.allclose(found["distance"], theirs[:, -1], atol=1e-5)
    assert np.allclose(found["mean"], theirs.mean(1), atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_neighbors_nearer_than_the_rounding_of_the_products_are_distinguished(k: int) -> None:
    bank = gaussian(400)
    bank[:20] = bank[0] * (1 + 1e-5 * gaussian(20, seed=3))  # squared distances of 1e-10
    detector, probes = learnt(KNN, bank, k=k, standardize="none"), bank[:20] + 1e-5
    z = detector.vectors(measured(probes))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    stored = detector.get_state()["bank"].astype(np.float64)
    nearest = np.sort(np.linalg.norm(z[:, None] - stored, axis=2), axis=1)
    np.testing.assert_allclose(scored(detector, probes)["distance"], nearest[:, k - 1], rtol=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_features_that_are_not_numbers_have_no_distance(k: int) -> None:
    detector, probes = learnt(KNN, gaussian(400), k=k), gaussian(5, seed=2)
    expected = scored(detector, probes)["distance"]
    probes[[1, 4]] = np.nan
    found = scored(detector, probes)["distance"]
    assert np.isnan(found[[1, 4]]).all()
    np.testing.assert_allclose(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("k", [1, 5])
def test_the_neighbor_does_not_depend_on_the_memory_of_a_block(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, probes = learnt(KNN, gaussian(700), k=k), gaussian(50, seed=2)
    at_once = scored(detector, probes)
    monkeypatch.setattr(knn, "_BLOCK_BYTES", 1)
    for name, distances in scored(detector, probes).items():
        np.testing.assert_allclose(distances, at_once[name], rtol=1e-12)


def test_few_images_lower_k_and_say_so() -> None:
    """With 60 images, the 50th neighbor would be nearly the farthest one, whose distance ranks images poorly."""
    small, large = learnt(KNN, gaussian(60), k=50), learnt(KNN, gaussian(1000), k=50)
    assert (small.k, large.k) == (1, 10)
    assert learnt(KNN, gaussian(6000), k=50).k == 50
    again = scored(small, gaussian(60))["distance"]
    assert np.allclose(again, 0, atol=1e-6), "an image of the bank is its own nearest"


def test_the_bank_is_a_seeded_sample() -> None:
    one, two, other = (bare(KNN, bank=100, k=1) for _ in range(3))
    other.seed = 1
    for detector in (one, two, other):
        detector.fit_statistics(measured(gaussian(400)))
    assert one.bank.shape == (100, WIDTH)
    assert np.array_equal(one.bank, two.bank)
    assert not np.array_equal(one.bank, other.bank)


@pytest.mark.parametrize("variance", [0.5, 0.95])
def test_the_residual_is_scikit_learns(variance: float) -> None:
    table, probes = gaussian(400), gaussian(30, seed=2)
    found = scored(learnt(PCA, table, variance=variance), probes)
    mean, std = table.mean(0), table.std(0, ddof=1)
    theirs = decomposition.PCA(variance, svd_solver="full").fit((table - mean) / std)
    z = (probes - mean) / std
    rest = np.square(z - theirs.inverse_transform(theirs.transform(z))).sum(1)
    assert np.allclose(found["residual"], rest / WIDTH, rtol=1e-3)
    assert np.allclose(found["fraction"], rest / np.square(z).sum(1), rtol=1e-3)


def test_the_fraction_does_not_grow_with_extremity() -> None:
    """Only `residual` grows for images that vary like normal ones, but more."""
    detector = learnt(PCA, gaussian(400), variance=0.8)
    centre = gaussian(400).mean(0)
    probes = gaussian(30, seed=2) - centre
    near, far = (scored(detector, centre + factor * probes) for factor in (1, 10))
    assert np.allclose(near["fraction"], far["fraction"], rtol=1e-3)
    assert np.allclose(far["residual"], 100 * near["residual"], rtol=1e-3)


def test_the_mixture_sees_the_gap_between_clumps() -> None:
    """Without labels, too: one Gaussian takes the middle for the best of places."""
    table, _ = classes(800)
    between = table.mean(0) + 0.5 * np.random.default_rng(7).normal(size=(40, WIDTH))
    detector = learnt(GMM, table, dimensions=WIDTH)
    assert len(detector.mixture.weights) == 4, "as many components as there are clumps"
    found, odd = scored(detector, table), scored(detector, between)
    truth = np.r_[np.zeros(800), np.ones(40)]
    assert roc_auc_score(truth, np.r_[found["density"], odd["density"]]) > 0.95
    assert np.allclose(odd["density"], odd["inside"]), "nothing is left out"
    alone = learnt(Mahalanobis, table)
    assert roc_auc_score(truth, np.r_[scored(alone, table)["distance"], scored(alone, between)["distance"]]) < 0.5


def test_components_left_out_count_as_noise() -> None:
    """An image off the leading components is far out, though the mixture on them sees nothing."""
    generator = np.random.default_rng(8)
    table = generator.normal(size=(600, 2)) @ generator.normal(size=(2, WIDTH)) + 0.1 * generator.normal(
        size=(600, WIDTH)
    )
    detector = learnt(GMM, table[:500], dimensions=2)
    assert detector.principal.axes.shape == (WIDTH, 2)
    good = scored(detector, table[500:])
    # off the plane of the standardized components
    away = linalg.null_space(detector.principal.axes.T)[:, 0] * detector.principal.std
    odd = scored(detector, table[500:] + 3 * away)
    assert np.allclose(odd["inside"], good["inside"], atol=1e-3)
    assert odd["density"].min() > good["density"].max()


def test_the_network_gives_back_what_it_knows() -> None:
    """Features on a surface of few dimensions come back, others do not; a perfect answer scores -1 and 0."""
    generator = np.random.default_rng(9)
    root = generator.normal(size=(2, WIDTH))
    table = generator.normal(size=(600, 2)) @ root + 3 * generator.normal(size=WIDTH)
    detector = learnt(AutoEncoder, table, hidden=64, bottleneck=8, updates=1500)
    others = table[:200] + generator.normal(size=(200, WIDTH))
    good, odd = scored(detector, table[:200]), scored(detector, others)
    for name in ("mfsim", "mse"):
        assert roc_auc_score(np.r_[np.zeros(200), np.ones(200)], np.r_[good[name], odd[name]]) > 0.9
    assert good["mfsim"].min() >= -1
    clean = detector.vectors(measured(table))
    assert np.allclose(detector._mean_cosine(clean, clean), 1)
    assert np.allclose(detector._mean_cosine(clean, -clean), -1)


@pytest.mark.slow
def test_the_networks_seed_is_the_fits_and_choices_do_not_train() -> None:
    table = gaussian(50)
    one, two, other = (bare(AutoEncoder) for _ in range(3))
    other.seed = 1
    for detector in (one, two, other):
        detector.fit_statistics(measured(table))
    assert np.array_equal(one.weights[0], two.weights[0])
    assert not np.array_equal(one.weights[0], other.weights[0])
    kept = one.weights
    one.fit_statistics(measured(gaussian(50, seed=2)))
    assert one.weights is kept
    one.reset_statistics()
    one.fit_statistics(measured(gaussian(50, seed=2)))
    assert not np.array_equal(one.weights[0], kept[0]), "another fit learns anew"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 7, 40])
def test_fewer_images_than_features(kind: type[VectorDetector], count: int) -> None:
    """A user with a handful of images gets scores, and far images score highest."""
    wide = np.random.default_rng(10).normal(size=(count, WIDTH)) + 3
    detector = learnt(kind, wide)
    far = wide.mean(0) + 30 * np.random.default_rng(11).normal(size=(20, WIDTH))
    good, odd = scored(detector, wide), scored(detector, far)
    assert all(np.isfinite(v).all() for v in (*good.values(), *odd.values()))
    assert np.median(odd[detector.score_name]) > np.median(good[detector.score_name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("varying", [0, 1, 10])
def test_features_that_never_vary(kind: type[VectorDetector], varying: int) -> None:
    """Dead channels, or images that all look alike to the backbone: nothing is NaN, nothing far out looks normal.

    A layer that is flat in every image has no direction, and mfsim no meaning: there, mse is the score.
    """
    table = np.full((60, WIDTH), 2.0)
    table[:, :varying] += np.random.default_rng(12).normal(size=(60, varying))
    detector = learnt(kind, table, **({"score": "mse"} if kind is AutoEncoder else {}))
    good, odd = (scored(detector, x) for x in (table, table + np.random.default_rng(13).normal(size=(60, WIDTH))))
    for name in good:
        assert np.isfinite(good[name]).all(), name
        assert np.isfinite(odd[name]).all(), name
    assert np.median(odd[detector.score_name]) > np.median(good[detector.score_name])


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_scores_as_among_many(kind: type[VectorDetector]) -> None:
    detector = learnt(kind, gaussian(150))
    probes = gaussian(70, seed=2)
    whole = scored(detector, probes)
    for row in (0, 63, 69):
        alone = scored(detector, probes[row : row + 1])
        for name, value in whole.items():
            assert abs(alone[name][0] - value[row]) <= SCORE_TOLERANCE * value.std(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_comes_back_from_arrays(kind: type[VectorDetector]) -> None:
    """Saved detectors hold arrays only, and score the same to the last bit."""
    labels = {"labels": np.arange(150) % 3, "classes": True} if kind is Mahalanobis else {}
    detector = learnt(kind, gaussian(150), **labels)  # type: ignore[arg-type]
    again = bare(kind, **{name: value for name, value in labels.items() if name == "classes"})
    state = detector.get_state()
    assert all(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in state.values())
    again.set_state(state)
    for name, value in scored(detector, gaussian(30, seed=2)).items():
        assert np.array_equal(scored(again, gaussian(30, seed=2))[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_is_refused_or_stays_in_its_row(kind: type[VectorDetector]) -> None:
    """One damaged image must not change the scores of the others."""
    detector = learnt(kind, gaussian(150))
    probes = gaussian(5, seed=2)
    whole = scored(detector, probes)
    probes[2] = np.nan
    for name, value in scored(detector, probes).items():
        np.testing.assert_allclose(np.delete(value, 2), np.delete(whole[name], 2), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Mahalanobis, {"score": "nonsense"}, "score is 'nonsense'"),
        (KNN, {"score": "nonsense"}, "score is 'nonsense'"),
        (KNN, {"k": 0}, "k and bank"),
        (PCA, {"variance": 1.0}, "between 0 and 1"),
        (GMM, {"components": 0}, "at least 1"),
        (AutoEncoder, {"bottleneck": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_named(kind: type[VectorDetector], settings: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        kind(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Mahalanobis, KNN, PCA])
def test_layers_are_standardized_image_by_image(kind: type[VectorDetector]) -> None:
    """By default no layer drowns the others, and the methods see what the semantic detector sees."""
    one = gaussian(300)
    factor = np.repeat([3.0, 0.2, 50.0], CHANNELS)
    found = [scored(learnt(kind, table, standardize="image"), table[:5]) for table in (one, one * factor + 7)]
    for name, value in found[0].items():
        assert np.allclose(value, found[1][name], rtol=2e-2, atol=1e-3), name
    with pytest.raises(FaroutError, match="standardize"):
        kind(standardize="nonsense")


# -- plain arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_features_are_fitted_and_scored(kind: type[VectorDetector], tmp_path: Path) -> None:
    """For users with features of their own: `KNN().fit_features(x).score_features(y)`, as in pytorch-ood."""
    generator = np.random.default_rng(0)
    # another direction from the origin: some methods compare directions only
    inside, outside = np.repeat([6.0, 0.0], 6), np.repeat([0.0, 6.0], 6)
    normal, test = (generator.normal(size=(count, 12)) + inside for count in (300, 100))
    far = generator.normal(size=(50, 12)) + outside
    detector = kind(standardize="none").fit_features(normal, alpha=0.1)
    scores = detector.score_features(torch.from_numpy(far))
    assert scores.is_ood.all()
    assert scores.keys == tuple(map(str, range(50)))
    assert np.mean(detector.score_features(test).is_ood) < 0.25
    assert len(detector.calibration) == 60
    assert kind(standardize="none").fit_features(normal, alpha=0.1).fit_features(normal, alpha=0.1).alpha == 0.1
    for wrong in (normal[0], normal[:0], normal * np.nan):
        with pytest.raises(FaroutError, match="expected finite features"):
            kind().fit_features(wrong)
    with pytest.raises(FaroutError, match=r"expected features \(n, 12\)"):
        detector.score_features(normal[:, :5])
    with pytest.raises(FaroutError, match="too few"):
        kind().fit_features(normal[:10], alpha=0.1)
    with pytest.raises(FaroutError, match="cannot be saved"):
        detector.save(tmp_path / "d")
