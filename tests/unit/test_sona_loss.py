"""The loss of SONA: outlier exposure, the penalty on what features have in common, and images paired with outliers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from farout import SONA
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.losses import CrossEntropy, mutual_information
from farout.classifiers.model import Classifier
from farout.classifiers.outlier_exposure import ExposedNetwork, Exposure, ExposureData
from farout.classifiers.outlier_images import find_paired_outliers, open_outliers, read_source_keys
from farout.classifiers.presets import PRESETS
from farout.classifiers.train import train_classifier, train_on_source
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, SourceError
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from farout.training.loop import TrainingConfig
from small import CPU, conditional, pictures

pytestmark = pytest.mark.numerics

CONFIG = ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False)
FEW = TrainingConfig(
    steps=3, batch_size=8, optimizer="sgd", learning_rate=0.1, warmup=0, ema=None, device="cpu", precision="fp32"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree") / "classes"
    for number, (name, low) in enumerate([("a", 0), ("b", 190)]):
        pictures(folder / name, 20, low=low, spread=60, seed=number)
    return folder


@pytest.fixture(scope="module")
def outliers(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of each image but four, of which there are three."""
    folder = tmp_path_factory.mktemp("outliers") / "made"
    model = conditional(classes=3)
    with pytest.warns(MisleadingResultWarning, match=r"knows 1 class \(c\)"):
        SONA(steps=3).synthesize(tree, folder, count=84, diffusion=model, runtime=CPU)
    return folder


# the penalty


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    """The penalty pair by pair."""
    pairs = torch.stack([torch.outer(one, two) for one, two in zip(x, y, strict=True)])
    joint = (pairs / pairs.sum((1, 2), keepdim=True)).mean(0)
    apart = torch.outer(x.mean(0), y.mean(0))
    return (joint * torch.log(joint / (apart + 1e-8) + 1e-8)).sum()


def features(count: int = 32, width: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, width, generator=generator).relu().unbind())  # type: ignore[return-value]


def test_the_penalty_is_the_cards_by_one_product() -> None:
    x, y = (each.requires_grad_() for each in features())
    ours, theirs = mutual_information(x, y), by_hand(x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, two in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_the_published_penalty_rewards_large_features() -> None:
    x, y = features()
    smaller = mutual_information(2 * x, y) - mutual_information(x, y)
    assert float(smaller) == pytest.approx(-float(torch.tensor(2.0).log()), abs=1e-3)


def test_the_normalized_penalty_is_a_mutual_information() -> None:
    x, y = features(count=64, width=6)
    plain = mutual_information(x, y, normalized=True)
    torch.testing.assert_close(mutual_information(3 * x, 0.2 * y, normalized=True), plain, rtol=1e-3, atol=1e-5)
    paired = mutual_information(x, x, normalized=True)
    assert float(paired) > 5 * float(plain) > 0
    alone = mutual_information(x[:1].expand(4, -1), y[:4], normalized=True)
    assert abs(float(alone)) < 1e-4, "a constant carries no information"


def test_a_row_without_features_is_no_division_by_zero() -> None:
    x, y = features()
    x = torch.cat([torch.zeros(1, 20), x[1:]])
    for normalized in (False, True):
        value = x.clone().requires_grad_()
        penalty = mutual_information(value, y, normalized=normalized)
        penalty.backward()
        assert bool(penalty.isfinite())
        assert value.grad is not None
        assert bool(value.grad.isfinite().all())


# the loss


class Flat(nn.Module):
    """Features are the pixels through a layer and, optionally, a ReLU."""

    def __init__(self, *, positive: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.positive = nn.Linear(4, 6), nn.Linear(6, 3), positive
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        found = self.body(x.flatten(1))
        return self.fc(found.relu() if self.positive else found)


def exposed(*, positive: bool = True, **settings: Any) -> ExposedNetwork:
    exposure = Exposure(loss="sona", **settings).resolve_defaults(True)
    return ExposedNetwork(Flat(positive=positive), "fc", exposure, CrossEntropy(), 0)


def sample() -> tuple[Tensor, Tensor]:
    return torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("mutual", ["reference", "normalized", "off"])
def test_the_loss_is_its_formula_on_one_batch(mutual: Any) -> None:
    images, labels = sample()
    learner = exposed(mutual_information=mutual)
    found = learner.losses(images, labels, torch.Generator())
    network = Flat()
    features = network.body(images.flatten(1)).relu()
    logits = network.fc(features)
    uniform = functional.cross_entropy(logits[5:], torch.full((5, 3), 1 / 3))
    expected = functional.cross_entropy(logits[:5], labels) + 0.5 * uniform
    if mutual == "off":
        assert "mutual_information" not in found
    else:
        penalty = mutual_information(features[:5], features[5:], normalized=mutual == "normalized")
        torch.testing.assert_close(found["mutual_information"], penalty)
        expected = expected + 0.7 * penalty
    torch.testing.assert_close(found["outlier_loss"], uniform)
    torch.testing.assert_close(found["loss"], expected)
    assert learner.network.rows == [10], "images and outliers go through the network together, once"
    learner.eval()
    assert set(learner.losses(images, labels, torch.Generator())) == {"loss", "accuracy"}


def test_negative_features_are_named() -> None:
    images, labels = sample()
    with pytest.raises(FaroutError, match=r"not negative.*--exposure\.mutual-information off"):
        exposed(positive=False).losses(images, labels, torch.Generator())
    exposed(positive=False, mutual_information="off").losses(images, labels, torch.Generator())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_repeats_exactly_in_any_precision(tree: Path, outliers: Path, precision: Any) -> None:
    training = TrainingConfig(**{**vars(FEW), "precision": precision})
    source, outer = open_source(tree), open_outliers(str(outliers))
    trained = [
        train_on_source(source, CONFIG, training, exposure_data=ExposureData(Exposure(loss="sona"), outer))
        for _ in range(2)
    ]
    states = [each.module.state_dict() for each in trained]
    assert all(bool(value.isfinite().all()) for value in states[0].values())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_recipes() -> None:
    paper, small = PRESETS["sona"], PRESETS["sona_tiny"]
    for preset in (paper, small):
        exposure = Exposure(**preset["exposure"]).resolve_defaults(True)
        assert (exposure.loss, exposure.weight, exposure.mutual_information_weight, exposure.mutual_information) == (
            *("sona", 0.5, 0.7),
            "reference",
        )
    assert (paper["training"]["batch_size"], paper["model"]["network"]) == (128, "resnet18")
    assert Exposure(loss="sona").resolve_defaults(True).weight == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mutual_information": "both"}, "mutual_information is 'both'"),
        ({"mutual_information_weight": -1.0}, "mutual_information_weight"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        Exposure(**settings)
    with pytest.raises(FaroutError, match="give some"):
        Exposure(loss="sona").resolve_defaults(False)


# pairs


def test_each_image_is_seen_with_outliers_that_were_made_of_it(tree: Path, outliers: Path) -> None:
    source, outer = open_source(tree), open_outliers(str(outliers))
    made_of = read_source_keys(outliers)
    assert source.labels is not None
    items = TensorDataset(torch.zeros(len(source), 1, 8, 8), torch.tensor(source.labels))
    exposure_data = ExposureData(Exposure(loss="sona", paired=True), outer, source_keys=made_of)
    how = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    both = exposure_data.combine_with(items, ("a", "b"), (), how, 0, source.keys)
    for index in (0, 7, 33):
        own = [place for place, key in enumerate(outer.keys) if made_of[key] == source.keys[index]]
        expected = {tuple(outer[place].flatten().tolist()) for place in own}
        # once in each pass over the images
        seen = [both.item_at(40 * turn + 5, index)[2] for turn in range(len(own))]
        assert {tuple((each * 255).round().byte().flatten().tolist()) for each in seen} == expected
        assert len(own) in (2, 3)


def test_pairs_that_cannot_be_made(tree: Path, outliers: Path, tmp_path: Path) -> None:
    outer = open_outliers(str(outliers))
    with pytest.raises(FaroutError, match="edited from 1 of the 2 images, such as a/x"):
        find_paired_outliers([open_source(tree).keys[0], "a/x.png"], outer, read_source_keys(outliers))
    with pytest.raises(SourceError, match="does not say which image"):
        read_source_keys(tree)
    given: dict[str, Any] = {"model": CONFIG, "training": FEW, "alpha": 0.1, "statistics": 10}
    with pytest.raises(SourceError, match="does not say which image"):
        train_classifier(tree, tmp_path / "c", outliers=str(tree), exposure=Exposure(loss="oe", paired=True), **given)
    with pytest.raises(FaroutError, match="there are none; give some"):
        train_classifier(tree, tmp_path / "c", exposure=Exposure(paired=True), **given)
    assert not (tmp_path / "c").exists()


def test_validation_keeps_the_pairs(tree: Path, outliers: Path) -> None:
    """What validates is taken out of the middle of the images."""
    source, outer = open_source(tree), open_outliers(str(outliers))
    training = TrainingConfig(**{**vars(FEW), "validate_every": 2})
    made_of = read_source_keys(outliers)
    exposure_data = ExposureData(Exposure(loss="sona", paired=True), outer, source_keys=made_of)
    clf = train_on_source(source, CONFIG, training, exposure_data=exposure_data)
    assert clf.provenance["exposure"]["paired"] is True


def test_the_command(tree: Path, outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "classifier", str(tree), "--preset", "sona_tiny", "--outliers", str(outliers), "--device", "cpu"]
    words += ["--alpha", "0.1", "--statistics", "10", "--training.steps", "2", "--batch-size", "8"]
    words += ["--training.warmup", "0", "--exposure.paired", "--exposure.mutual-information", "normalized"]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0, capsys.readouterr().err
    exposure = Classifier.load(tmp_path / "c").provenance["exposure"]
    assert (exposure["loss"], exposure["mutual_information"], exposure["paired"]) == ("sona", "normalized", True)
