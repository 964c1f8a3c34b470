"""Post-hoc scores against pytorch-ood's own objects, with few and many images, and what a folder keeps of them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood import detector as theirs
from pytorch_ood.detector import EnergyBased
from torch import Tensor, nn

from farout import load
from farout.classifiers.model import Classifier
from farout.core.errors import FaroutError, MisleadingResultWarning
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors.posthoc import Posthoc
from farout.detectors.posthoc.scores import FittedScores, LinearHead, ScoreSettings, compute_logit_scores, limit_rank
from small import classifier, pictures
from tolerances import assert_same_scores

pytestmark = pytest.mark.numerics

SETTINGS = ScoreSettings(k=50, dimensions=None, clip=0.9, sparsity=0.9, covariance="shrunk")
NAMES = {
    "msp", "max_logit", "energy", "gen", "react", "dice", "ash", "scale", "vim", "knn", "she", "mahalanobis", "rmds"
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


def fitted(good: Path, **settings: Any) -> Posthoc:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MisleadingResultWarning)
        return Posthoc(**settings).fit(good, classifier=classifier(), alpha=0.1, statistics=30)


@pytest.fixture(scope="module")
def made(good: Path) -> Posthoc:
    return fitted(good, odin=True)


def layer(classes: int = 4, width: int = 12, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, classes, bias=bias)


def features(count: int = 600, width: int = 12, seed: int = 1) -> Tensor:
    """Positive, as after a ReLU, and correlated."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) / 4
    return (torch.randn(count, width, generator=draws) @ mixing + torch.rand(width, generator=draws)).relu()


def batch(count: int = 5, seed: int = 0) -> Batch:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(tuple(map(str, range(count))), images, None, tuple(range(count)))


# against the library


def test_scores_of_logits_are_the_librarys() -> None:
    logits = 5 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    found = compute_logit_scores(logits, gamma=0.1, top=6)
    wide = logits.double()  # in float32 the library's clamped probabilities differ in the fourth digit
    expected = {
        "msp": theirs.MaxSoftmax.score(wide),
        "max_logit": theirs.MaxLogit.score(wide),
        "energy": EnergyBased.score(wide),
        "gen": theirs.GEN.score(wide, gamma=0.1, M=6),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    written_out = -(logits.double().exp().sum(1).log())
    torch.testing.assert_close(found["energy"], written_out)


def test_very_confident_images_have_different_scores() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0], [35.0, 0.0, 0.0]])
    msp = compute_logit_scores(logits, 0.1, 3)["msp"]
    assert msp[0] > msp[1]


@pytest.mark.parametrize("bias", [True, False])
def test_scores_of_features_are_the_librarys(bias: bool) -> None:
    last, good, new = layer(bias=bias), features(), features(30, seed=2) * 2
    head = LinearHead(last)
    found = FittedScores.fit(good, head, replace(SETTINGS, covariance="empirical", k=3)).compute(new)
    weight, offset = last.weight, last.bias if bias else torch.zeros(4)
    classes, known = last(good).argmax(1), torch.zeros(len(good))
    objects = {
        "vim": theirs.ViM(None, 6, weight, offset),
        "knn": theirs.KNN(None, k=3),
        "mahalanobis": theirs.Mahalanobis(None),
        "rmds": theirs.RMD(None),
        "she": theirs.SHE(None, last),
        "dice": theirs.DICE(None, weight, offset, 0.9),
    }
    with torch.no_grad():
        assert len(classes.unique()) == 4
        for name, theirs_own in objects.items():
            theirs_own.fit_features(good, classes if name in ("mahalanobis", "rmds", "she") else known)
            value = theirs_own.predict_features(new).double()
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
        clipped = theirs.ReAct(None, last, percentile=0.9).fit_feature_maps(good, known)
        value = clipped.predict_feature_maps(new).double()
        torch.testing.assert_close(found["react"], value, rtol=1e-5, atol=1e-5)


def test_shrunk_distances_tend_to_the_empirical_ones() -> None:
    """The library divides by nothing where a covariance divides by n; the order is what a score is."""
    head, good, new = LinearHead(layer()), features(20000) + 0.1, features(200, seed=2)
    good = good + 0.1 * torch.randn(good.shape, generator=torch.Generator().manual_seed(3))
    shrunk = FittedScores.fit(good, head, SETTINGS).compute(new)
    empirical = FittedScores.fit(good, head, replace(SETTINGS, covariance="empirical")).compute(new)
    for name in ("mahalanobis", "rmds"):
        one, two = (value.argsort().argsort().double() for value in (shrunk[name], empirical[name]))
        assert torch.corrcoef(torch.stack([one, two]))[0, 1] > 0.999, name


@pytest.mark.parametrize("shaping", ["pooled", "maps"])
def test_shaped_scores_are_the_librarys(good: Path, shaping: Any) -> None:
    made = fitted(good, shaping=shaping, pruned=0.8)
    network = made.network
    measured = made.measure(batch())
    found = made.compute_scores(measured)
    given = network.outputs(batch().images, maps=True)
    maps = given.maps if shaping == "maps" else given.features[:, :, None, None]
    assert maps is not None
    for name, kind in {"ash": theirs.ASH, "scale": theirs.SCALE}.items():
        own = kind(None, head=lambda x: network.head(x.mean((2, 3))), percentile=0.8)
        torch.testing.assert_close(
            found[name].float(), own.predict_feature_maps(maps.contiguous()), rtol=1e-4, atol=1e-4
        )


def test_features_that_are_all_zero_have_scores(made: Posthoc) -> None:
    """An image that switches every feature off is unusual, not unreadable."""
    measured = made.measure(batch())
    nothing = {**measured.vectors, "features": torch.zeros_like(measured.vectors["features"])}
    found = made.compute_scores(replace(measured, vectors=nothing))
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_odin_is_the_librarys(made: Posthoc) -> None:
    network = made.network
    own = theirs.ODIN(network.module, eps=0.0014, temperature=1000, norm_std=network.std)
    expected = own.predict(network.normalize(batch().images))
    found = made.compute_scores(made.measure(batch()))["odin"]
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in network.module.parameters())


def test_odin_costs_two_passes_more_and_only_when_asked(good: Path, made: Posthoc) -> None:
    plain = fitted(good)
    assert set(plain.calibration_scores) == NAMES
    assert set(made.calibration_scores) == NAMES | {"odin"}
    assert (plain.cost().nfe, made.cost().nfe) == (1, 3)
    assert fitted(good, score="odin").score_name == "odin"
    with pytest.raises(FaroutError, match="odin was not measured"):
        plain.with_scoring(score="odin")


# few images


@pytest.mark.parametrize("count", [2, 5, 11, 40])
def test_fewer_images_than_features(count: int) -> None:
    good, new = features(count, width=64), features(20, width=64, seed=2)
    with torch.no_grad():
        found = FittedScores.fit(good, LinearHead(layer(width=64)), SETTINGS).compute(new)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert len(found["mahalanobis"].unique()) == 20


def test_a_class_that_is_never_predicted() -> None:
    last = layer()
    with torch.no_grad():
        last.bias[2] = -100
    good, head = features(50), LinearHead(last)
    learnt = FittedScores.fit(good, head, SETTINGS)
    assert len(learnt.arrays["means"]) <= 3
    torch.testing.assert_close(torch.from_numpy(learnt.arrays["patterns"][2]), good.mean(0))


def test_what_cannot_be_learnt_from_is_refused() -> None:
    copies = features(1).expand(20, -1)
    with pytest.raises(FaroutError, match=r"do not differ|no residual"):
        FittedScores.fit(copies, LinearHead(layer()), SETTINGS)
    with pytest.raises(FaroutError, match="more than 10 statistics images"):
        FittedScores.fit(features(10), LinearHead(layer()), replace(SETTINGS, covariance="empirical"))


def test_the_rank_of_the_neighbor_suits_the_number_of_images() -> None:
    assert [limit_rank(50, count) for count in (2, 99, 1000, 4999, 5000, 90000)] == [1, 1, 10, 49, 50, 50]


# the detector


def test_the_batch_does_not_matter(made: Posthoc, good: Path) -> None:
    whole, kept = made.score(good), made.runtime
    made.runtime = replace(kept, batch_size=7)
    try:
        parts = made.score(open_source(good).subset(list(range(59, -1, -1))))
    finally:
        made.runtime = kept
    assert_same_scores(parts, whole, made)


def test_save_and_load_give_every_score_exactly(made: Posthoc, good: Path, tmp_path: Path) -> None:
    made.save(tmp_path / "d")
    again = load(tmp_path / "d")
    assert isinstance(again, Posthoc)
    assert again.network.content_hash == made.network.content_hash
    one, two = made.score(good), again.score(good)
    for name, value in one.indicators.items():
        assert np.array_equal(two.indicators[name], value), name
    assert again.describe_statistics()["k"] == 1


def test_every_score_can_be_chosen_after_the_fact(made: Posthoc) -> None:
    for name in NAMES | {"odin"}:
        other = made.with_scoring(score=name)
        assert other.score_name == name
    near = made.with_scoring(k=1, gamma=0.5, covariance="shrunk", dimensions=3)
    assert near.describe_statistics()["residual_dimensions"] == made.network.width - 3
    with pytest.raises(FaroutError, match="cannot be changed after the fit"):
        made.with_scoring(pruned=0.9)


def test_images_unlike_the_good_ones_score_higher(made: Posthoc, good: Path, tmp_path: Path) -> None:
    """In the direction that the contract names; an untrained network knows no more than distances."""
    far = made.score(pictures(tmp_path / "far", 20, low=0, spread=255))
    near = made.score(good)
    for name in ("knn", "mahalanobis", "vim"):
        assert np.median(far.indicators[name]) > np.median(near.indicators[name]), name


class Pooled(nn.Module):
    """A network whose features are not averages of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).amax((2, 3)))


def test_networks_without_maps_score_all_but_shaped_maps(good: Path) -> None:
    torch.manual_seed(0)
    network = Classifier.from_module(Pooled(), [0.5], [0.25], size=8, channels=1)
    with pytest.warns(MisleadingResultWarning, match="not known which images"):
        made = Posthoc().fit(good, classifier=network, alpha=0.1, statistics=30)
    assert set(made.calibration_scores) == NAMES
    with pytest.raises(FaroutError, match="shaping='pooled'"), pytest.warns(MisleadingResultWarning):
        Posthoc(shaping="maps").fit(good, classifier=network, alpha=0.1, statistics=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "mps"}, "score is 'mps'.*msp"),
        ({"shaping": "map"}, "shaping"),
        ({"covariance": "full"}, "covariance"),
        ({"pruned": 1.0}, "pruned is a share"),
        ({"clip": -0.1}, "clip is a share"),
        ({"sparsity": 2}, "sparsity is a share"),
        ({"k": 0}, "at least 1"),
        ({"dimensions": 0}, "at least 1"),
        ({"odin_temperature": 0.0}, "more than 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        Posthoc(**changes)


def test_a_classifier_is_required(good: Path) -> None:
    with pytest.raises(FaroutError, match="no labels"):
        Posthoc().fit(good, alpha=0.1)


def test_without_a_classifier_one_is_trained_on_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farout.classifiers.train import PRESETS

    short = {**PRESETS["tiny"]["training"], "steps": 4, "batch_size": 8, "warmup": 0}
    monkeypatch.setitem(PRESETS["tiny"], "training", short)
    for number, name in enumerate(("a", "b")):
        pictures(tmp_path / "tree" / name, 30, low=100 * number, seed=number)
    made = Posthoc().fit(tmp_path / "tree", alpha=0.1, statistics=15)
    assert made.network.class_names == ("a", "b")
    assert made.network.trained_on
    assert not made.network.trained_on & (made.statistics_hashes | made.calibration_hashes)


def test_what_cannot_work_is_refused_before_a_classifier_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("farout.detectors.network_training.train_on_source", never)
    for number, name in enumerate(("a", "b")):
        pictures(tmp_path / "tree" / name, 30, low=100 * number, seed=number)
    with pytest.raises(FaroutError, match="no class of outliers"):
        Posthoc(score="extra").fit(tmp_path / "tree", alpha=0.1, statistics=15)


@pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")
def test_the_random_control_has_a_fresh_classifier(made: Posthoc, good: Path, tmp_path: Path) -> None:
    from farout.evaluation.baselines import fit_baselines

    (rated,) = fit_baselines(
        made,
        tmp_path,
        standard_baselines=False,
        trivial_baselines=False,
        random_weights_baseline=True,
        baseline_images=str(good),
        baseline_limit=1000,
    )
    assert rated.detector.classifier.provenance["random_weights"] == 0
    assert rated.detector.fingerprint != made.fingerprint
