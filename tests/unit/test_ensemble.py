"""Several detectors as one: what each part sees, what is shared, how scores are combined."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from farout import load
from farout.benchmark.yaml_reader import parse_benchmark
from farout.cli import main
from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.core.runtime import Runtime
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.detectors.ensemble import CHANGES, Ensemble
from farout.detectors.ensemble.combination import Standardization, TailProbabilities, learn_weights
from farout.detectors.fitting import recalibrate
from farout.detectors.knn import KNN
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.msma import MSMA
from farout.detectors.posthoc import Posthoc
from farout.features.extractor import FeatureExtractor
from farout.scoring.folder import read_scores, score_folder
from farout.scoring.scorer import Scorer
from small import CPU, classifier, model, pictures
from tolerances import assert_same_scores

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:it is not known which images:farout.core.errors.MisleadingResultWarning",
        "ignore::farout.core.errors.TooFewImagesWarning",
    ),
]

FEATURES = {"weights": "random", "size": 32}
LEVELS = (200, 900)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "others", 9, low=0, spread=255, seed=3)


@pytest.fixture(scope="module")
def ensemble(images: Path) -> Ensemble:
    """Two parts on one backbone, and one on a diffusion model of images."""
    parts = [Mahalanobis(**FEATURES), KNN(**FEATURES), MSMA(levels=LEVELS)]
    return Ensemble(parts, changed_images=3).fit(images, diffusion=model(), alpha=0.1, runtime=CPU)


# -- how scores are combined ----------------------------------------------------------------------------------------


def test_a_few_unusual_images_do_not_change_the_scale() -> None:
    scores = np.random.default_rng(0).normal(size=(200, 2)) * [1, 50]
    usual = Standardization.fit(scores)
    scores[:5] *= 1000
    unusual = Standardization.fit(scores)
    np.testing.assert_allclose(unusual.scale, usual.scale, rtol=0.1)
    z = usual.transform(np.array([[1.0, 50.0]]))
    np.testing.assert_allclose(z, 1, atol=0.3)


def test_positive_scores_are_compared_by_their_logarithm() -> None:
    scores = np.exp(np.random.default_rng(0).normal(size=(400, 1)))
    z = Standardization.fit(scores).transform(np.exp([[1.0], [2.0], [3.0]]))
    np.testing.assert_allclose(np.diff(z[:, 0]), 1, atol=0.15)


def test_a_part_cannot_make_up_for_another_by_finding_an_image_too_normal() -> None:
    scores = np.random.default_rng(0).normal(size=(100, 2))
    fitted = Standardization.fit(scores)
    z = fitted.transform(np.array([[-1e6, 0.0]]))
    assert z[0, 0] == fitted.transform(scores)[:, 0].min()


def test_scores_that_are_all_equal_have_a_scale() -> None:
    z = Standardization.fit(np.full((20, 1), 0.5)).transform(np.array([[0.5], [0.6]]))
    assert np.isfinite(z).all()
    assert z[0, 0] == 0 < z[1, 0]


def test_scores_beyond_the_fit_have_different_probabilities() -> None:
    z = np.random.default_rng(0).normal(size=(200, 1))
    tails = TailProbabilities.fit(z)
    log_p = tails.log_p(np.array([[0.0], [2.0], [5.0], [6.0], [50.0]]))[:, 0]
    assert (np.diff(log_p) < 0).all()
    np.testing.assert_allclose(np.exp(log_p[:2]), [0.5, 0.023], atol=0.06)
    # as in the paper of Fisher: -2 log p of uniform p-values has the mean 2
    assert -2 * tails.log_p(np.random.default_rng(1).normal(size=(5000, 1))).mean() == pytest.approx(2, abs=0.2)


def test_learned_weights_prefer_parts_that_see_the_changes() -> None:
    random = np.random.default_rng(0)
    normal, changed = random.normal(size=(200, 3)), random.normal(size=(500, 3))
    np.testing.assert_allclose(learn_weights(normal, changed, 100.0), 1 / 3, atol=0.02)
    changed[:, 0] += 3
    weights = learn_weights(normal, changed, 0.1)
    assert weights[0] > 0.6
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)


# -- one pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
def test_each_image_is_decoded_once_and_goes_once_through_the_backbone(
    ensemble: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_cache: bool
) -> None:
    new = pictures(tmp_path / "new", 10, seed=21 + use_cache)
    decoded: Counter[int] = Counter()
    rows: list[int] = []
    get, features = ImageSource.read, FeatureExtractor.pooled_features

    def count_decoded(self: ImageSource, index: int, *size: object) -> object:
        decoded[index] += 1
        return get(self, index, *size)

    def count_rows(self: FeatureExtractor, images: torch.Tensor, *settings: object) -> torch.Tensor:
        rows.append(len(images))
        return features(self, images, *settings)

    monkeypatch.setattr(ImageSource, "read", count_decoded)
    monkeypatch.setattr(FeatureExtractor, "pooled_features", count_rows)
    own = Runtime(device="cpu", precision="fp32", workers=0, cache=use_cache, batch_size=4)
    ensemble.attach_runtime(own)
    try:
        scores = ensemble.score(new)
        assert decoded == Counter(range(10))
        assert sum(rows) == 10
        hits = ensemble.cache_hits
        assert_same_scores(ensemble.score(new), scores, ensemble)
        assert ensemble.cache_hits - hits == (10 if use_cache else 0)
    finally:
        ensemble.attach_runtime(CPU)


def test_parts_score_as_they_do_alone(ensemble: Ensemble, others: Path) -> None:
    scores = ensemble.score(others)
    for name, part in ensemble.parts.items():
        alone = part.score(others).score
        np.testing.assert_allclose(scores.indicators[f"{name}_score"], alone, rtol=1e-4)


def test_the_cost_of_shared_features_counts_once(ensemble: Ensemble) -> None:
    parts = {name: part.cost() for name, part in ensemble.parts.items()}
    cost = ensemble.cost()
    assert cost.nfe == parts["msma"].nfe == len(LEVELS)
    assert cost.gmacs == pytest.approx(parts["knn"].gmacs + parts["msma"].gmacs, rel=1e-6)


# -- which images the parts have seen -------------------------------------------------------------------------------


def test_statistics_and_calibration_are_new_to_all_parts(ensemble: Ensemble, images: Path) -> None:
    source = open_source(images)
    hashes = {key: source.content_hash(i) for i, key in enumerate(source.keys)}
    own = {hashes[key] for key in (*ensemble.statistics.keys, *ensemble.calibration.keys)}
    assert len(own) == 24
    for part in ensemble.parts.values():
        assert own.isdisjoint(part.statistics_hashes | part.trained_on)
        assert len(part.statistics) == 36
        assert part.calibration_hashes == ensemble.calibration_hashes


def test_images_that_a_given_network_was_trained_on_are_for_other_parts(images: Path) -> None:
    source = open_source(images)
    trained_on = [source.content_hash(i) for i in range(25)]
    parts = [Mahalanobis(**FEATURES), MSMA(levels=LEVELS)]
    fitted = Ensemble(parts, changed_images=0).fit(images, diffusion=model(trained_on=trained_on), runtime=CPU)
    own = {*fitted.calibration_hashes, *(source.content_hash(source.keys.index(k)) for k in fitted.statistics.keys)}
    assert own.isdisjoint(trained_on)
    assert fitted.parts["msma"].statistics_hashes.isdisjoint(trained_on)
    assert fitted.parts["mahalanobis"].statistics_hashes.issuperset(trained_on)
    with pytest.raises(FaroutError, match="used to fit"):
        recalibrate(fitted, source.subset(range(25)))


def test_fitted_detectors_are_combined_on_images_that_they_have_not_seen(
    images: Path, others: Path, tmp_path: Path
) -> None:
    settings = {"alpha": 0.2, "runtime": CPU}
    knn = KNN(**FEATURES).fit(images, limit=40, **settings)
    Mahalanobis(**FEATURES).fit(images, limit=30, **settings).save(tmp_path / "mahalanobis")
    before = knn.fingerprint
    fitted = Ensemble([knn, str(tmp_path / "mahalanobis")], changed_images=2).fit(images, **settings)
    assert knn.fingerprint == before
    assert [*fitted.parts] == ["knn", "mahalanobis"]
    seen = knn.statistics_hashes | fitted.parts["mahalanobis"].statistics_hashes
    assert fitted.calibration_hashes.isdisjoint(seen)
    assert len(fitted.statistics) + len(fitted.calibration) <= 60 - len(seen)
    np.testing.assert_allclose(fitted.score(others).indicators["knn_score"], knn.score(others).score, rtol=1e-5)
    with pytest.raises(FaroutError, match="uses no diffusion model"):
        Ensemble([knn, knn]).fit(images, diffusion=model(), **settings)


def test_networks_that_are_missing_are_trained_on_images_that_no_statistics_have(tmp_path: Path) -> None:
    for name, low in (("a", 0), ("b", 120)):
        pictures(tmp_path / "labelled" / name, 60, low=low, seed=low)
    fitted = Ensemble([Posthoc(), KNN(**FEATURES)], changed_images=0)
    fitted.fit(tmp_path / "labelled", classifier_steps=2, runtime=CPU)
    posthoc, knn = fitted.parts["posthoc"], fitted.parts["knn"]
    assert len(posthoc.trained_on) > 10
    assert posthoc.trained_on.isdisjoint(posthoc.statistics_hashes | fitted.calibration_hashes)
    assert knn.statistics_hashes > posthoc.trained_on


# -- the choice of a combination, and the folder --------------------------------------------------------------------


def test_another_combination_needs_no_network(
    ensemble: Ensemble, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = ensemble.score(others)
    assert {"z_sum", "fisher", "max", "learned", "knn_score", "mahalanobis_score", "msma_score"} == {*scores.indicators}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr(Ensemble, "measure", refuse)
    for combine in ("fisher", "max", "learned"):
        other = ensemble.with_scoring(combine=combine)
        assert other.score_name == combine
        again = other.score_measurements(scores.measurements)
        np.testing.assert_allclose(again.score, scores.indicators[combine])
    one = ensemble.with_scoring(part_weights=(0.0, 2.0, 0.0)).score_measurements(scores.measurements)
    assert np.array_equal(np.argsort(one.score), np.argsort(scores.indicators["knn_score"]))
    equal = ensemble.with_scoring(combine="learned", prior=1e6).score_measurements(scores.measurements)
    np.testing.assert_allclose(equal.score, scores.indicators["z_sum"], rtol=1e-3)


def test_changed_images_are_measured_once_in_the_fit(ensemble: Ensemble, tmp_path: Path, others: Path) -> None:
    assert ensemble.changed_scores.shape == (len(CHANGES), 3, 3)
    ensemble.save(tmp_path / "d")
    assert ensemble.score_name == "learned"
    assert ensemble.with_scoring(part_weights=(1.0, 1.0, 1.0)).score_name == "z_sum"
    learned = load(tmp_path / "d").with_scoring(combine="learned")
    np.testing.assert_allclose(learned.score(others).score, ensemble.score(others).indicators["learned"])
    without = Ensemble(("msma", "posthoc"), changed_images=0)
    without.fit(open_source(others), model(), classifier(), alpha=0.4, runtime=CPU)
    assert without.score_name == "z_sum"
    with pytest.raises(FaroutError, match="changed_images"):
        without.with_scoring(combine="learned")


def test_a_loaded_ensemble_shares_its_networks(ensemble: Ensemble, tmp_path: Path, others: Path) -> None:
    ensemble.save(tmp_path / "d")
    loaded = load(tmp_path / "d", batch_size=2, workers=0)
    assert loaded.fingerprint == ensemble.fingerprint
    assert loaded.parts["knn"].features is loaded.parts["mahalanobis"].features
    assert_same_scores(loaded.score(others), ensemble.score(others), ensemble)
    knn = load(tmp_path / "d" / "parts" / "knn")
    assert knn.fingerprint == ensemble.parts["knn"].fingerprint


def test_another_detector_in_the_place_of_a_part_is_refused(ensemble: Ensemble, images: Path, tmp_path: Path) -> None:
    ensemble.save(tmp_path / "d")
    KNN(**FEATURES).fit(images, alpha=0.1, runtime=CPU).save(tmp_path / "d" / "parts" / "knn")
    with pytest.raises(StoreError, match="changed after it was written"):
        load(tmp_path / "d")
    store.write_folder_hashes(tmp_path / "d")
    with pytest.raises(StoreError, match=r"parts.knn is not the detector that was combined here"):
        load(tmp_path / "d")


def test_a_linked_diffusion_model_is_not_copied(images: Path, others: Path, tmp_path: Path) -> None:
    model().save(tmp_path / "model")
    parts = [MSMA(levels=LEVELS), MSMA(levels=(500,))]
    fitted = Ensemble(parts, changed_images=0).fit(images, diffusion=tmp_path / "model", alpha=0.1, runtime=CPU)
    fitted.save(tmp_path / "d", link=tmp_path / "model")
    assert [*fitted.parts] == ["msma", "msma_2"]
    assert not list((tmp_path / "d").rglob("diffusion"))
    loaded = load(tmp_path / "d")
    assert loaded.parts["msma"].diffusion is loaded.parts["msma_2"].diffusion
    assert_same_scores(loaded.score(others), fitted.score(others), fitted)


def test_folders_of_scores_and_scorers_have_the_same_scores(ensemble: Ensemble, others: Path, tmp_path: Path) -> None:
    scores = ensemble.score(others)
    score_folder(ensemble, others, tmp_path / "scores")
    assert_same_scores(read_scores(tmp_path / "scores"), scores, ensemble)
    rows = Scorer(ensemble).score([str(path) for path in sorted(others.iterdir())])
    np.testing.assert_allclose(rows["score"].to_numpy(), scores.score, rtol=1e-4, atol=1e-4)


def test_the_command_combines_folders_of_detectors(images: Path, tmp_path: Path) -> None:
    for levels in (200, 900):
        fitted = MSMA(levels=(levels,)).fit(images, model(), limit=40, alpha=0.2, statistics=20, runtime=CPU)
        fitted.save(tmp_path / str(levels))
    folders = [str(tmp_path / "200"), str(tmp_path / "900")]
    words = ["fit", "ensemble", str(images), "--parts", *folders, "--combine", "max", "--changed-images", "0"]
    assert main([*words, "--alpha", "0.2", "--out", str(tmp_path / "d")]) == 0
    loaded = load(tmp_path / "d")
    assert loaded.config["parts"] == ("msma", "msma")
    assert [*loaded.parts] == ["msma", "msma_2"]
    assert loaded.score_name == "max"
    assert loaded.parts["msma_2"].provenance["source"] == str(images)


def test_a_benchmark_gives_the_parts_the_networks_that_they_require() -> None:
    entry = {"method": "ensemble", "arguments": {"parts": ["msma", "knn"]}}
    content = {"name": "b", "train": "a/", "id": "b/", "ood": {"near": "c/"}, "detectors": [entry]}
    with pytest.raises(FaroutError, match=r"ensemble requires a diffusion model; name one of the networks"):
        parse_benchmark(content)
    networks = {"generator": {"kind": "diffusion"}}
    spec = parse_benchmark({**content, "networks": networks, "detectors": [{**entry, "diffusion": "generator"}]})
    detector = spec.detectors["ensemble"].build_detector()
    assert [*detector.parts] == ["msma", "knn"]
    entry["arguments"]["parts"] = ["pca", "knn"]
    assert not parse_benchmark(content).detectors["ensemble"].build_detector().requirements.diffusion
    with pytest.raises(FaroutError, match="takes no diffusion model"):
        parse_benchmark({**content, "networks": networks, "detectors": [{**entry, "diffusion": "generator"}]})


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ("knn",)}, "at least two parts"),
        ({"parts": ("knn", "mahalanobi")}, "did you mean mahalanobis"),
        ({"parts": ("knn", "ensemble")}, "cannot be an ensemble"),
        ({"combine": "mean"}, "expected one of z_sum"),
        ({"combine": "max", "part_weights": (1.0, 2.0)}, "only used with combine z_sum"),
        ({"part_weights": (1.0, 2.0, 3.0)}, "must be 2 numbers"),
        ({"combine": "learned", "changed_images": 0}, "changed_images of at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        Ensemble(**arguments)


def test_an_export_names_what_can_be_exported(ensemble: Ensemble) -> None:
    with pytest.raises(FaroutError, match="export its parts"):
        ensemble.build_score_module()
