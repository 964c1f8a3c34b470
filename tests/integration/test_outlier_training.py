"""Classifiers that learn from outliers: kernels, cycling, exact resume, whole chains, refusals, the command."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from farout.classifiers import train as rooms
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.classifiers.networks import OUTLIER
from farout.classifiers.outlier_exposure import ExposedNetwork, Exposure, ExposureData, count_known_classes
from farout.classifiers.outlier_images import ExposedImages, OutlierImages, check_outliers, open_outliers
from farout.classifiers.presets import PRESETS
from farout.classifiers.train import train_classifier, train_on_source
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, SourceError
from farout.data.batching import PreparedImages
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from farout.detectors.denoising import Denoising
from farout.detectors.posthoc import Posthoc
from farout.evaluation.metrics import auroc, fpr95
from farout.evaluation.ood_subsets import average_over_subsets
from farout.synthesis.generator_check import classifier_indices
from farout.training.loop import TrainingConfig
from small import conditional, pictures

CONFIG = ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False)
FEW = TrainingConfig(
    steps=4, batch_size=8, optimizer="sgd", learning_rate=0.1, warmup=0, ema=None, device="cpu", precision="fp32"
)
VOS = Exposure(loss="vos", queue=4, draws=50, start_fraction=0.25)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("tree") / "classes"
    for number, (name, low) in enumerate([("dark", 0), ("light", 190)]):
        pictures(folder / name, 40, low=low, spread=60, seed=number)
    return folder


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures as bright as those of the classes, with another order of pixels."""
    return ordered(tmp_path_factory.mktemp("outliers") / "images", 11)


def ordered(folder: Path, count: int, seed: int = 5) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        pixels = torch.rand(8, 8, generator=generator).sort(1)[0] * 60 + 190 * (index % 2)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index:03d}.png")
    return folder


def train_tiny(source: object, out: Path, **settings: object) -> Classifier:
    given = {"model": CONFIG, "training": FEW, "alpha": 0.1, "statistics": 10, **settings}
    return train_classifier(source, out, **given)


def same(one: Classifier, two: Classifier) -> bool:
    other = two.module.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.module.state_dict().items())


# outliers next to images


def test_large_outliers_are_shrunk_by_the_chosen_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    large = open_source((torch.rand(1, 3, 32, 32, generator=generator) * 255).byte())
    how = Preprocessing(size=(8, 8), channels=3, native=(8, 8))
    picture = Image.fromarray(large[0].permute(1, 2, 0).numpy())
    expected = {
        kernel: torch.from_numpy(np.array(picture.resize((8, 8), Image.Resampling[kernel.upper()]))).permute(2, 0, 1)
        for kernel in ("nearest", "bilinear", "bicubic")
    }
    for kernel, pixels in expected.items():
        assert torch.equal((OutlierImages(large, how, kernel)[0] * 255).round().byte(), pixels)
    assert torch.equal(PreparedImages(large, how)[0], OutlierImages(large, how, "bicubic")[0])
    torch.manual_seed(0)
    both = OutlierImages(large, how)
    seen = [(both[0] * 255).round().byte() for _ in range(40)]
    nearest = sum(torch.equal(each, expected["nearest"]) for each in seen)
    assert nearest + sum(torch.equal(each, expected["bilinear"]) for each in seen) == 40
    assert 8 < nearest < 32


def test_outliers_that_are_not_larger_are_prepared_as_images_are() -> None:
    generator = torch.Generator().manual_seed(0)
    how = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    for side in (8, 5):
        small = open_source((torch.rand(1, 1, side, side, generator=generator) * 255).byte())
        for kernel in ("nearest", "bilinear", "both"):
            assert torch.equal(OutlierImages(small, how, kernel)[0], PreparedImages(small, how)[0])


def test_what_does_not_fit_into_memory_is_prepared_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    large = open_source((torch.rand(3, 1, 16, 16) * 255).byte())
    how = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    kept = OutlierImages(large, how)
    monkeypatch.setattr("farout.classifiers.outlier_images._MEMORY_LIMIT", 0)
    fresh = OutlierImages(large, how)
    for index in range(3):
        torch.manual_seed(index)
        one = kept[index]
        torch.manual_seed(index)
        assert torch.equal(one, fresh[index])


def test_outliers_are_cycled_however_few(tree: Path, outliers: Path) -> None:
    source = open_source(tree)
    how = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    few = open_source(outliers)
    assert source.labels is not None
    labels = torch.tensor(source.labels)
    pairs = torch.utils.data.TensorDataset(torch.stack([PreparedImages(source, how)[i] for i in range(80)]), labels)
    both = ExposedImages(pairs, 0, OutlierImages(few, how))
    assert len(both) == 80
    names = {tuple(OutlierImages(few, how)[i].flatten().tolist()): i for i in range(11)}
    seen = [names[tuple(both.item_at(position, position % 80)[2].flatten().tolist())] for position in range(110)]
    for start in range(0, 110, 11):
        assert sorted(seen[start : start + 11]) == list(range(11))
    assert seen[:11] != seen[11:22]
    assert torch.equal(both.item_at(95, 15)[0], pairs[15][0])
    other = ExposedImages(pairs, 1, OutlierImages(few, how))
    assert [names[tuple(other.item_at(p, 0)[2].flatten().tolist())] for p in range(11)] != seen[:11]


def test_reconstructions_take_the_place_of_a_share_of_the_images(tree: Path, outliers: Path, tmp_path: Path) -> None:
    for number, (name, low) in enumerate([("light", 190), ("dark", 0)]):
        pictures(tmp_path / "again" / name, 7, low=low, spread=60, seed=10 + number)
    source, again = open_source(tree), open_source(tmp_path / "again")
    how = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    assert source.labels is not None
    pairs = torch.utils.data.TensorDataset(torch.zeros(80, 1, 8, 8), torch.tensor(source.labels))
    exposure_data = ExposureData(Exposure(reconstruction_fraction=0.25), open_source(outliers), again)
    both = exposure_data.combine_with(pairs, ("dark", "light"), (), how, 0)
    torch.manual_seed(0)
    items = [both.item_at(position, position % 80) for position in range(400)]
    reconstructed = [item for item in items if bool(item[0].any())]
    assert 70 < len(reconstructed) < 130
    assert all(int(label) == int(image.mean() > 0.5) for image, label, _ in reconstructed)


# training


@pytest.mark.parametrize("exposure", [Exposure(), Exposure(loss="k+1"), VOS], ids=["energy", "k+1", "vos"])
def test_training_repeats_and_resumes_exactly(
    tree: Path, outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exposure: Exposure
) -> None:
    source = open_source(tree)
    outer = None if exposure.loss == "vos" else open_source(outliers)
    training = replace(FEW, ema=0.5)
    whole = train_on_source(source, CONFIG, training, exposure_data=ExposureData(exposure, outer))
    assert same(
        whole,
        train_on_source(source, CONFIG, replace(training, workers=1), exposure_data=ExposureData(exposure, outer)),
    )
    other = train_on_source(source, CONFIG, replace(training, seed=1), exposure_data=ExposureData(exposure, outer))
    assert not same(whole, other)
    original, calls = ExposedNetwork.losses, 0

    def stops(self: ExposedNetwork, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = original(self, *given)
        if calls == 3:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(ExposedNetwork, "losses", stops)
    with pytest.raises(KeyboardInterrupt):
        train_on_source(source, CONFIG, training, out=tmp_path / "t", exposure_data=ExposureData(exposure, outer))
    monkeypatch.undo()
    again = train_on_source(
        source, CONFIG, training, out=tmp_path / "t", resume=True, exposure_data=ExposureData(exposure, outer)
    )
    assert same(whole, again)


@pytest.mark.parametrize("loss", ["energy", "oe", "k+1", "vos"])
def test_training_in_low_precision(tree: Path, outliers: Path, loss: str) -> None:
    exposure = replace(VOS, start_fraction=0.0, queue=2) if loss == "vos" else Exposure(loss=loss)
    outer = None if loss == "vos" else open_source(outliers)
    clf = train_on_source(
        open_source(tree), CONFIG, replace(FEW, precision="bf16"), exposure_data=ExposureData(exposure, outer)
    )
    assert all(bool(value.isfinite().all()) for value in clf.module.state_dict().values())


def test_a_run_resumes_with_the_same_outliers_only(tree: Path, outliers: Path, tmp_path: Path) -> None:
    source, outer = open_source(tree), open_source(outliers)
    kept = replace(FEW, checkpoint_every=2)
    train_on_source(source, CONFIG, kept, out=tmp_path / "t", exposure_data=ExposureData(outliers=outer))
    for exposure, given in [(Exposure(), outer.subset(range(5))), (Exposure(weight=2.0), outer)]:
        with pytest.raises(FaroutError, match="fingerprint"):
            train_on_source(
                source, CONFIG, kept, out=tmp_path / "t", resume=True, exposure_data=ExposureData(exposure, given)
            )


def test_the_folder_is_of_the_network_alone_and_tells_of_the_outliers(
    tree: Path, outliers: Path, tmp_path: Path
) -> None:
    clf = train_tiny(tree, tmp_path / "c", outliers=str(outliers), exposure=Exposure(limit=7))
    loaded = Classifier.load(tmp_path / "c")
    assert loaded.content_hash == clf.content_hash
    about = json.loads((tmp_path / "c" / "config.json").read_text())["provenance"]
    assert (about["exposure"]["loss"], about["exposure"]["weight"], about["outliers"]["images"]) == ("energy", 1.0, 7)
    sampled = open_outliers(str(outliers), limit=7)
    assert about["outliers"]["data_fingerprint"] == sampled.fingerprint()
    assert not loaded.trained_on & set(sampled.content_hashes())
    plain = train_tiny(tree, tmp_path / "plain")
    assert "exposure" not in plain.provenance
    assert plain.trained_on == clf.trained_on


def test_reconstructions_count_as_seen(tree: Path, outliers: Path, tmp_path: Path) -> None:
    for name, low in [("dark", 0), ("light", 190)]:
        pictures(tmp_path / "again" / name, 3, low=low, spread=60, seed=low + 7)
    clf = train_tiny(tree, tmp_path / "c", outliers=str(outliers), reconstructions=str(tmp_path / "again"))
    assert set(open_source(tmp_path / "again").content_hashes()) <= clf.trained_on
    assert clf.provenance["reconstructions"]["images"] == 6
    # and without outliers, as more images of the classes
    more = train_tiny(tree, tmp_path / "d", reconstructions=str(tmp_path / "again"))
    assert more.provenance["exposure"]["loss"] == "cross_entropy"


def test_fewer_outliers_than_a_batch_serve_training_and_validation(tree: Path, outliers: Path) -> None:
    few = open_source(outliers).subset([0, 1])
    training = replace(FEW, validate_every=2, accumulate=2)
    clf = train_on_source(
        open_source(tree), CONFIG, training, exposure_data=ExposureData(Exposure(start_fraction=0.5), few)
    )
    assert clf.provenance["outliers"]["images"] == 2


def test_a_folder_that_a_synthesizer_made(outliers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"farout": {"kind": "outliers"}}))
    Image.new("L", (8, 8)).save(folder / "preview.png")
    for path in outliers.iterdir():
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    assert len(open_outliers(str(folder))) == len(open_source(folder)) == 11
    (folder / "config.json").write_text("[]")
    assert len(open_source(folder)) == 12, "of another program"


@pytest.mark.slow
def test_the_energy_of_a_classifier_that_learnt_outliers_tells_them_apart(tree: Path, tmp_path: Path) -> None:
    """The whole chain, on outliers that training has not seen."""
    new, seen = ordered(tmp_path / "new", 60, seed=9), str(ordered(tmp_path / "seen", 60, seed=8))
    fresh = tmp_path / "fresh"
    for number, (name, low) in enumerate([("dark", 0), ("light", 190)]):
        pictures(fresh / name, 30, low=low, spread=60, seed=20 + number)
    training = replace(FEW, steps=80, batch_size=16)
    found = {}
    for name, exposure, outer in [
        ("plain", Exposure(), None),
        ("energy", Exposure(), seen),
        ("k+1", Exposure(loss="k+1"), seen),
    ]:
        clf = train_tiny(tree, tmp_path / name, training=training, exposure=exposure, outliers=outer)
        assert clf.provenance["held_out_accuracy"] > 0.8
        score = "extra" if name == "k+1" else "energy"
        detector = Posthoc(score=score).fit(str(tree), None, tmp_path / name, alpha=0.1, statistics=10)
        found[name] = auroc(detector.score(str(fresh)).score, detector.score(str(new)).score)
    assert found["energy"] > found["plain"] + 0.1
    assert min(found["energy"], found["k+1"]) > 0.9


def test_one_class_more_is_kept_and_left_out_of_the_other_scores(tree: Path, outliers: Path, tmp_path: Path) -> None:
    clf = train_tiny(tree, tmp_path / "c", outliers=str(outliers), exposure=Exposure(loss="k+1"))
    loaded = Classifier.load(tmp_path / "c")
    assert loaded.class_names == ("dark", "light", OUTLIER)
    assert (loaded.classes, count_known_classes(loaded)) == (3, 2)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "- classes: dark, light; one more, the last, is of outliers\n" in card
    with pytest.raises(FaroutError, match=r"does not know gray; it knows dark, light$"):
        classifier_indices(loaded, ["gray"])
    with pytest.raises(FaroutError, match=r"2 classes, the classifier 2 classes and one of outliers"):
        Denoising().check_networks(open_source(tree), conditional(classes=2), clf)
    loaded.class_names = ("0", "1", OUTLIER)
    assert classifier_indices(loaded, ["dark", "light"]) == [0, 1], "bare numbers are in order"
    images = torch.stack([PreparedImages(open_source(tree), clf.preprocessing)[i] for i in range(3)])
    logits = loaded.outputs(images).logits.double()
    detector = Posthoc(score="energy", odin=True).fit(str(tree), None, tmp_path / "c", alpha=0.1, statistics=10)
    detector.save(tmp_path / "p")
    scores = detector.score(images)
    torch.testing.assert_close(torch.from_numpy(scores.score), -logits[:, :2].logsumexp(1), rtol=1e-4, atol=1e-4)
    extra = torch.tensor(scores.indicators["extra"])
    torch.testing.assert_close(extra, logits[:, 2] - logits[:, :2].logsumexp(1), rtol=1e-4, atol=1e-4)
    train_tiny(tree, tmp_path / "plain")
    with pytest.raises(FaroutError, match="no class of outliers"):
        Posthoc(score="extra").fit(str(tree), None, tmp_path / "plain", alpha=0.1, statistics=10)


def test_the_cards_recipes() -> None:
    assert set(PRESETS) >= {"ncis_tiny", "ncis_cifar100", "ncis_imagenet100", "vos"}
    for preset in PRESETS.values():
        ClassifierConfig(**preset["model"])
        TrainingConfig(**preset["training"])
        Exposure(**preset.get("exposure", {}))
    cifar, large = PRESETS["ncis_cifar100"], PRESETS["ncis_imagenet100"]
    assert cifar["training"]["steps"] == 250 * 196
    assert (cifar["training"]["batch_size"], large["training"]["batch_size"]) == (256, 80)
    assert cifar["model"]["network"] == large["model"]["network"] == "resnet34"
    assert (cifar["exposure"]["limit"], large["exposure"]["hidden"]) == (6400, 512)
    assert cifar["model"]["mean"] == pytest.approx([v / 255 for v in (125.3, 123.0, 113.9)], abs=5e-5)
    assert cifar["model"]["std"] == pytest.approx([v / 255 for v in (63.0, 62.1, 66.7)], abs=5e-5)
    assert Exposure(loss="vos").resolve_defaults(False) == Exposure(**PRESETS["vos"]["exposure"])


# refusals


def never(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


def test_wrong_input_is_refused_before_any_work(
    tree: Path, outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "train", never)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, object], str]] = [
        ({"exposure": Exposure(loss="energy")}, "give some .* --outliers FOLDER"),
        ({"exposure": VOS, "outliers": str(outliers)}, "vos does not use outliers"),
        ({"exposure": Exposure(loss="cross_entropy"), "outliers": str(outliers)}, "does not use outliers"),
        ({"outliers": str(tmp_path / "missing")}, "missing"),
        ({"outliers": str(tmp_path / "empty")}, "empty"),
        ({"outliers": str(tree)}, "images of .* are among the training images"),
        ({"outliers": str(outliers), "reconstructions": str(outliers)}, "labels|images of"),
        ({"outliers": str(outliers), "weights": "x.pt", "keep_weights": True}, "kept weights are not trained"),
    ]
    for settings, message in cases:
        with pytest.raises(FaroutError, match=message):
            train_tiny(tree, tmp_path / "c", **settings)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "preset",
    [name if name == "ncis_imagenet100" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_a_preset_with_another_loss(
    preset: str, tree: Path, outliers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preset says of its own loss is left aside, what the words say of it is refused."""
    seen: list[Exposure] = []

    def stops(source: object, model: object, training: object, *, exposure_data: ExposureData, **given: object) -> None:
        seen.append(exposure_data.exposure)
        raise FaroutError("stopped")

    monkeypatch.setattr(rooms, "train_on_source", stops)
    words = ["train", "classifier", str(tree), "--alpha", "0.1", "--statistics", "10", "--out", "never"]
    outer = ["--outliers", str(outliers)]
    for loss, more in [("oe", outer), ("k+1", outer), ("sona", outer), ("vos", []), ("cross_entropy", [])]:
        main([*words, "--preset", preset, "--loss", loss, *more])
        assert "stopped" in capsys.readouterr().err
        assert seen[-1].loss == loss
        assert seen[-1].hidden == (512 if (preset, loss) == ("ncis_imagenet100", "vos") else 0)
    main([*words, *outer, "--preset", "ncis_cifar100", "--loss", "oe"])
    assert seen[-1].limit == 6400, "which oe looks at too"
    assert main([*words, *outer, "--preset", "ncis_imagenet100", "--loss", "oe", "--exposure.hidden", "512"]) == 1
    assert "hidden is 512, and the loss oe does not use it" in capsys.readouterr().err


def test_unreadable_outliers_follow_the_policy(outliers: Path, tmp_path: Path) -> None:
    for path in list(outliers.iterdir())[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(FaroutError, match=r"bad\.png"):
        open_outliers(str(tmp_path))
    assert len(open_outliers(str(tmp_path), policy="skip")) == 3
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "bad.png").write_text("not a picture")
    with pytest.raises(SourceError, match="none of the 1 images"):
        open_outliers(str(tmp_path / "all"), policy="skip")


def test_outliers_of_other_channels_are_converted_and_gray_ones_warned_of(outliers: Path) -> None:
    gray = open_source(outliers)
    how = Preprocessing(size=(8, 8), channels=3, native=(8, 8))
    with pytest.warns(MisleadingResultWarning, match="11 of 11 sampled outliers .* are gray"):
        check_outliers(gray, (), how)
    assert OutlierImages(gray, how)[0].shape == (3, 8, 8)
    color = open_source((torch.rand(2, 3, 8, 8) * 255).byte())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_outliers(color, (), how)
    assert OutlierImages(color, replace(how, channels=1))[0].shape == (1, 8, 8)


# the command line


def test_the_command(tree: Path, outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "classifier", str(tree), "--device", "cpu", "--alpha", "0.1", "--statistics", "10"]
    words += ["--training.steps", "3", "--batch-size", "8", "--training.warmup", "0"]
    outer = ["--outliers", str(outliers)]
    for name, more, loss in [
        ("default", outer, "energy"),
        ("oe", [*outer, "--loss", "oe", "--exposure.weight", "0.3"], "oe"),
        ("more", [*outer, "--loss=k+1"], "k+1"),
        ("vos", ["--loss", "vos", "--exposure.queue", "2", "--exposure.start-fraction", "0"], "vos"),
        ("preset", [*outer, "--preset", "ncis_tiny", "--exposure.hidden", "4"], "energy"),
    ]:
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
        assert Classifier.load(tmp_path / name).provenance["exposure"]["loss"] == loss
        printed = capsys.readouterr().out
        assert (f"11 outliers from {outliers}, loss {loss}" in printed) == (loss != "vos")
        assert f", 2 classes{' and one of outliers' * (loss == 'k+1')} (" in printed
    assert main([*words, "--loss", "energy", "--out", str(tmp_path / "x")]) == 1
    assert "--outliers FOLDER" in capsys.readouterr().err
    assert main([*words, "--loss", "enrgy", "--out", str(tmp_path / "x")]) == 2
    assert "--exposure.loss must be energy or oe or k+1 or vos" in capsys.readouterr().err


def test_a_fit_cannot_train_a_classifier_that_wants_outliers(tree: Path) -> None:
    with pytest.raises(FaroutError, match="requires outlier images"):
        Posthoc().fit(str(tree), None, None, alpha=0.1, statistics=10, classifier_preset="ncis_tiny")


# the papers' protocol


def test_metrics_over_draws_are_means_of_the_metrics_of_each_draw() -> None:
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(0, 1, 50), np.r_[generator.normal(1, 1, 40), np.nan]
    found = average_over_subsets(inside, outside, 60, seed=3)
    assert (found["n_id"], found["n_ood"], found["draws"]) == (50, 10, 60)
    assert found["auroc"] == pytest.approx(auroc(inside, outside[:-1]), abs=0.02)
    assert 0 < found["auroc_std"] < 0.1
    assert average_over_subsets(inside, outside, 60, seed=3) == found
    assert average_over_subsets(inside, outside, 60, seed=4) != found
    # where there are fewer, every draw is of all
    few = average_over_subsets(inside, outside[:6], 2)
    assert (few["n_ood"], few["fpr95_std"]) == (6, 0)
    assert few["fpr95"] == fpr95(inside, outside[:6])
    assert np.isnan(average_over_subsets(inside, [np.nan], 2)["auroc"])
    with pytest.raises(FaroutError, match="draws is 0"):
        average_over_subsets(inside, outside, 0)


@pytest.mark.slow
def test_evaluate_writes_draws(tree: Path, outliers: Path, tmp_path: Path) -> None:
    train_tiny(tree, tmp_path / "c", outliers=str(outliers))
    detector = Posthoc().fit(str(tree), None, tmp_path / "c", alpha=0.1, statistics=10)
    detector.save(tmp_path / "p")
    words = ["evaluate", str(tmp_path / "p"), "--id", str(tree), "--ood", str(outliers), "--out", str(tmp_path / "e")]
    assert main([*words, "--ood-subsets", "3", "--no-trivial-baselines", "--no-standard-baselines"]) == 0
    table = pd.read_csv(tmp_path / "e" / "subsets.csv")
    assert set(table.indicator) >= {"score", "energy", "msp"}
    assert set(table.draws) == {3}
    assert table.auroc.between(0, 1).all()


def test_folders_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    """Outliers learnt as images of the classes, or the reverse, would be the worst of mistakes."""
    for kind in ("outliers", "reconstructions"):
        pictures(tmp_path / kind / "images" / "a", 2)
        (tmp_path / kind / "config.json").write_text(json.dumps({"farout": {"kind": kind}}))
    assert len(open_outliers(tmp_path / "outliers")) == 2
    assert len(open_outliers(tmp_path / "reconstructions" / "images", kind="reconstructions")) == 2
    for given in (tmp_path / "reconstructions" / "images", f"{tmp_path / 'reconstructions'}@vflip"):
        with pytest.raises(SourceError, match="contains reconstructions, but outliers are expected"):
            open_outliers(given)
    with pytest.raises(SourceError, match="contains outliers, but reconstructions are expected"):
        open_outliers(tmp_path / "outliers", kind="reconstructions")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(json.dumps({"farout": {"kind": "outliers"}}))
    with pytest.raises(SourceError, match="contains no image yet"):
        open_outliers(tmp_path / "begun")
