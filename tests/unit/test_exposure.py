"""What classifiers minimise with outliers: losses by their formulas, virtual outliers, settings that are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from farout.classifiers.losses import CrossEntropy, EnergyHead, free_energy, uniform_cross_entropy
from farout.classifiers.outlier_exposure import ExposedNetwork, Exposure
from farout.classifiers.virtual_outliers import VirtualOutliers, sample_largest_radii
from farout.core.errors import FaroutError, TooFewImagesWarning

# losses


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_energy_loss_is_a_binary_cross_entropy(hidden: int) -> None:
    torch.manual_seed(0)
    head, network = EnergyHead(hidden, temperature=2.0), nn.Linear(3, 4)
    inside, outside = network(torch.randn(6, 3)), network(torch.randn(3, 3))
    loss = head(inside, outside)
    energy = 2 * ((torch.cat([inside, outside]) / 2).exp().sum(1).log())
    logits = head.phi(energy[:, None])
    target = torch.tensor([1.0] * 6 + [0.0] * 3)
    torch.testing.assert_close(loss, functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], target))
    loss.backward()
    for parameter in (*head.parameters(), network.weight):
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    assert len(list(head.parameters())) == (4 if hidden else 2)


def test_the_free_energy_is_pytorch_oods() -> None:
    from pytorch_ood.detector import EnergyBased

    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(free_energy(logits), -EnergyBased.score(logits))


def test_outlier_exposure_is_cross_entropy_to_uniform() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    uniform = functional.cross_entropy(logits, torch.full((6, 4), 0.25))
    torch.testing.assert_close(uniform_cross_entropy(logits), uniform)
    assert float(uniform_cross_entropy(torch.zeros(2, 4))) == pytest.approx(float(np.log(4)))


class Flat(nn.Module):
    """Features are the pixels; the last layer makes logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.BatchNorm1d(4), nn.Linear(4, classes)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.fc(self.body(x.flatten(1)))


def exposed(exposure: Exposure, classes: int = 3, start: int = 0) -> ExposedNetwork:
    torch.manual_seed(1)
    return ExposedNetwork(Flat(classes), "fc", exposure.resolve_defaults(exposure.loss != "vos"), CrossEntropy(), start)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(9, 1, 2, 2, generator=generator), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("loss", ["energy", "oe", "k+1"])
def test_each_loss_is_its_formula_on_one_batch(loss: str) -> None:
    images, labels = sample()
    learner = exposed(Exposure(loss=loss, weight=0.7), classes=4)
    found = learner.losses(images, labels, torch.Generator())
    logits = exposed(Exposure(loss=loss), classes=4).network(images)  # of all nine, in one batch
    inner, outer = logits[:5], logits[5:]
    assert learner.energy is None or loss == "energy"
    outside = {
        "energy": lambda: learner.energy(inner, outer),
        "oe": lambda: functional.cross_entropy(outer, torch.full((4, 4), 0.25)),
        "k+1": lambda: functional.cross_entropy(outer, torch.full((4,), 3)),
    }[loss]()
    torch.testing.assert_close(found["outlier_loss"], outside)
    torch.testing.assert_close(found["loss"], functional.cross_entropy(inner, labels) + 0.7 * outside)
    assert learner.network.rows == [9]  # batch normalisation saw images and outliers together
    learner.eval()
    assert set(learner.losses(images, labels, torch.Generator())) == {"loss", "accuracy"}


def test_without_weight_the_energy_loss_is_plain_cross_entropy() -> None:
    images, labels = sample()
    learner = exposed(Exposure(loss="energy", weight=0.0))
    found = learner.losses(images, labels, torch.Generator())
    logits = exposed(Exposure(loss="energy")).network(images)
    torch.testing.assert_close(found["loss"], functional.cross_entropy(logits[:5], labels))
    found["loss"].backward()
    assert learner.energy is not None
    assert all(p.grad is None or not bool(p.grad.any()) for p in learner.energy.parameters())


def test_the_loss_outside_counts_from_its_start_on() -> None:
    images, labels = sample()
    learner = exposed(Exposure(loss="energy"), start=2)
    outside = [float(learner.losses(images, labels, torch.Generator())["outlier_loss"].detach()) for _ in range(4)]
    assert [value > 0 for value in outside] == [False, False, True, True]
    assert learner.network.rows == [5, 5, 9, 9]


# virtual outliers


def test_virtual_outliers_statistics_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    virtual = VirtualOutliers(classes=3, width=4, queue=20, draws=100, virtual_per_class=2)
    features, labels = torch.randn(120, 4, generator=generator), torch.arange(120) % 3
    assert not virtual.is_full
    for start in range(0, 120, 15):
        virtual.add_features(features[start : start + 15], labels[start : start + 15])
    assert virtual.is_full
    kept = [features[labels == k][-20:].numpy().astype(np.float64) for k in range(3)]
    means, covariance = virtual.statistics()
    np.testing.assert_allclose(means, [each.mean(0) for each in kept], atol=1e-6)
    centred = np.concatenate([each - each.mean(0) for each in kept])
    np.testing.assert_allclose(covariance, np.cov(centred.T, bias=True) + 1e-4 * np.eye(4), atol=1e-6)
    drawn = virtual.sample(torch.Generator().manual_seed(1))
    assert drawn.shape == (6, 4)
    assert torch.equal(drawn, virtual.sample(torch.Generator().manual_seed(1)))


def test_a_batch_larger_than_the_queue_leaves_its_last_features() -> None:
    virtual = VirtualOutliers(classes=2, width=1, queue=3, draws=10, virtual_per_class=1)
    virtual.add_features(torch.arange(10.0)[:, None], torch.tensor([0] * 8 + [1] * 2))
    assert sorted(virtual.features[0].flatten().tolist()) == [5, 6, 7]
    assert not virtual.is_full


def test_virtual_outliers_are_as_unlikely_as_the_least_likely_of_many() -> None:
    """Against drawing them all."""
    width, draws = 6, 200
    uniform = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample_largest_radii(uniform, width, draws)
    assert bool((found[:, :-1] >= found[:, 1:]).all())
    every = np.random.default_rng(0).standard_normal((4000, draws, width))
    expected = -np.sort(-np.linalg.norm(every, axis=2), axis=1)[:, :3]
    for place in range(3):
        assert stats.ks_2samp(found[:, place].numpy(), expected[:, place]).pvalue > 0.001


def test_virtual_outliers_follow_the_classes_gaussians() -> None:
    """Where all draws are kept, the longest and the shortest."""
    generator = torch.Generator().manual_seed(0)
    virtual = VirtualOutliers(classes=2, width=3, queue=500, draws=3000, virtual_per_class=3000)
    mixing = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [0, 0, 0.1]])
    for k, centre in enumerate([-10.0, 10.0]):
        virtual.add_features(torch.randn(500, 3, generator=generator) @ mixing.T + centre, torch.full((500,), k))
    drawn = virtual.sample(generator).unflatten(0, (2, 3000))
    means, covariance = virtual.statistics()
    np.testing.assert_allclose(drawn.mean(1), means, atol=0.15)
    for each in drawn:
        np.testing.assert_allclose(np.cov(each.T), covariance, atol=0.3)


def test_virtual_outliers_wait_for_full_queues_and_teach_the_last_layer_alone() -> None:
    images, labels = sample()
    learner = exposed(Exposure(loss="vos", queue=3, draws=20, start_fraction=0.0))
    outside = [learner.losses(images[:5], labels, torch.Generator().manual_seed(0))["outlier_loss"] for _ in range(4)]
    assert [float(value.detach()) > 0 for value in outside] == [False, False, True, True]
    outside[-1].backward()
    assert learner.energy is not None
    assert bool(learner.network.fc.weight.grad.any())
    assert bool(learner.energy.phi[0].weight.grad.any())


def test_virtual_outliers_that_never_come_are_warned_of() -> None:
    numbers = torch.tensor([0] * 9 + [1])
    with pytest.warns(TooFewImagesWarning, match="seen about 100 times"):
        Exposure(loss="vos", queue=101).warn_of_short_training(numbers, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Exposure(loss="vos", queue=100).warn_of_short_training(numbers, 1000)
        Exposure(loss="energy", queue=101).warn_of_short_training(numbers, 1000)


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "vso"}, "loss"),
        ({"weight": -1.0}, "weight"),
        ({"start_fraction": 1.0}, "start_fraction"),
        ({"temperature": 0.0}, "temperature"),
        ({"resize": "lanczos"}, "resize"),
        ({"reconstruction_fraction": 2.0}, "reconstruction_fraction"),
        ({"virtual_per_class": 5, "draws": 4}, "virtual_per_class"),
        ({"limit": 0}, "limit"),
        ({"queue": 1}, "queue"),
        ({"hidden": -1}, "hidden"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=f"exposure option {message}"):
        Exposure(**settings)


@pytest.mark.parametrize(
    ("settings", "outliers", "reconstructions", "message"),
    [
        ({"loss": "oe", "hidden": 5}, True, False, r"hidden is 5, and the loss oe .* \(energy, vos do\)"),
        ({"loss": "k+1", "temperature": 2.0}, True, False, "temperature is 2.0, and the loss k"),
        (
            {"mutual_information": "off"},
            True,
            False,
            r"mutual_information is 'off', and the loss energy .* \(sona do\)",
        ),
        ({"loss": "energy", "mutual_information_weight": 0.1}, True, False, "mutual_information_weight"),
        ({"weight": 2.0}, False, False, "weight is 2.0, and the loss cross_entropy"),
        ({"start_fraction": 0.5}, False, True, "start_fraction"),
        ({"limit": 5}, False, False, "limit"),
        ({"loss": "vos", "resize": "nearest"}, False, False, "resize .* sona and reconstructions do"),
        (
            {"reconstruction_fraction": 0.2},
            True,
            False,
            r"reconstruction_fraction is 0.2, .* \(reconstructions do\).* default is 0.5",
        ),
        *(({"loss": "sona", name: 3}, True, True, name) for name in ("queue", "draws", "virtual_per_class")),
    ],
)
def test_settings_that_nothing_looks_at(
    settings: dict[str, object], outliers: bool, reconstructions: bool, message: str
) -> None:
    with pytest.raises(FaroutError, match=f"the exposure option {message}"):
        Exposure(**settings).resolve_defaults(outliers, reconstructions)


def test_settings_that_something_looks_at() -> None:
    for settings, outliers, reconstructions in [
        ({"resize": "nearest", "reconstruction_fraction": 0.2}, False, True),
        ({"hidden": 5, "limit": 7, "start_fraction": 0.1}, True, False),
        ({"loss": "vos", "hidden": 5, "queue": 5, "virtual_per_class": 2}, False, False),
    ]:
        found = Exposure(**settings).resolve_defaults(outliers, reconstructions)
        assert found.resolve_defaults(outliers, reconstructions) == found
    plain = Exposure().resolve_defaults(False)
    assert plain.resolve_defaults(False) == plain
