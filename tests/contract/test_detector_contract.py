"""What every detector keeps, written once: a new detector passes these without a line written for it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from farout import load
from farout.core import store
from farout.core.errors import (
    FaroutError,
    MisleadingResultWarning,
    NaNScoresWarning,
    SourceError,
    StoreError,
    TooFewImagesWarning,
)
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors import DETECTORS, base
from farout.detectors.base import Detector, Scores
from farout.detectors.fitting import recalibrate
from farout.diffusion.model import DiffusionModel
from narrow import narrow_device
from small import classifier, conditional, model, pictures
from tolerances import SCORE_TOLERANCE, assert_same_scores

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        "ignore:it is not known which images:farout.core.errors.MisleadingResultWarning",
        "ignore::farout.core.errors.TooFewImagesWarning",
    ),
]

NAMES = sorted(DETECTORS)


def quick_for(*names: str) -> pytest.MarkDecorator:
    """Runs the test for every detector, and in the quick tests for these alone: it is mostly about shared code."""
    values = [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    return pytest.mark.parametrize("detector", values, indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images unlike the normal ones, and one file that is not an image."""
    made = pictures(tmp_path_factory.mktemp("images") / "others", 9, low=0, spread=255)
    (made / "004-broken.png").write_text("not a picture")
    return made


def fitted(name: str, folder: Path, **settings: object) -> Detector:
    method = DETECTORS[name].load()
    networks: dict[str, object] = {"classifier": classifier()} if method.requirements.classifier else {}
    if method.requirements.diffusion == "images":
        networks["diffusion"] = diffusion_model(method)
    return method(**method.test_arguments).fit(folder, **networks, **{"alpha": 0.1, "statistics": 30, **settings})


def diffusion_model(method: Detector | type[Detector], **settings: object) -> DiffusionModel:
    return conditional(**settings) if method.requirements.class_conditional else model(**settings)


@pytest.fixture(scope="module", params=NAMES)
def detector(request: pytest.FixtureRequest, folder: Path) -> Detector:
    return fitted(request.param, folder)


@pytest.fixture(scope="module")
def whole(detector: Detector, folder: Path) -> Scores:
    """Scores of the normal images."""
    return detector.score(folder)


@pytest.fixture(scope="module")
def saved(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, which tests leave as it is."""
    out = tmp_path_factory.mktemp("saved") / "d"
    detector.save(out)
    return out


def test_there_are_detectors() -> None:
    assert "reconstruction" in NAMES


def test_scores_are_numbers_and_p_values(detector: Detector, whole: Scores) -> None:
    assert len(whole) == 60
    assert np.isfinite(whole.score).all()
    assert ((whole.p_value > 0) & (whole.p_value <= 1)).all()
    assert np.array_equal(whole.is_ood, whole.p_value <= detector.alpha)
    assert whole.measurements is not None
    assert whole.measurements.keys == whole.keys
    assert repr(detector).endswith(f"alpha=0.1, {len(detector.statistics)} statistics, 12 calibration images)")


def test_scores_of_new_images_differ(detector: Detector, tmp_path: Path) -> None:
    """Images that the fit has not seen: statistics images may all have the score 0, their distance to themselves."""
    scores = detector.score(pictures(tmp_path / "new", 60, seed=1))
    assert len(np.unique(scores.score)) > 3, "scores that hardly differ distinguish nothing"


def test_higher_is_more_anomalous(detector: Detector, others: Path) -> None:
    """Even with untrained networks, noise images score higher than the median of the calibration images."""
    far = detector.score(others)
    median = np.median(detector.calibration_scores[detector.score_name])
    assert np.nanmedian(far.score) > median


def test_an_unreadable_image_is_listed_and_never_normal(detector: Detector, others: Path) -> None:
    scores = detector.score(others)
    row = scores.keys.index("004-broken.png")
    assert scores.status[row] == "unreadable"
    assert np.isnan(scores.score[row])
    assert np.isnan(scores.p_value[row])
    frame = scores.to_frame()
    assert frame["is_ood"].isna().tolist() == [key == "004-broken.png" for key in scores.keys]
    rest = detector.score(others, policy="skip")
    assert rest.keys == tuple(key for key in scores.keys if key != "004-broken.png")
    scale = np.std(detector.calibration_scores[detector.score_name])
    np.testing.assert_allclose(rest.score, np.delete(scores.score, row), rtol=0, atol=SCORE_TOLERANCE * scale)
    with pytest.raises(FaroutError, match="004-broken"):
        detector.score(others, policy="raise")


@pytest.mark.parametrize(
    ("size", "threads"),
    [(7, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, 1), (64, 1), (1, 2), (7, 2), (64, 2)])],
)
def test_batch_order_and_threads_do_not_matter(
    detector: Detector, whole: Scores, folder: Path, size: int, threads: int
) -> None:
    """Batches of other sizes, in another order, decoded by other threads and computed by another number of them."""
    source = open_source(folder)
    order = np.random.default_rng(size).permutation(60)
    kept = detector.runtime
    torch.set_num_threads(threads)
    try:
        detector.attach_runtime(replace(kept, batch_size=size, workers=1 + size % 3, cache=False))
        scores = detector.score(source.subset(order.tolist()))
    finally:
        detector.attach_runtime(kept)
        torch.set_num_threads(1)
    assert_same_scores(scores, whole, detector)


@quick_for("denoising", "knn")
def test_the_device_needs_no_float64(whole: Scores, saved: Path, folder: Path) -> None:
    """Apple's has none; what is to be exact is computed on the CPU there."""
    loaded = load(saved, cache=False)
    with narrow_device() as name:
        loaded.attach_runtime(replace(loaded.runtime, device=name))
        other = loaded.score(open_source(folder).subset(range(8)))
    assert whole.measurements is not None
    assert other.measurements is not None
    assert other.keys == whole.keys[:8]
    for one, two in zip(tensors(other.measurements), tensors(whole.measurements), strict=True):
        torch.testing.assert_close(one, two[:8], rtol=1e-4, atol=1e-5 * float(two.abs().max()))


def tensors(measurements: base.Measurements) -> list[torch.Tensor]:
    return [v for v in (measurements.values, *measurements.vectors.values()) if v is not None]


@quick_for("autoencoder", "denoising")
def test_two_fits_are_the_same(detector: Detector, folder: Path) -> None:
    again = fitted(_name(detector), folder)
    assert again.fingerprint == detector.fingerprint


def test_save_and_load_score_the_same(detector: Detector, saved: Path, others: Path) -> None:
    loaded = load(saved)
    assert loaded.fingerprint == detector.fingerprint
    assert loaded.config == detector.config
    before, after = detector.score(others), loaded.score(others)
    assert np.array_equal(before.score, after.score, equal_nan=True)
    assert np.array_equal(before.p_value, after.p_value, equal_nan=True)
    again = loaded.score_measurements(before.measurements)
    assert np.array_equal(again.score, before.score[~np.isnan(before.score)])


@quick_for("denoising")
def test_broken_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "d")
    for file in ("calibration.parquet", "statistics.parquet", "fitted.safetensors", "config.json"):
        content = (tmp_path / "d" / file).read_bytes()
        (tmp_path / "d" / file).unlink()
        with pytest.raises(StoreError, match="missing"):
            load(tmp_path / "d")
        (tmp_path / "d" / file).write_bytes(content)
    (tmp_path / "d" / "calibration.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(StoreError, match="calibration"):
        load(tmp_path / "d")
    with pytest.raises(StoreError, match="no folder"):
        load(tmp_path / "nowhere")


@quick_for("denoising")
def test_another_model_is_refused(detector: Detector, tmp_path: Path) -> None:
    if not isinstance(detector.diffusion, DiffusionModel):
        pytest.skip("this method has no diffusion model of images")
    diffusion_model(detector).save(tmp_path / "model")
    detector.save(tmp_path / "d", link=tmp_path / "model")
    assert load(tmp_path / "d").fingerprint == detector.fingerprint
    diffusion_model(detector, b_scale=2.0).save(tmp_path / "model")
    with pytest.raises(StoreError, match="hash differs"):
        load(tmp_path / "d")


@quick_for("denoising")
def test_a_linked_model_moves_with_its_detector(detector: Detector, tmp_path: Path) -> None:
    """A benchmark's folder can be put elsewhere, whether or not its old path is used again."""
    if not isinstance(detector.diffusion, DiffusionModel):
        pytest.skip("this method has no diffusion model of images")
    diffusion_model(detector).save(tmp_path / "bench" / "networks" / "model")
    detector.save(tmp_path / "bench" / "detectors" / "d", link=tmp_path / "bench" / "networks" / "model")
    (tmp_path / "bench").rename(tmp_path / "moved")
    moved = load(tmp_path / "moved" / "detectors" / "d")
    assert moved.fingerprint == detector.fingerprint
    moved.save(tmp_path / "moved" / "again")
    diffusion_model(detector, b_scale=2.0).save(tmp_path / "bench" / "networks" / "model")
    assert load(tmp_path / "moved" / "detectors" / "d").fingerprint == detector.fingerprint
    assert load(tmp_path / "moved" / "again").fingerprint == detector.fingerprint
    shutil.rmtree(tmp_path / "moved" / "networks")
    with pytest.raises(StoreError, match="hash differs"):
        load(tmp_path / "moved" / "detectors" / "d")


@quick_for("denoising")
def test_another_precision_warns(saved: Path) -> None:
    with pytest.warns(MisleadingResultWarning, match="precision"):
        load(saved, precision="bf16")


@quick_for("denoising")
@pytest.mark.parametrize("elsewhere", ["cuda:7", "mps"])
def test_a_device_that_is_not_here_gives_way(detector: Detector, tmp_path: Path, elsewhere: str) -> None:
    detector.save(tmp_path / "d")
    config = store.read_json(tmp_path / "d" / "config.json")
    config["runtime"] |= {"device": elsewhere, "precision": "fp32"}
    store.write_json(tmp_path / "d" / "config.json", config)
    store.write_folder_hashes(tmp_path / "d")
    assert load(tmp_path / "d").runtime.device not in (elsewhere, "auto")


@quick_for("denoising")
@pytest.mark.parametrize("refused", [{"score": "guesswork"}, {"of_a_later_version": 1}])
def test_a_folder_with_settings_that_are_refused_is_named(
    saved: Path, tmp_path: Path, refused: dict[str, object]
) -> None:
    shutil.copytree(saved, tmp_path / "d")
    config = store.read_json(tmp_path / "d" / "config.json")
    config["config"] |= refused
    store.write_json(tmp_path / "d" / "config.json", config)
    with pytest.raises(StoreError, match=r"d has settings that this version rejects; fit it again: .*(score|later)"):
        load(tmp_path / "d")


def damage(monkeypatch: pytest.MonkeyPatch, kind: type[Detector], is_damaged: Callable[[str], bool]) -> None:
    """Replaces the measurements of some keys by NaN."""
    original = kind.measure

    def damaged(self: Detector, batch: Batch, maps: bool = False) -> base.Measurements:
        measured = original(self, batch, maps)
        tensors(measured)[0][torch.tensor([is_damaged(key) for key in measured.keys])] = float("nan")
        return measured

    monkeypatch.setattr(kind, "measure", damaged)


def test_what_is_not_a_number_is_never_normal(
    detector: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, type(detector), lambda key: key == "003.png")
    with pytest.warns(NaNScoresWarning, match="1 of 60"):
        scores = detector.score(folder)
    row = scores.keys.index("003.png")
    assert scores.status[row] == "not a number"
    assert np.isnan(scores.p_value[row])
    assert np.isfinite(np.delete(scores.score, row)).all()


@quick_for("denoising", "pca")
def test_a_fit_refuses_what_is_not_a_number(detector: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, type(detector), lambda key: True)
    with pytest.raises(FaroutError, match="numbers"):
        fitted(_name(detector), folder)


def test_empty_and_single_inputs(detector: Detector, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="empty"):
        detector.score([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="contains no images"):
        detector.score(tmp_path / "empty")
    assert len(detector.score(str(folder / "000*.png"))) == 1
    black = torch.zeros(1, 1, 8, 8)
    assert np.isfinite(detector.score(black).score).all()


def test_other_shapes_are_brought_to_the_models(detector: Detector) -> None:
    """Gray for RGB and the reverse, and another size, are converted as stated."""
    color = torch.rand(2, 3, 20, 14, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(detector.score(color).score).all()


@quick_for("denoising", "pca")
def test_recalibration_takes_fresh_images_only(detector: Detector, saved: Path, folder: Path, tmp_path: Path) -> None:
    fresh = pictures(tmp_path / "fresh", 25, seed=9)
    moved = recalibrate(load(saved), fresh, alpha=0.2)
    assert moved.alpha == 0.2
    assert len(moved.calibration) == 25
    assert not np.array_equal(
        moved.calibration_scores[moved.score_name], detector.calibration_scores[detector.score_name]
    )
    own = recalibrate(load(saved), folder)
    assert len(own.calibration) == 60 - len(detector.statistics_hashes | detector.trained_on)


def test_choices_need_no_network(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr(type(detector), "measure", refuse)
    for name in detector.calibration_scores:
        if "score" in detector.scoring_arguments:
            assert detector.with_scoring(score=name).score_name == name
    with pytest.raises(FaroutError, match="has no argument 'nonsense'"):
        detector.with_scoring(nonsense=1)


def test_an_unknown_argument_suggests_a_similar_one() -> None:
    """Also an argument of a base class, which the method passes on."""
    for name in ("semantic", "knn"):
        method = DETECTORS[name].load()
        with pytest.raises(FaroutError, match=rf"^{method.__name__}\(\) has no argument 'scor'; did you mean score\?"):
            method(scor="x")
        with pytest.raises(TypeError, match="did you mean standardize"):
            method(standardise="image")


def test_an_unfitted_detector_says_so(folder: Path) -> None:
    for name in NAMES:
        detector = DETECTORS[name].load()()
        with pytest.raises(FaroutError, match="not been fitted"):
            detector.score(folder)
        assert repr(detector).endswith("not fitted)")


def test_presets_can_be_had() -> None:
    """None has a setting that its others leave without use."""
    for name in NAMES:
        kind = DETECTORS[name].load()
        for preset in kind.presets:
            assert kind.from_preset(preset).provenance["preset"] == preset


@quick_for("denoising", "pca")
def test_too_few_images_warn_with_counts(detector: Detector, folder: Path) -> None:
    if detector.requirements.diffusion != "features":  # a training takes half of them, so that they are few by design
        with pytest.warns(TooFewImagesWarning, match="statistics"):
            fitted(_name(detector), folder, statistics=500)
    with pytest.raises(FaroutError, match="needs 99 images"):
        fitted(_name(detector), folder, alpha=0.01, limit=30)


def _name(detector: Detector) -> str:
    return type(detector).__module__.rpartition(".")[2]
