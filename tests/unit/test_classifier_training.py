"""Training classifiers: labels, recipes, what is refused before any work, the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from farout.classifiers import train as rooms
from farout.classifiers.losses import CrossEntropy, accuracy
from farout.classifiers.model import Classifier
from farout.classifiers.train import PRESETS, ClassifierConfig, measure_accuracy, train_classifier, train_on_source
from farout.cli import main
from farout.core.errors import FaroutError, StoreError
from farout.data.image_source import ImageSource
from farout.data.sources import open_source
from farout.data.splits import split_source
from farout.training.config import learning_rate
from farout.training.loop import TrainingConfig
from launch import in_two_processes
from small import pictures

CONFIG = ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False)
FEW = TrainingConfig(
    steps=4, batch_size=8, optimizer="sgd", learning_rate=0.1, warmup=0, ema=None, device="cpu", precision="fp32"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("tree") / "classes"
    for number, (name, low) in enumerate([("cat", 0), ("dog", 90), ("eel", 180)]):
        pictures(folder / name, 30, low=low, spread=60, seed=number)
    return folder


def train_tiny(source: object, out: Path, **settings: object) -> Classifier:
    given = {"model": CONFIG, "training": FEW, "alpha": 0.1, "statistics": 10, **settings}
    return train_classifier(source, out, **given)


def test_a_few_steps_learn_what_is_easy(tree: Path, tmp_path: Path) -> None:
    clf = train_tiny(tree, tmp_path / "c", training=replace(FEW, steps=60, batch_size=16))
    assert clf.provenance["held_out_accuracy"] > 0.9
    assert clf.provenance["training_accuracy"] > 0.9
    assert clf.class_names == ("cat", "dog", "eel")
    assert Classifier.load(tmp_path / "c").content_hash == clf.content_hash
    assert not (tmp_path / "c.training").exists()


@pytest.mark.parametrize("spelling", ["c/", "."])
def test_any_spelling_of_a_folder_will_do(
    tree: Path, tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are next to it, not inside."""
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c" if spelling == "." else tmp_path)
    clf = train_tiny(tree, spelling)  # type: ignore[arg-type]
    assert Classifier.load(tmp_path / "c").content_hash == clf.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_held_out_part_is_that_of_every_training_command(tree: Path, tmp_path: Path) -> None:
    clf = train_tiny(tree, tmp_path / "c")
    source = open_source(tree)
    parts = split_source(source, alpha=0.1, statistics=10, train=True, seed=0)
    assert clf.trained_on == {source.content_hash(i) for i in parts.training}
    assert clf.provenance["held_out_images"] == len(parts.statistics) + len(parts.calibration)


def test_a_class_filter_keeps_names_and_renumbers(tree: Path, tmp_path: Path) -> None:
    source = open_source(tree)
    assert source.labels is not None
    some = source.subset([i for i, label in enumerate(source.labels) if label != 0])
    clf = train_tiny(some, tmp_path / "c")
    assert clf.class_names == ("dog", "eel")
    assert clf.classes == 2
    assert 0 <= measure_accuracy(clf, some) <= 1
    with pytest.raises(FaroutError, match="images of cat"):
        measure_accuracy(clf, source)


def test_training_repeats_and_resumes_exactly(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tree)
    whole = train_on_source(source, CONFIG, FEW)
    assert train_on_source(source, CONFIG, FEW).content_hash == whole.content_hash
    assert train_on_source(source, CONFIG, replace(FEW, seed=1)).content_hash != whole.content_hash
    calls = 0

    def stops(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return accuracy(logits, labels)

    monkeypatch.setattr("farout.classifiers.losses.accuracy", stops)
    with pytest.raises(KeyboardInterrupt):
        train_on_source(source, CONFIG, FEW, out=tmp_path / "t")
    monkeypatch.undo()
    resumed = train_on_source(source, CONFIG, FEW, out=tmp_path / "t", resume=True)
    assert all(
        torch.equal(value, resumed.module.state_dict()[name]) for name, value in whole.module.state_dict().items()
    )


def test_the_callers_random_numbers_go_on(tree: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_on_source(open_source(tree), CONFIG, replace(FEW, steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_validation_sees_images_as_they_are(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last twentieth validates without augmentation, and with the network in eval mode."""
    seen: list[int] = []
    original = ClassifierConfig.augment

    def counting(self: ClassifierConfig, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(len(images))
        return original(self, images, generator)

    monkeypatch.setattr(ClassifierConfig, "augment", counting)
    train_on_source(open_source(tree), CONFIG, replace(FEW, validate_every=2))
    assert seen == [8, 8, 8, 8]


def test_a_moving_average_has_its_batch_norm_statistics(tree: Path) -> None:
    clf = train_on_source(open_source(tree), CONFIG, replace(FEW, ema=0.5))
    assert int(clf.module.bn1.num_batches_tracked) == 4
    assert not clf.module.training
    assert bool((clf.module.bn1.running_mean != 0).any())


def test_normalisation_is_of_the_training_images(tree: Path) -> None:
    source = open_source(tree)
    pixels = torch.stack([source[i] for i in range(len(source))]).double() / 255
    clf = CONFIG.build(source, "abc")
    assert clf.mean == pytest.approx([float(pixels.mean())])
    assert clf.std == pytest.approx([float(pixels.std(correction=0))])
    given = replace(CONFIG, mean=(0.1,), std=(0.2,)).build(source, "abc")
    assert (given.mean, given.std) == ((0.1,), (0.2,))
    black = open_source(torch.zeros(4, 3, 8, 8))
    assert CONFIG.build(black, "ab").std == pytest.approx([0.5 / 255] * 3)


def test_the_openood_recipe() -> None:
    recipe = TrainingConfig(**PRESETS["openood"]["training"])
    assert recipe.steps == 100 * 391
    assert (recipe.optimizer, recipe.nesterov, recipe.momentum, recipe.weight_decay) == ("sgd", True, 0.9, 5e-4)
    assert (recipe.batch_size, recipe.warmup, recipe.ema, recipe.clip) == (128, 0, None, None)
    assert learning_rate(recipe, 0) == 0.1
    assert learning_rate(recipe, recipe.steps - 1) == 1e-6
    middle = 1e-6 + (0.1 - 1e-6) / 2
    assert learning_rate(recipe, (recipe.steps - 1) // 2) == pytest.approx(middle, rel=1e-3)
    config = ClassifierConfig(**PRESETS["openood"]["model"])
    assert (config.network, config.crop_padding, config.flip, config.resized_crop) == ("resnet18", 4, True, False)


def test_every_preset_is_a_configuration() -> None:
    for preset in PRESETS.values():
        ClassifierConfig(**preset["model"])
        TrainingConfig(**preset["training"])


def test_the_floor_is_reached_at_the_last_update(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loop that trains, not of the formula alone."""
    rates: list[float] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *given: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["nesterov"]
        return original(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train_on_source(open_source(tree), CONFIG, replace(FEW, steps=5, final_learning_rate=1e-6))
    assert rates[0] == 0.1
    assert rates[-1] == 1e-6
    assert rates == sorted(rates, reverse=True)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_classifier_training as t
from dataclasses import replace
from farout.data.sources import open_source
training = replace(t.FEW, final_learning_rate=1e-6, checkpoint_every=4)
t.train_tiny({tree!r}, {out!r}, training=training)
"""


@pytest.mark.slow
def test_two_processes_reach_the_floor_and_write_one_folder(tree: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), tree=str(tree), out=str(tmp_path / "c")))
    in_two_processes(script, 180)
    clf = Classifier.load(tmp_path / "c")
    assert "held_out_accuracy" in clf.provenance
    state = (tmp_path / "c.training" / "checkpoints" / "step_00000004" / "state.json").read_text()
    assert '"learning_rate": 1e-06' in state


def test_label_smoothing_is_the_formula() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    target = 0.1 / 4 + 0.9 * torch.eye(4)[labels]
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    found = CrossEntropy(0.1)(logits, labels)
    torch.testing.assert_close(found["loss"], expected)
    assert float(found["accuracy"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


# refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_padding": -1}, "crop_padding"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mean": (0.5,)}, "go together"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        replace(CONFIG, **changes)


def never(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


def test_wrong_input_is_refused_before_any_work(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "train", never)
    plain = pictures(tmp_path / "plain", 12)
    with pytest.raises(FaroutError, match="has no labels"):
        train_tiny(plain, tmp_path / "c")
    with pytest.raises(FaroutError, match=r"one class \(cat\)"):
        train_tiny(f"{tree}@classes=cat", tmp_path / "c")
    with pytest.raises(FaroutError, match="mean"):
        train_tiny(tree, tmp_path / "c", model=replace(CONFIG, channels=3, mean=(0.5,), std=(0.5,)))
    with pytest.raises(FaroutError, match="no network 'wrn17_1'"):
        train_tiny(tree, tmp_path / "c", model=replace(CONFIG, network="wrn17_1"))
    with pytest.raises(FaroutError, match="weights to keep"):
        train_tiny(tree, tmp_path / "c", keep_weights=True)
    with pytest.raises(StoreError, match="not replaced"):
        train_tiny(tree, tree)
    assert not (tmp_path / "c").exists()


def test_an_image_beside_the_class_folders_is_named(tree: Path, tmp_path: Path) -> None:
    """One stray picture takes all labels away."""
    shutil.copytree(tree, tmp_path / "t")
    (tmp_path / "t" / "cat" / "003.png").rename(tmp_path / "t" / "stray.png")
    with pytest.raises(FaroutError, match=r"1 images in none of them \(first: stray\.png\)"):
        train_tiny(tmp_path / "t", tmp_path / "c")
    with pytest.raises(FaroutError, match="has no labels"):  # a glob has none, also in folders of classes
        train_tiny(f"{tmp_path / 't'}/**/*.png", tmp_path / "c")


def test_a_class_without_images_to_train_on_is_named(tree: Path, tmp_path: Path) -> None:
    """All images of a class may fall to the held-out part."""
    source = open_source(tree)
    parts = split_source(source, alpha=0.1, statistics=10, train=True, seed=0)
    assert source.labels is not None
    kept = [i for i in range(len(source)) if source.labels[i] != 2]
    held = next(i for i in parts.calibration if source.labels[i] == 2)
    for name in ("cat", "dog"):
        (tmp_path / "t" / name).mkdir(parents=True)
    (tmp_path / "t" / "eel").mkdir()
    for i in [*kept, held]:
        (tmp_path / "t" / source.keys[i]).write_bytes((tree / source.keys[i]).read_bytes())
    with pytest.raises(FaroutError, match="train the class eel on"):
        train_tiny(tmp_path / "t", tmp_path / "c")


def test_images_of_other_channels_become_the_classifiers(tree: Path, tmp_path: Path) -> None:
    clf = train_tiny(tree, tmp_path / "c", model=replace(CONFIG, channels=3))
    assert clf.preprocessing.channels == 3
    assert len(clf.mean) == 3


def test_accuracy_leaves_out_what_cannot_be_read(tree: Path, tmp_path: Path) -> None:
    for path in tree.rglob("00*.png"):
        target = tmp_path / "t" / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    source = open_source(tmp_path / "t", policy="skip")
    clf = train_on_source(source, CONFIG, FEW)
    (tmp_path / "t" / "cat" / "000.png").write_text("not a picture")
    again = open_source(tmp_path / "t", policy="skip")
    readable = [i for i, key in enumerate(source.keys) if key != "cat/000.png"]
    assert measure_accuracy(clf, again) == measure_accuracy(clf, source.subset(readable))


# given weights


def test_training_goes_on_from_given_weights(tree: Path, tmp_path: Path) -> None:
    source = open_source(tree)
    first = train_on_source(source, CONFIG, FEW)
    path = tmp_path / "weights.pt"
    torch.save(first.module.state_dict(), path)
    known = replace(CONFIG, mean=first.mean, std=first.std)
    kept = train_tiny(tree, tmp_path / "kept", weights=str(path), keep_weights=True, model=known)
    assert kept.trained_on == frozenset()
    assert kept.provenance["weights"] == "weights.pt"
    with pytest.raises(FaroutError, match=r"--model.mean .* --model.std"):
        train_tiny(tree, tmp_path / "guess", weights=str(path), keep_weights=True)
    assert all(torch.equal(value, kept.module.state_dict()[name]) for name, value in first.module.state_dict().items())
    slow = replace(FEW, steps=1, learning_rate=1e-8)
    near = train_on_source(source, CONFIG, slow, weights=str(path))
    torch.testing.assert_close(near.head.weight, first.head.weight, atol=1e-5, rtol=0)


def test_a_training_goes_on_with_the_same_labels_only(tree: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"{tree / name / picture.name},{name}" for name in ("cat", "dog") for picture in (tree / name).iterdir()]
    table.write_text("\n".join(["path,label", *rows]))
    train_on_source(open_source(table), CONFIG, replace(FEW, checkpoint_every=2), out=tmp_path / "run")
    table.write_text("\n".join(["path,label", rows[0].replace(",cat", ",dog"), *rows[1:]]))
    with pytest.raises(StoreError, match="fingerprint"):
        train_on_source(open_source(table), CONFIG, replace(FEW, checkpoint_every=2), out=tmp_path / "run", resume=True)


def test_what_start_weights_have_seen_counts_as_seen(tree: Path, tmp_path: Path) -> None:
    """A fit must not rest its p-values on images that the weights knew before they were trained further."""
    whole = open_source(tree)
    first = train_on_source(whole, CONFIG, FEW)
    first.save(tmp_path / "first")
    assert whole.labels is not None
    two = whole.subset([i for i, label in enumerate(whole.labels) if label < 2] + [len(whole) - 1])
    for place in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        tuned = train_on_source(two, CONFIG, FEW, weights=str(place))
        assert tuned.trained_on == first.trained_on
        assert (tuned.provenance["weights"], tuned.provenance["started_from"]) == (None, first.content_hash)
    # the same weights without the list, and a classifier that came from them: what they have seen is not known
    (tmp_path / "elsewhere.safetensors").write_bytes((tmp_path / "first" / "model.safetensors").read_bytes())
    blind = train_on_source(two, CONFIG, FEW, weights=str(tmp_path / "elsewhere.safetensors"))
    blind.save(tmp_path / "blind")
    again = train_on_source(two, CONFIG, FEW, weights=str(tmp_path / "blind"))
    assert [each.provenance["weights"] for each in (blind, again)] == ["elsewhere.safetensors"] * 2
    assert len(blind.trained_on) == len(two)
    # a run that goes on without them would forget them
    kept = replace(FEW, checkpoint_every=2)
    train_on_source(two, CONFIG, kept, out=tmp_path / "run", weights=str(tmp_path / "first"))
    with pytest.raises(FaroutError, match="fingerprint"):
        train_on_source(two, CONFIG, kept, out=tmp_path / "run", resume=True)
    resumed = train_on_source(two, CONFIG, kept, out=tmp_path / "run", resume=True, weights=str(tmp_path / "first"))
    assert resumed.trained_on == first.trained_on


@pytest.mark.slow
def test_an_accuracy_on_images_that_may_have_been_seen_says_so(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clf = train_tiny(tree, tmp_path / "c")
    words = ["train", "classifier", str(tree), "--device", "cpu", "--alpha", "0.1", "--statistics", "10"]
    words += ["--model.mean", str(clf.mean[0]), "--model.std", str(clf.std[0]), "--training.steps", "2"]
    words += ["--training.warmup", "0", "--preset", "tiny"]
    torch.save(clf.module.state_dict(), tmp_path / "w.pt")
    for name, more, unseen in [
        ("kept", ["--weights", str(tmp_path / "w.pt"), "--keep-weights"], False),
        ("tuned", ["--weights", str(tmp_path / "w.pt")], False),
        ("ours", ["--weights", str(tmp_path / "c")], True),
        ("other", ["--weights", str(tmp_path / "c"), "--seed", "1"], False),
    ]:
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
        assert ("may have seen" not in capsys.readouterr().out) == unseen
        about = Classifier.load(tmp_path / name).provenance
        assert ("held_out_accuracy" in about) == unseen == ("possibly_seen_accuracy" not in about)


def test_weights_of_another_class_count_are_refused(tree: Path, tmp_path: Path) -> None:
    source: ImageSource = open_source(tree)
    assert source.labels is not None
    two = source.subset([i for i, label in enumerate(source.labels) if label < 2])
    torch.save(train_on_source(two, CONFIG, replace(FEW, steps=1)).module.state_dict(), tmp_path / "two.pt")
    with pytest.raises(StoreError, match=r"fc.weight has shape \(2, 64\), expected \(3, 64\)"):
        train_tiny(tree, tmp_path / "c", weights=str(tmp_path / "two.pt"))
    (tmp_path / "words.pt").write_text("words")
    (tmp_path / "words.txt").write_text("e words")
    for name in ("words.pt", "words.txt"):
        with pytest.raises(StoreError, match=f"{name} is not loaded: it is not a complete file of tensors"):
            train_tiny(tree, tmp_path / "c", weights=str(tmp_path / name))
    with pytest.raises(StoreError, match=r"no weights file .* or the folder of a farout classifier"):
        train_tiny(tree, tmp_path / "c", weights=str(tmp_path / "none.pt"))


# the command line


def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "classifier", str(tree), "--out", str(tmp_path / "c"), "--device", "cpu", "--alpha", "0.1"]
    few = ["--statistics", "10", "--training.steps", "3", "--batch-size", "8", "--training.warmup", "0"]
    assert main([*words, *few, "--model.flip", "--model.mean", "0.5", "--model.std", "0.25"]) == 0
    shown = capsys.readouterr().out
    assert "3 classes" in shown
    assert "held-out images" in shown
    clf = Classifier.load(tmp_path / "c")
    assert (clf.mean, clf.std) == ((0.5,), (0.25,))
    assert clf.provenance["training"]["optimizer"] == "sgd"
    assert clf.provenance["model"]["flip"] is True


def test_wrong_words_have_their_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "classifier", "x", "--out", str(tmp_path)]
    assert main([*words, "--preset", "opnood"]) == 2
    assert "did you mean openood" in capsys.readouterr().err
    assert main(["list", "presets"]) == 0
    assert "train classifier" in capsys.readouterr().out
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    assert main(["train", "classifier", str(tmp_path / "one.png"), "--out", str(tmp_path / "c")]) == 1
    assert "no labels" in capsys.readouterr().err
