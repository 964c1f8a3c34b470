"""Images made again: exact on Gaussian data, the same for any batch, taken as they are by what they are made for."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from farout import Classifier, Posthoc, open_source, reconstruct
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.train import train_classifier
from farout.cli import main
from farout.core.errors import FaroutError, SourceError, StoreError, UnreadableImageError
from farout.core.runtime import Runtime
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.denoiser import GaussianDenoiser
from farout.diffusion.image_to_image import ImageToImage
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import seeded_generator
from farout.diffusion.solvers.registry import SOLVERS
from farout.evaluation.evaluate import evaluate
from farout.synthesis.reconstruct import ReconstructedFolder
from farout.training.loop import TrainingConfig
from small import conditional, latent, model, pictures, tiny_unet
from tolerances import assert_close, assert_same_images, assert_same_manifests, assert_same_pixels

pytestmark = pytest.mark.numerics

CPU = Runtime(device="cpu", precision="fp32", workers=0)
NAMES = ("T-shirt/top", "..", "Größe 3.5 μ")
"""None of them can be a folder's name everywhere."""


def named() -> DiffusionModel:
    """Knows classes whose names no folder can have."""
    unet, plain = tiny_unet(classes=3), model()
    table = ClassVectors(unet, NAMES, has_null=True)
    return DiffusionModel(unet, plain.schedule, plain.preprocessing, conditioning=table)


def labelled(folder: Path, count: int, seed: int = 0) -> Path:
    """A table of images whose classes are called as those of `named`, brighter from class to class."""
    lines = ["path,label"]
    for number, name in enumerate(NAMES):
        pictures(folder / str(number), count, low=60 * number, spread=60, seed=10 * seed + number)
        lines += [f"{number}/{index:03d}.png,{name}" for index in range(count)]
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "table.csv"


def made(source: Any, out: Path, network: DiffusionModel | None = None, **settings: Any) -> ReconstructedFolder:
    given: dict[str, Any] = {"steps": 3, "runtime": CPU, **settings}
    return reconstruct(source, network or conditional(), out, **given)


def files(folder: Path) -> dict[str, bytes]:
    """Images and manifest."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    return {**found, "manifest.csv": (folder / "manifest.csv").read_bytes()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        pictures(tmp_path / "labelled" / name, 4, low=20 + 60 * number, seed=number)
    return tmp_path / "labelled"


# -- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "dpm_solver_2m", "probability_flow"])
def test_gaussian_images_come_back_along_the_exact_flow(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of variance v, an image at level t flows to mean + sqrt((v + s^2) / (v + sigma^2)) (x - mean) at the smallest
    level s, whose expected clean value is the end.
    """
    network, variance = model(data_range=(0.0, 1.0)), 0.01
    mean = torch.full((64,), 0.5)
    monkeypatch.setattr(network, "denoiser", lambda *_: GaussianDenoiser(mean, variance * torch.eye(64)))
    source = (0.5 + 0.1 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    keys = ("x", "y", "z")
    trip = ImageToImage(network, 0.3, solver=solver, steps=None if solver == "probability_flow" else 300, seed=5)
    sigma, least = float(network.schedule.sigma_of(299)), float(network.schedule.sigma[0])
    noise = []
    for key in keys:
        generator = seeded_generator(5, "round trip", key)
        torch.rand((), generator=generator)
        noise.append(torch.randn(1, 8, 8, generator=generator))
    there = source + sigma * torch.stack(noise)
    flow = ((variance + least**2) / (variance + sigma**2)) ** 0.5
    expected = 0.5 + variance / (variance + least**2) * flow * (there - 0.5)
    # an adaptive method tries steps whose ends lie outside what images can be, where estimates are clamped
    allowed = 4e-3 if solver == "probability_flow" else 2e-3
    torch.testing.assert_close(trip(source, keys), expected.clamp(0, 1), atol=allowed, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_method_finds_back(solver: str) -> None:
    steps = None if solver == "probability_flow" else 6
    trip = ImageToImage(model(), 0.2, 0.6, solver=solver, steps=steps, spacing="geometric")
    again = trip(torch.full((3, 1, 8, 8), 0.5), ("x", "y", "z"))
    assert again.shape == (3, 1, 8, 8)
    assert bool(((again >= 0) & (again <= 1)).all())


def test_the_further_the_less_is_left(images: Path) -> None:
    """From near an image comes back nearly as it went; the noise of an image is the same on all levels."""
    network, source = model(), open_source(images)
    pixels = torch.stack([image.float() / 255 for image in source])
    lost = [
        float((ImageToImage(network, level)(pixels, source.keys) - pixels).square().mean())
        for level in (0.001, 0.02, 0.2)
    ]
    assert lost[0] < 1e-3
    assert lost == sorted(lost)


def test_levels_are_drawn_by_seed_and_key() -> None:
    keys = [f"{number}" for number in range(400)]
    levels = torch.tensor(ImageToImage(model(), 0.2, 0.6).image_levels(keys))
    assert 0.2 <= float(levels.min()) < 0.21
    assert 0.59 < float(levels.max()) <= 0.6
    assert float(levels.mean()) == pytest.approx(0.4, abs=0.02)
    assert torch.equal(torch.tensor(ImageToImage(model(), 0.2, 0.6).image_levels(keys[::-1])), levels.flip(0))
    assert ImageToImage(model(), 0.2, 0.6, seed=1).image_levels(keys) != ImageToImage(model(), 0.2, 0.6).image_levels(
        keys
    )
    assert set(ImageToImage(model(), 0.5).image_levels(keys)) == {0.5}


def test_images_go_under_their_own_class_without_guidance() -> None:
    network, pixels = conditional(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trip = ImageToImage(network, 0.5, steps=3)
    own, other = trip(pixels, "xyz", [0, 1, 2]), trip(pixels, "xyz", [0, 2, 2])
    assert_close(own[[0, 2]], other[[0, 2]])
    assert not torch.allclose(own[1], other[1], atol=1e-3)
    none = ImageToImage(network, 0.5, classes=False, steps=3)
    assert not torch.allclose(none(pixels, "xyz"), own, atol=1e-3)
    with pytest.raises(FaroutError, match="requires a label for each, 0 to 2"):
        trip(pixels, "xyz")


def test_level_zero_is_the_autoencoder_alone() -> None:
    network = latent((8, 8), halvings=2, data_range=(0.0, 1.0))
    pixels = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    again = ImageToImage(network, 0.0)(pixels, "vwxyz")
    torch.testing.assert_close(again, network.decode(network.encode(pixels)), atol=1e-5, rtol=0)
    assert not torch.allclose(again, pixels, atol=0.01)
    assert not torch.allclose(again, ImageToImage(network, 0.5)(pixels, "vwxyz"), atol=1e-3)
    assert min(ImageToImage(network, 0.0, 0.5).image_levels([str(n) for n in range(3000)])) >= 0.001
    alone = torch.cat([ImageToImage(network, 0.3)(pixels[i : i + 1], "vwxyz"[i]) for i in range(5)])
    assert_close(alone, ImageToImage(network, 0.3)(pixels, "vwxyz"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": -0.1}, "at least level; got -0.1"),
        ({"level": 0.6, "max_level": 0.5}, "got 0.6 to 0.5"),
        ({"max_level": 1.1}, "got 0.5 to 1.1"),
        ({"level": 0.0}, "no autoencoder"),
        ({"level": 0.0, "max_level": 0.5}, "no autoencoder"),
        ({"steps": 0}, "at least 1 step"),
        ({"spacing": "trailing"}, "even or geometric"),
        ({"solver": "euler"}, "no solver 'euler'"),
        ({"solver": "pndm4", "steps": 2}, "warms up"),
        ({"solver": "pndm4", "level": 0.002, "max_level": 0.5}, "warms up"),
        ({"solver": "probability_flow", "steps": 3}, "chooses its own steps"),
    ],
)
def test_what_cannot_work_is_refused_at_once(settings: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(FaroutError, match=message):
        made(images, images.parent / "o", **{"steps": None, **settings})
    assert not (images.parent / "o").exists()


# -- folders --------------------------------------------------------------------------------------------------------


def test_labels_and_keys_are_kept(images: Path, tmp_path: Path) -> None:
    done = made(images, tmp_path / "o", level=0.3, max_level=0.5)
    source, manifest, before = done.source(), done.manifest(), open_source(images)
    assert (done.images, done.requested, done.generated) == (12, 12, 12)
    assert manifest["source"].tolist() == list(before.keys)
    assert manifest["source_hash"].tolist() == list(before.content_hashes())
    assert manifest["class_name"].tolist() == list("aaaabbbbcccc")
    assert manifest["level"].between(0.3, 0.5).all()
    assert manifest["level"].nunique() > 6
    assert manifest["steps"].tolist() == [3] * 12
    assert sorted(manifest["key"]) == sorted(source.keys)
    assert [source.class_names[label] for label in source.labels] == list("aaaabbbbcccc")
    again = {key: source[place] for place, key in enumerate(source.keys)}
    trip = ImageToImage(conditional(), 0.3, 0.5, steps=3)
    pixels = torch.stack([image.float() / 255 for image in before])
    expected = (trip(pixels, before.content_hashes(), before.labels) * 255).round().byte()
    assert_same_pixels(torch.stack([again[key] for key in manifest["key"]]), expected)


def test_an_interrupted_run_has_the_same_bytes_and_any_batch_the_same_images(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"level": 0.3, "max_level": 0.5}
    few = Runtime(device="cpu", precision="fp32", batch_size=2, workers=0)
    whole = made(images, tmp_path / "whole", runtime=few, **settings)
    large = made(images, tmp_path / "large", **settings)
    assert_same_images(whole.folder, large.folder)
    assert_same_manifests(whole.folder, large.folder)
    calls, original = [], ImageToImage.__call__

    def stops(self: ImageToImage, images: Tensor, keys: Sequence[str], labels: Any = None) -> Tensor:
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images, keys, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageToImage, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            made(images, tmp_path / "s", runtime=few, **settings)
    with pytest.raises(StoreError, match="already contains reconstructions; give --resume"):
        made(images, tmp_path / "s", **settings)
    next((tmp_path / "s" / "images" / "a").glob("*.png")).unlink()
    done = made(images, tmp_path / "s", resume=True, runtime=few, **settings)
    assert (done.images, done.generated) == (12, 9)
    assert files(done.folder) == files(whole.folder)


def test_other_settings_do_not_mix_in(images: Path, tmp_path: Path) -> None:
    made(images, tmp_path / "o")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"level": 0.4}, "level: 0.5 before, 0.4 now"),
        ({"steps": None}, "steps: 3 before, 10 now"),
        ({"classes": False}, "classes: True before, False now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"limit": 5}, "data: "),
        ({"network": conditional(b_scale=2.0)}, "diffusion: "),
    ]
    for settings, message in wrong:
        with pytest.raises(StoreError, match=f"generated with other settings.*{message}"):
            made(images, tmp_path / "o", resume=True, **settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(StoreError, match="not replaced"):
        made(images, tmp_path / "mine")


def test_images_without_labels_lie_in_one_folder(images: Path, tmp_path: Path) -> None:
    done = made(images / "a", tmp_path / "o", model())
    assert sorted(path.name for path in (tmp_path / "o" / "images").iterdir()) == [f"00000{i}.png" for i in range(4)]
    assert done.source().labels is None
    assert done.manifest()["label"].tolist() == [""] * 4
    assert made(images / "a", tmp_path / "p", classes=False).generated == 4
    with pytest.raises(SourceError, match=r"no labels, and each image is denoised under its class.*--no-classes"):
        made(images / "a", tmp_path / "q")


def test_without_classes_the_labels_are_the_sources_own(images: Path, tmp_path: Path) -> None:
    (images / "c").rename(images / "zebra")
    with pytest.raises(SourceError, match="images of zebra"):
        made(images, tmp_path / "o")
    for number, (network, settings) in enumerate(((conditional(), {"classes": False}), (model(), {}))):
        done = made(images, tmp_path / str(number), network, **settings)
        assert set(done.manifest()["class_name"]) == {"a", "b", "zebra"}
        assert set(done.source().class_names or ()) == {"a", "b", "zebra"}


def test_an_unreadable_image_raises_or_is_left_out(images: Path, tmp_path: Path) -> None:
    (images / "a" / "001.png").write_text("not a picture")
    with pytest.raises(UnreadableImageError, match="001"):
        made(images, tmp_path / "o")
    done = made(images, tmp_path / "p", policy="skip")
    assert (done.images, done.requested) == (11, 12)
    assert "a/001.png" not in done.manifest()["source"].tolist()


# -- what they are made for -----------------------------------------------------------------------------------------


FEW = TrainingConfig(
    steps=3, batch_size=8, optimizer="sgd", learning_rate=0.1, warmup=0, ema=None, device="cpu", precision="fp32"
)


def trained(source: Any, out: Path, **settings: Any) -> Classifier:
    config = ClassifierConfig(network="wrn16_1", crop_padding=0, flip=False)
    return train_classifier(source, out, model=config, training=FEW, alpha=0.2, statistics=5, **settings)


@pytest.mark.slow
def test_a_classifier_and_the_probe_take_the_folder_as_it_is(tmp_path: Path) -> None:
    """Classes of any name; and nobody is told that images made again of unseen ones had been seen."""
    good, test = labelled(tmp_path / "good", 12), labelled(tmp_path / "test", 8, seed=1)
    again = made(good, tmp_path / "again", named())
    pictures(tmp_path / "outliers", 9, low=0, spread=255, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = trained(
            good, tmp_path / "c", outliers=str(tmp_path / "outliers"), reconstructions=str(again.folder)
        )
    assert set(classifier.class_names) == set(NAMES)
    assert classifier.provenance["reconstructions"]["images"] > 0
    made(test, tmp_path / "probe", named())
    detector = Posthoc(score="energy").fit(good, None, tmp_path / "c", alpha=0.2, statistics=5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probes = [str(tmp_path / "probe"), str(tmp_path / "probe" / "images")]
        table = evaluate(detector, test, probes, tmp_path / "rated").metrics
    assert not [
        str(each.message) for each in told if "were used to" in str(each.message) or "size" in str(each.message)
    ]
    areas = table[(table.detector == "posthoc") & (table.indicator == "score")].auroc
    assert areas.nunique() == 1
    assert areas.between(0, 1).all()


def test_what_came_of_images_that_are_held_out_is_not_learnt(tmp_path: Path) -> None:
    """Else the figures on them, and the p-values that rest on them, would be of images half seen."""
    good = labelled(tmp_path / "good", 12)
    again = made(good, tmp_path / "again", named())
    alone = trained(good, tmp_path / "alone")
    learnt = alone.trained_on
    assert 0 < len(learnt) < 36
    for given in (again.folder / "images", f"{again.folder}@classes=0-2"):
        classifier = trained(good, tmp_path / "c", reconstructions=str(given))
        assert classifier.provenance["reconstructions"]["images"] == len(learnt)
        assert set(open_source(good).content_hashes()) & classifier.trained_on == learnt
    # what was made of other images makes those seen
    test = labelled(tmp_path / "test", 4, seed=1)
    other = trained(good, tmp_path / "d", reconstructions=str(made(test, tmp_path / "more", named()).folder))
    assert set(open_source(test).content_hashes()) <= other.trained_on
    held = [i for i, content in enumerate(open_source(good).content_hashes()) if content not in learnt]
    few = made(open_source(good).subset(held), tmp_path / "held", named())
    with pytest.raises(FaroutError, match=r"images of .* were generated from held-out images"):
        trained(good, tmp_path / "e", reconstructions=str(few.folder))


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditional().save(tmp_path / "m")
    words = ["reconstruct", str(images), "--diffusion", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    words += ["--steps", "2", "--device", "cpu", "--level", "0.2", "--max-level", "0.4"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "12 reconstructions, 12 new" in printed
    assert "manifest.csv" in printed
    assert main([*words, "--resume"]) == 0
    assert "0 new" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "o" / "manifest.csv")["level"].between(0.2, 0.4).all()
    assert main(words) == 1
    assert "give --resume" in capsys.readouterr().err
    assert main([*words, "--no-classes", "--resume"]) == 1
    assert "classes: True before, False now" in capsys.readouterr().err
    assert main(["reconstruct", str(images), "--out", "o"]) == 2
    assert "missing --diffusion" in capsys.readouterr().err
