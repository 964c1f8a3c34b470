"""What a user would lose: files in the way, models that are not the ones they seem, images already seen."""

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from farout import load
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, MissingExtraError, StoreError, TooFewImagesWarning
from farout.data.sources import open_source
from farout.detectors.fitting import recalibrate, source_spec
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.reconstruction import Reconstruction
from farout.evaluation.evaluate import evaluate
from farout.evaluation.trivial_baselines import TrivialBaselines
from farout.scoring.folder import score_folder
from small import latent, model, pictures

pytestmark = [
    pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"),
    pytest.mark.usefixtures("cheap_perceptual"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Reconstruction:
    return Reconstruction(levels=(50,), draws=1).fit(folder, diffusion=model(), alpha=0.1, statistics=30)


def test_nobodys_folder_is_replaced(tmp_path: Path, fitted: Reconstruction, capsys: pytest.CaptureFixture[str]) -> None:
    mine = pictures(tmp_path / "mine", 5)
    model().save(tmp_path / "model")
    for call in (fitted.save, model().save):
        with pytest.raises(StoreError, match="not replaced"):
            call(mine)
    for wrong in (mine, tmp_path / "model"):
        words = ["fit", "reconstruction", str(mine), "--diffusion", str(tmp_path / "model"), "--out", str(wrong)]
        assert main(words) == 1
        assert "not replaced" in capsys.readouterr().err
    assert len(list(mine.iterdir())) == 5
    fitted.save(tmp_path / "d")
    fitted.save(tmp_path / "d")


def test_the_same_weights_in_another_network_are_another_model() -> None:
    one, other = model(), model()
    other.network.register_to_config(norm_eps=0.5)
    assert one.content_hash != other.content_hash
    assert one.content_hash == model().content_hash


def test_a_fit_does_not_remember_an_earlier_one(folder: Path, fitted: Reconstruction, tmp_path: Path) -> None:
    twice = Reconstruction(levels=(50,), draws=1)
    for source in (pictures(tmp_path / "dark", 60, low=0, seed=4), folder):
        twice.fit(source, diffusion=model(), alpha=0.1, statistics=30)
    assert twice.fingerprint == fitted.fingerprint


def test_held_out_images_are_used(tmp_path: Path) -> None:
    """What training held out for calibration serves calibration, though the trained images are excluded."""
    source = pictures(tmp_path / "many", 100)
    opened = open_source(source)
    seen = [opened.content_hash(i) for i in range(40)]
    detector = Reconstruction(levels=(50,), draws=1)
    detector.fit(source, diffusion=model(trained_on=seen), alpha=0.1, statistics=20)
    assert len(detector.calibration) == 20
    assert not (detector.calibration_hashes | detector.statistics_hashes) & set(seen)


def test_recalibration_says_what_cannot_work(
    fitted: Reconstruction, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted.save(tmp_path / "d")
    few = pictures(tmp_path / "few", 5, seed=3)
    with pytest.warns(TooFewImagesWarning, match="cannot flag"):
        recalibrate(load(tmp_path / "d"), few, alpha=0.01)
    before = load(tmp_path / "d").fingerprint
    assert main(["calibrate", str(tmp_path / "d"), str(few), "--alpha", "0.01"]) == 1
    assert "99 needed); give more images, a larger alpha, or --out" in capsys.readouterr().err
    assert load(tmp_path / "d").fingerprint == before, "a detector that works is kept"
    assert main(["calibrate", str(tmp_path / "d"), str(few), "--alpha", "0.01", "--out", str(tmp_path / "e")]) == 0
    with pytest.warns(TooFewImagesWarning, match=r"with 5 calibration images no p-value reaches alpha 0\.01"):
        score_folder(load(tmp_path / "e"), few, tmp_path / "scores")
    with pytest.raises(FaroutError, match="between 0 and 1"):
        recalibrate(load(tmp_path / "d"), few, alpha=2.0)


def test_recalibration_says_what_it_leaves_out(
    fitted: Reconstruction, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unreadable image has not been used; and a twin's calibration is not its twin's."""
    twin, before = fitted.with_scoring(score="mean_z"), dict(fitted.provenance["images"])
    fresh = pictures(tmp_path / "fresh", 12, seed=3)
    (fresh / "broken.png").write_text("not a picture")
    recalibrate(twin, fresh, policy="skip", alpha=0.1)
    assert "used to fit" not in caplog.text
    assert twin.provenance["images"]["calibration"] == 12
    assert fitted.provenance["images"] == before
    assert "calibration_source" not in fitted.provenance
    for path in fresh.glob("0*.png"):
        path.write_text("not a picture")
    with pytest.raises(FaroutError, match="0 of 13 images can be read"):
        recalibrate(twin, fresh, policy="skip")


def test_a_refit_that_fails_leaves_nothing_fitted(folder: Path) -> None:
    """Old p-values and new networks do not go together."""
    detector = Reconstruction(levels=(50,), draws=1).fit(folder, diffusion=model(), alpha=0.1, statistics=30)
    with pytest.raises(FaroutError, match="at least 2"):
        detector.fit(folder, diffusion=model(), statistics=0)
    assert len(detector.score(folder)) == 60, "refused before anything has changed"
    with pytest.raises(FaroutError, match="needs 999 images"):
        detector.fit(folder, diffusion=model(), alpha=0.001)
    with pytest.raises(FaroutError, match="not been fitted"):
        detector.score(folder)


def test_sources_are_remembered_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "good", 2)
    monkeypatch.chdir(tmp_path)
    there = str(tmp_path.resolve())
    assert source_spec("good") == source_spec(Path("good")) == f"{there}/good"
    assert source_spec("good@vflip") == f"{there}/good@vflip"
    assert source_spec("good/*.png@classes=0-1") == f"{there}/good/*.png@classes=0-1"
    assert source_spec("cifar10:test@vflip") == "cifar10:test@vflip"
    assert source_spec("hf://someone/something:train") == "hf://someone/something:train"
    assert source_spec(["pictures"]) is None


def test_color_is_compared_with_the_fitted_images(folder: Path, tmp_path: Path) -> None:
    """A network that requires RGB, and gray images in both sources: no warning."""
    detector = Mahalanobis(size=32).fit(folder, alpha=0.1, statistics=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MisleadingResultWarning)
        score_folder(detector, folder, tmp_path / "gray")
    (tmp_path / "rgb").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.png"))[:3]):
        with Image.open(path) as picture:
            picture.convert("RGB").save(tmp_path / "rgb" / f"{number}.png")
    with pytest.warns(
        MisleadingResultWarning, match="3 of 3 sampled images are RGB, and the fitted ones were all gray"
    ):
        score_folder(detector, tmp_path / "rgb", tmp_path / "colored")


def test_another_scaling_is_named(folder: Path) -> None:
    with pytest.warns(MisleadingResultWarning, match="scaling is 'minmax', but the diffusion model has 'fixed'"):
        Reconstruction(levels=(50,), draws=1, scaling="minmax").fit(folder, diffusion=model(), alpha=0.1, statistics=30)


def test_a_distance_that_is_not_installed_is_said_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("no lpips")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("farout.detectors.reconstruction.perceptual_distance", missing)
    monkeypatch.setattr("farout.detectors.network_training.train_model", never)
    with pytest.raises(MissingExtraError, match="no lpips"):
        Reconstruction().fit(folder, alpha=0.1, statistics=30)


@pytest.mark.filterwarnings("ignore:.* is below one half:farout.core.errors.MisleadingResultWarning")
def test_seen_images_and_unknown_pasts_are_named(folder: Path, fitted: Reconstruction, tmp_path: Path) -> None:
    far = pictures(tmp_path / "far", 10, low=0, spread=255, seed=2)
    with pytest.warns(MisleadingResultWarning, match="too good"):
        evaluate(fitted, folder, [far], tmp_path / "out", trivial_baselines=False)
    with pytest.warns(MisleadingResultWarning, match="not known"):
        Reconstruction(levels=(50,), draws=1).fit(folder, diffusion=model(), alpha=0.1, statistics=30)


def test_a_class_that_cannot_be_found_again_is_not_saved(folder: Path, tmp_path: Path) -> None:
    control = TrivialBaselines().fit(folder, alpha=0.1, statistics=20)
    with pytest.raises(FaroutError, match="not saved"):
        control.save(tmp_path / "c")


def test_sizes_that_an_autoencoder_cannot_divide() -> None:
    network, images = latent((10, 14), halvings=2), torch.rand(2, 1, 10, 14)
    assert network.encode(images).shape[1:] == network.shape
    assert network.decode(network.encode(images)).shape == images.shape
