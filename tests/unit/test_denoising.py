"""The denoising detector: what it measures, the card's check 2, models that do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from farout import load
from farout.classifiers.model import Outputs
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors.denoising import Denoising
from farout.detectors.denoising.changes import METRICS, compute_changes, compute_posthoc_scores, normalize_outputs
from farout.detectors.denoising.neighbor_noise import NeighborNoise, compute_descriptors, invert_images
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import GaussianDenoiser, GuidedDenoiser
from farout.diffusion.noise import shared_noise
from farout.diffusion.solvers.dpm_solver import DPMSolver2M
from farout.training.config import TrainingConfig
from small import CPU, classifier, conditional, model, pictures

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


@pytest.fixture(scope="module")
def fitted(good: Path) -> Denoising:
    made = Denoising(levels=(100, 300), draws=2, steps=3, cascade="energy")
    return made.fit(good, conditional(), classifier(), alpha=0.1, statistics=30)


def batch(count: int = 4, labels: Tensor | None = None) -> Batch:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(tuple(map(str, range(count))), images, labels, tuple(range(count)))


def column(measured: torch.Tensor, name: str) -> Tensor:
    return measured[..., METRICS.index(name)]


def test_changes_are_distances_of_normalised_outputs() -> None:
    """Against the released code's arithmetic, written out: v / (|v|_2 + 1e-10), then the L1 norm of the difference."""
    draws = torch.Generator().manual_seed(0)
    clean, moved = torch.randn(1, 5, generator=draws), torch.randn(2, 5, generator=draws)
    pixels = torch.rand(3, 1, 2, 2, generator=draws)
    f_x = normalize_outputs(pixels[:1], Outputs(clean, clean))
    f_t = normalize_outputs(pixels[1:], Outputs(moved, moved))
    found = compute_changes(f_x, {name: value.reshape(1, 2, 1, -1) for name, value in f_t.items()})
    assert found.shape == (1, 2, 1, len(METRICS))
    a, b, c = (v / v.norm() for v in (clean[0], moved[0], moved[1]))
    for name, expected in {
        "logit_global_l1": [(a - b).abs().sum(), (a - c).abs().sum()],
        "logit_local_l1": [(a - b).abs().sum(), (b - c).abs().sum()],
        "logit_global_l2": [(a - b).norm(), (a - c).norm()],
        "logit_local_argmax": [(a - b)[a.argmax()].abs(), (b - c)[a.argmax()].abs()],
    }.items():
        torch.testing.assert_close(column(found, name)[0, :, 0], torch.stack(expected))


def test_posthoc_scores_are_higher_for_unsure_images() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.0]])
    assert (compute_posthoc_scores(unsure) > compute_posthoc_scores(sure)).all()
    torch.testing.assert_close(compute_posthoc_scores(sure)[0, 0], -sure.double().logsumexp(1)[0])


def test_without_noise_nothing_moves_and_more_noise_moves_more(good: Path) -> None:
    """The card's second check: S is as good as 0 at t = 0 (sigma .04 here) and grows with t on the average."""
    made = Denoising(levels=(0, 100, 300, 600), draws=2, grid=50, solver="ddim")
    made.fit(good, conditional(), classifier(), alpha=0.1, statistics=2, limit=12)
    found = column(made.measure(batch(16)).values, "pixel_global_l1").mean((0, 2))
    assert (found.diff() > 0).all()
    assert found[0] < 0.2 * found[-1]


def test_measured_by_hand(fitted: Denoising) -> None:
    """One image: noised with the shared noise, denoised under its predicted class with guidance, seen again."""
    diffusion, recognise = conditional(), classifier()
    one = batch(1)
    measured = fitted.measure(one).values
    y = recognise.outputs(one.images).logits.argmax(1)
    path = fitted.paths[1:]
    x = diffusion.encode(one.images) + path[:, :1, None, None] * shared_noise(diffusion.shape, 0, 0, 1)
    guided = GuidedDenoiser(diffusion.denoiser(), 3.0, diffusion.conditioning.null_condition)
    back = diffusion.decode(DPMSolver2M()(guided, x, path, diffusion.conditioning(y)))
    before, after = recognise.outputs(one.images).logits[0], recognise.outputs(back).logits[0]
    expected = (before / before.norm() - after / after.norm()).abs().sum()
    torch.testing.assert_close(column(measured, "logit_global_l1")[0, 1, 1], expected, rtol=1e-4, atol=1e-6)


def test_evaluations_are_as_in_the_cards_table() -> None:
    counted = []
    for made in (Denoising.from_preset("paper"), Denoising(), Denoising.from_preset("released")):
        made.classifier = classifier()
        made.preprocessing = made.classifier.preprocessing
        made.diffusion = conditional()
        made.attach_runtime(CPU)
        counted.append(made.cost().nfe)
    assert counted == [120, 48, 288]


def test_indicators_and_either(fitted: Denoising, good: Path) -> None:
    scores = fitted.score(good)
    names = {"logit", "feature", "pixel", "logit_local", "feature_local", "pixel_local", "either"}
    assert set(scores.indicators) == names | {"energy", "max_logit", "msp"}
    pair = fitted.with_scoring(score="either").score(good)
    energy = fitted.z["energy"].score(scores.indicators["energy"][:, None])
    change = fitted.z["change"].score(scores.indicators["logit"][:, None])
    np.testing.assert_allclose(pair.score, np.maximum(energy, change))


def test_other_distances_need_no_network(fitted: Denoising) -> None:
    again = fitted.with_scoring(distance="l2")
    assert again.calibration_scores["logit"].mean() < fitted.calibration_scores["logit"].mean()
    with pytest.raises(FaroutError, match="draws"):
        fitted.with_scoring(draws=1)


def test_true_labels_decide_the_class(good: Path, tmp_path: Path) -> None:
    for name in "012":
        pictures(tmp_path / name, 20, seed=ord(name))
    made = Denoising(draws=1, steps=2, labels="true")
    with pytest.raises(FaroutError, match="has none of them"):
        made.fit(good, conditional(), classifier(), alpha=0.1, statistics=30)
    made.fit(tmp_path, conditional(), classifier(), alpha=0.1, statistics=30)
    assert made._choose_classes(batch(3, torch.tensor([2, 1, 0])), torch.zeros(3, 3)).tolist() == [2, 1, 0]
    unknown = made._choose_classes(batch(200, torch.full((200,), -1)), torch.zeros(200, 3))
    assert set(unknown.tolist()) == {0, 1, 2}, "images of unknown label get a random class"
    first = made.measure(batch(3, torch.tensor([0, 0, 0]))).values
    other = made.measure(batch(3, torch.tensor([1, 1, 1]))).values
    assert not torch.equal(first, other)


def test_labels_are_matched_by_name(fitted: Denoising, tmp_path: Path) -> None:
    """A tree whose second folder is class 2 of the classifier, and whose first it does not know."""
    for name in ("other", "2"):
        pictures(tmp_path / name, 3)
    (found,) = fitted.load_batches(open_source(tmp_path))
    assert sorted(found.labels.tolist()) == [-1, -1, -1, 2, 2, 2]


def test_an_unconditional_model(good: Path) -> None:
    made = Denoising(condition="none", guidance=1.0, draws=2, steps=2)
    made.fit(good, model(), classifier(), alpha=0.1, statistics=30)
    assert made.cost().nfe == 4
    assert np.isfinite(made.score(good).score).all()


def test_neighbors_give_their_noise(good: Path, tmp_path: Path) -> None:
    made = Denoising.from_preset("unconditional", draws=2)
    made.fit(good, model(), classifier(), alpha=0.1, statistics=30)
    assert made.neighbors is not None
    count = len(made.neighbors.descriptors)
    assert count == len(made.statistics)
    images = torch.rand(2, 1, 8, 8)
    near = made.neighbors.find(images, 2)
    gaps = (compute_descriptors(images)[:, None] - made.neighbors.descriptors).norm(dim=2)
    for row, order in enumerate(gaps.argsort(dim=1)[:, :2]):
        assert torch.equal(near[row], made.neighbors.noise[order])
    made.save(tmp_path / "d")
    np.testing.assert_array_equal(load(tmp_path / "d").score(good).score, made.score(good).score)


def test_an_image_is_not_its_own_neighbor() -> None:
    images = torch.rand(5, 1, 4, 4)
    near = NeighborNoise(compute_descriptors(images), torch.arange(5.0).reshape(5, 1, 1, 1))
    assert (near.find(images, 1).flatten() != torch.arange(5)).all()
    with pytest.raises(FaroutError, match="more than 5"):
        near.find(images, 5)


def test_inverted_noise_follows_the_exact_flow() -> None:
    """For Gaussian data of variance c the path is x(sigma) = mean + sqrt((c + sigma^2) / (c + sigma0^2)) (x - mean)."""
    network, mean, variance = model(), 0.2, 0.3
    oracle = GaussianDenoiser(torch.full((64,), mean), variance * torch.eye(64))
    images = torch.rand(2, 1, 8, 8)
    found = invert_images(network, oracle, images, None)
    low, high = (network.schedule.sigma_of(torch.tensor(t)).float() for t in (0, 999))
    grown = ((variance + high**2) / (variance + low**2)).sqrt() * (network.encode(images) - mean)
    exact = (mean + grown) / (1 + high**2).sqrt()
    assert (found - exact).norm() < 0.1 * exact.norm(), "50 steps of DDIM are off by some 7 percent"


def test_a_detector_holds_its_classifier(fitted: Denoising, good: Path, tmp_path: Path) -> None:
    fitted.save(tmp_path / "d")
    again = load(tmp_path / "d")
    np.testing.assert_array_equal(again.score(good).score, fitted.score(good).score)
    other = classifier()
    with torch.no_grad():
        other.head.weight.add_(1)
    other.save(tmp_path / "d" / "classifier")
    with pytest.raises(FaroutError, match=r"classifier.hashes\.json was changed"):
        load(tmp_path / "d")


def test_models_that_do_not_go_together_are_refused(good: Path) -> None:
    for made, diffusion, recognise, words in [
        (Denoising(), conditional(classes=4), classifier(), "4 classes"),
        (Denoising(), conditional(size=(16, 16)), classifier(), "size"),
        (Denoising(), conditional(channels=3), classifier(), "channels"),
        (Denoising(), model(), classifier(), "unconditional"),
        (Denoising(levels=(1000,)), conditional(), classifier(), "0 to 999"),
        (Denoising(solver="pndm4", steps=2), conditional(), classifier(), "steps"),
    ]:
        with pytest.raises(FaroutError, match=words):
            made.fit(good, diffusion, recognise, alpha=0.1, statistics=30)


def test_guidance_requires_a_null_condition(good: Path) -> None:
    diffusion = conditional()
    diffusion.conditioning.has_null = False
    with pytest.raises(FaroutError, match="guidance 1"):
        Denoising().fit(good, diffusion, classifier(), alpha=0.1, statistics=30)
    Denoising(guidance=1.0, draws=1, steps=1).fit(good, diffusion, classifier(), alpha=0.1, statistics=30)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": ()}, "levels"),
        ({"draws": 0}, "draws"),
        ({"solver": "euler"}, "dpm_solver_2m"),
        ({"score": "logits"}, "logit"),
        ({"score": "logit_local"}, "several levels"),
        ({"score": "either"}, "energy"),
        ({"cascade": "odin"}, "max_logit"),
        ({"noise": "shard"}, "neighbor"),
        ({"condition": "classes"}, "none"),
        ({"use_levels": (300, 5)}, "use_levels"),
        ({"condition": "none", "guidance": 2.0}, "guidance is 2.0, but is only used with condition class"),
        ({"condition": "none", "labels": "true"}, "labels is 'true', but is only used"),
        ({"grid": 20, "steps": 3}, "steps is 3, but is only used without grid"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(FaroutError, match=words):
        Denoising(**settings)


def test_images_without_labels_and_no_classifier(good: Path) -> None:
    with pytest.raises(FaroutError, match="no labels"):
        Denoising().fit(good, conditional())


def test_a_folder_that_is_no_classifier(good: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="is missing"):
        Denoising().fit(good, conditional(), tmp_path)
    with pytest.raises(FaroutError, match="Classifier"):
        Denoising().fit(good, conditional(), torch.nn.Linear(2, 2))


def test_fewer_levels_and_draws_need_no_network(fitted: Denoising, good: Path) -> None:
    less = fitted.with_scoring(use_levels=(300,), use_draws=1)
    measured = fitted.score(good).measurements
    assert measured is not None
    np.testing.assert_allclose(less.score(good).score, column(measured.values, "logit_global_l1")[:, 1, 0], rtol=1e-6)
    for wrong in ({"use_levels": (5,)}, {"use_draws": 3}):
        with pytest.raises(FaroutError, match="use_"):
            fitted.with_scoring(**wrong)


def test_confident_images_keep_their_order() -> None:
    """Where 1 - max softmax has no digits left in float32."""
    scores = compute_posthoc_scores(torch.tensor([[30.0, 0.0, 0.0], [20.0, 0.0, 0.0], [18.0, 0.0, 0.0]]))[:, 2].float()
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": (2000,)}, "0 to 999"),
        ({"solver": "pndm4", "steps": 2}, "steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    settings: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("farout.detectors.network_training.train_on_source", never)
    monkeypatch.setattr("farout.detectors.network_training.train_model", never)
    for name in ("a", "b"):
        pictures(tmp_path / name, 40, seed=ord(name))
    with pytest.raises(FaroutError, match=words):
        Denoising(**settings).fit(tmp_path, alpha=0.1)
    with pytest.raises(FaroutError, match="classes"):
        Denoising().fit(tmp_path, alpha=0.1, diffusion_config=DiffusionConfig())


def test_networks_that_are_lacking_are_trained(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / name, 40, seed=ord(name))
    training = TrainingConfig(steps=2, batch_size=4)
    made = Denoising(draws=1, steps=1).fit(tmp_path, alpha=0.1, training=training, classifier_steps=2)
    assert made.classifier is not None
    assert made.diffusion is not None
    assert made.classifier.class_names == made.diffusion.conditioning.class_names == ("a", "b")
    seen = made.classifier.trained_on | made.diffusion.trained_on
    assert not seen & (made.statistics_hashes | made.calibration_hashes)
