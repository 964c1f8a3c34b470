"""Reconstructions of the source images of edited outliers, for classifiers that are trained with both."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor

from farout import SONA, SDEdit, open_source
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.train import train_classifier
from farout.cli import main
from farout.core.errors import FaroutError, StoreError
from farout.core.runtime import Runtime
from farout.diffusion.denoiser import ClampedDenoiser
from farout.diffusion.model import DiffusionModel
from farout.synthesis.base import OutlierFolder
from farout.synthesis.editing.base import EditedBatch, EditingContext, EditingSynthesizer, NoisedBatch
from farout.synthesis.reconstruct import ReconstructedFolder
from farout.training.loop import TrainingConfig
from small import autoencoder, classifier, conditional, in_order, pictures, two_classes
from tolerances import GRAY_LEVELS, SONA_SHARE, assert_same_images, assert_same_manifests, assert_same_pixels

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        r"ignore:the (diffusion model|classifier) knows 3 classes \(c, d, e\):"
        "farout.core.errors.MisleadingResultWarning"
    ),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of a and three of b; the generator knows c, d and e as well."""
    return two_classes(tmp_path_factory.mktemp("images") / "labelled")


def synthesize(
    images: Any, out: Path, method: EditingSynthesizer | None = None, *, size: int = 64, **settings: Any
) -> OutlierFolder:
    runtime = Runtime(device="cpu", precision="fp32", batch_size=size, workers=0)
    given = {"count": 20, "diffusion": conditional(classes=5), "runtime": runtime, **settings}
    return (method or SONA(steps=6, reconstructions=True)).synthesize(images, out, **given)


def again(folder: OutlierFolder) -> ReconstructedFolder:
    return ReconstructedFolder(folder.folder / "reconstructions", 0, 0, 0)


def files(folder: Path) -> dict[str, bytes]:
    """Without `config.json`, which contains the command."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


class Back(EditingSynthesizer):
    """The expected reconstructions: denoised under the image's own class, without guidance."""

    def denoise(self, editing: EditingContext, batch: NoisedBatch, indices: Sequence[int]) -> EditedBatch:
        limits = editing.clip_range
        denoiser = editing.denoiser if limits is None else ClampedDenoiser(editing.denoiser, *limits)
        return EditedBatch(
            editing.solver(denoiser, batch.x, batch.sigmas, batch.class_condition), [None] * len(indices)
        )


def test_every_image_is_reconstructed_once(images: Path, tmp_path: Path) -> None:
    folder = synthesize(images, tmp_path / "o")
    outliers, found = folder.manifest(), again(folder).manifest()
    source = open_source(images)
    assert found.columns[:8].tolist() == [
        *("key", "source", "label", "class_name", "seed", "index", "level", "source_hash")
    ]
    same = ["key", "source", "label", "class_name", "seed", "index", "source_hash"]
    pd.testing.assert_frame_equal(found[same], outliers[same][:8])
    assert sorted(found["source"]) == sorted(source.keys)
    middle = outliers["level"][outliers["k"] == 3].iloc[0]
    assert found["level"].tolist() == [min(level, middle) for level in outliers["level"][:8]]
    assert sorted(again(folder).source().keys) == sorted(found["key"])
    assert again(folder).settings()["method"] == "sona"


@pytest.mark.parametrize("clip", [True, False])
def test_reconstructions_use_the_noise_of_the_outlier_and_their_own_class(
    images: Path, tmp_path: Path, clip: bool
) -> None:
    settings: dict[str, Any] = {"steps": 6, "clip": clip}
    folder = synthesize(images, tmp_path / "o", SONA(k_max=3, reconstructions=True, **settings), count=8)
    plain = synthesize(images, tmp_path / "p", Back(k_max=3, **settings), count=8)
    assert_same_pixels(in_order(again(folder)), in_order(plain))
    assert int((in_order(folder).int() - in_order(plain).int()).abs().max()) > GRAY_LEVELS
    # from higher than half of the steps a new image would result
    high = synthesize(images, tmp_path / "q", SDEdit(k_min=6, k_max=6, reconstructions=True, **settings), count=8)
    middle = synthesize(images, tmp_path / "r", Back(k_min=3, k_max=3, **settings), count=8)
    assert_same_pixels(in_order(again(high)), in_order(middle))


def test_an_autoencoder_decodes_the_latents_that_outliers_start_from(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = conditional(classes=5, autoencoder=autoencoder(latent=1))
    clean, original = [], DiffusionModel.encode

    def encode(self: DiffusionModel, images: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        clean.append(original(self, images, noise))
        return clean[-1]

    monkeypatch.setattr(DiffusionModel, "encode", encode)
    folder = synthesize(images, tmp_path / "o", count=8, diffusion=model)
    monkeypatch.undo()
    (x0,) = clean
    assert_same_pixels(in_order(again(folder)), (model.decode(x0) * 255).round().byte())
    assert again(folder).manifest()["level"].tolist() == [0.0] * 8


@pytest.mark.parametrize("method", [SONA, SDEdit])
def test_outliers_are_the_same_with_and_without_reconstructions(
    images: Path, tmp_path: Path, method: type[EditingSynthesizer]
) -> None:
    settings: dict[str, Any] = {"classifier": classifier(classes=5)}
    settings["classifier"].class_names = tuple("abcde")
    how = {"steps": 6, "reject": 0.3, "attempts": 3}
    plain = synthesize(images, tmp_path / "a", method(**how), **settings)
    both = synthesize(images, tmp_path / "b", method(**how, reconstructions=True), **settings)
    assert (tmp_path / "a" / "manifest.csv").read_bytes() == (tmp_path / "b" / "manifest.csv").read_bytes()
    assert plain.manifest()["attempt"].max() > 0
    assert files(tmp_path / "a" / "images") == files(tmp_path / "b" / "images")
    assert not (tmp_path / "a" / "reconstructions").exists()
    assert both.images == 20
    # rejected outliers are generated again, their reconstructions are not
    free = synthesize(images, tmp_path / "c", method(steps=6, reconstructions=True))
    assert_same_images(again(free).folder, again(both).folder)
    assert_same_manifests(again(free).folder, again(both).folder)


def test_interruptions_and_lost_images_change_no_bytes(images: Path, tmp_path: Path) -> None:
    whole = synthesize(images, tmp_path / "whole", size=3)
    calls, original = [], SONA.generate

    def stops(self: SONA, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SONA, "generate", stops)
        with pytest.raises(KeyboardInterrupt):
            synthesize(images, tmp_path / "s", size=3)
    (tmp_path / "s" / "images" / "a" / "000000.png").unlink()
    (tmp_path / "s" / "reconstructions" / "images" / "b" / "000001.png").unlink()
    done = synthesize(images, tmp_path / "s", size=3, resume=True, count=6)
    assert (done.images, done.generated) == (6, 1)
    (tmp_path / "s" / "reconstructions" / "images" / "b" / "000001.png").unlink()
    done = synthesize(images, tmp_path / "s", size=3, resume=True)
    assert (done.images, done.generated) == (20, 14)
    assert files(done.folder) == files(whole.folder)
    assert synthesize(images, tmp_path / "s", resume=True).generated == 0


def test_any_batch_size_gives_the_same_images(images: Path, tmp_path: Path) -> None:
    """Up to rounding, also if the batch size of a resumed run changes."""
    whole = synthesize(images, tmp_path / "whole")
    synthesize(images, tmp_path / "s", size=7, count=9)
    done = synthesize(images, tmp_path / "s", size=5, resume=True)
    assert (done.images, done.generated) == (20, 11)
    assert_same_images(again(done).folder, again(whole).folder)
    assert_same_images(done.folder, whole.folder, SONA_SHARE)
    for one, two in ((done.folder, whole.folder), (again(done).folder, again(whole).folder)):
        assert_same_manifests(one, two)


def test_a_classifier_is_trained_with_both_folders(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        pictures(tmp_path / "good" / name, 14, low=100 * number, seed=number)
    folder = synthesize(tmp_path / "good", tmp_path / "o", count=28)
    few = TrainingConfig(steps=3, batch_size=8, warmup=0, ema=None, device="cpu", precision="fp32")
    settings: dict[str, Any] = {"training": few, "alpha": 0.2, "statistics": 5}
    config = ClassifierConfig(network="wrn16_1", crop_padding=0, flip=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learnt = train_classifier(
            str(tmp_path / "good"),
            tmp_path / "c",
            model=config,
            outliers=str(folder.folder),
            reconstructions=str(again(folder).folder),
            **settings,
        )
    assert set(learnt.class_names) == set("ab")
    # reconstructions of held-out images are not used
    assert 0 < learnt.provenance["reconstructions"]["images"] < 28


def test_solvers_that_cannot_reconstruct_are_refused(images: Path, tmp_path: Path) -> None:
    method = SDEdit(solver="pndm4", steps=6, k_min=5, k_max=5, reconstructions=True)
    with pytest.raises(FaroutError, match="warms up"):
        synthesize(images, tmp_path / "o", method)
    assert not (tmp_path / "o").exists()


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditional(classes=5).save(tmp_path / "model")
    words = ["synthesize", "sdedit", str(images), "--diffusion", str(tmp_path / "model"), "--steps", "3"]
    words += ["--count", "4", "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main([*words, "--reconstructions"]) == 0, capsys.readouterr().err
    assert str(tmp_path / "o" / "reconstructions") in capsys.readouterr().out
    assert len(list((tmp_path / "o" / "reconstructions" / "images").rglob("*.png"))) == 4
    assert main([*words, "--resume"]) == 1
    assert "reconstructions: True before, False now" in capsys.readouterr().err
    with pytest.raises(StoreError, match="reconstructions: True before"):
        synthesize(images, tmp_path / "o", SDEdit(steps=3), count=4, resume=True)
