"""The patches detector: what its map says of a position, and which model and bank it takes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from farout import load
from farout.core.errors import FaroutError
from farout.data.batching import Batch
from farout.data.sources import open_source
from farout.detectors.patches import Patches
from farout.detectors.patches.positions import (
    PositionStatistics,
    average_highest,
    equal_layer_weights,
    nearest_distances,
    rank_by_hash,
    sample_indices,
)
from farout.detectors.semantic import Semantic
from farout.training.loop import TrainingRun
from small import pictures
from tolerances import assert_close

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")]

SMALL = {"size": 64, "side": 8, "hidden": 64, "embedding": 16, "positions": 1500, "epochs": 12, "batch": 64}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes of changing strength, 32 x 32."""
    folder = tmp_path_factory.mktemp("patches") / "good"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(60):
        waves = np.sin(np.arange(32) * 0.8 + generator.uniform(0, 6))[None] * generator.uniform(30, 60) + 128
        pixels = waves + generator.normal(0, 5, (32, 32))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def fitted(good: Path) -> Patches:
    return Patches(**SMALL).fit(good, alpha=0.1, statistics=15)


def batch(detector: Patches, source: object) -> Batch:
    return next(iter(detector.load_batches(open_source(source))))  # type: ignore[arg-type]


# -- the arithmetic -----------------------------------------------------------------------------------------------


def test_every_layer_weighs_the_same() -> None:
    weights = equal_layer_weights((2, 8))
    assert float(weights[:2].sum()) == pytest.approx(0.5)
    assert float(weights.sum()) == pytest.approx(1)


def test_the_nearest_is_found_exactly() -> None:
    """Also where products cancel: a copy of a row of the bank is at distance 0, far from the origin."""
    torch.manual_seed(0)
    bank = torch.randn(50, 6) + 1000
    vectors = torch.cat([bank[:3], torch.randn(4, 6) + 1000])
    expected = torch.cdist(vectors.double(), bank.double()).min(1).values.float()
    found = nearest_distances(vectors - 1000, bank - 1000)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found[:3] == 0).all()


def test_the_highest_share_is_one_position_at_least() -> None:
    values = torch.arange(400.0).reshape(2, 200)
    assert average_highest(values, 0.01).tolist() == [198.5, 398.5]
    assert average_highest(values, 1e-6).tolist() == [199, 399]
    assert torch.equal(average_highest(values, 1.0), values.mean(1))


def test_drawn_positions_depend_on_content_alone() -> None:
    assert torch.equal(sample_indices(100, 7, 0, "a"), sample_indices(100, 7, 0, "a"))
    assert not torch.equal(sample_indices(100, 7, 0, "a"), sample_indices(100, 7, 0, "b"))
    assert not torch.equal(sample_indices(100, 7, 0, "a"), sample_indices(100, 7, 1, "a"))
    assert sample_indices(5, 7, 0, "a").tolist() == [0, 1, 2, 3, 4]
    assert rank_by_hash("a", 0) != rank_by_hash("a", 1)


def test_positions_are_in_rows(fitted: Patches, good: Path) -> None:
    images = batch(fitted, good)
    grid = fitted.backbone.feature_grid(images.images[:1], 8)
    features = fitted._features_at_positions(Batch(images.keys[:1], images.images[:1], None, (0,)))
    assert_close(features[0, 1], grid[0, :, 0, 1])
    assert_close(features[0, 9], grid[0, :, 1, 1])


def test_deviations_of_good_positions_have_mean_zero_and_deviation_one() -> None:
    """Levels whose errors go together or not, on different scales: the map's unit stays the same."""
    draws = np.random.default_rng(0)
    common = draws.normal(size=(5000, 1))
    errors = np.hstack([common * 3 + 10, common * 0.1 + draws.normal(size=(5000, 1)) * 0.1])
    made = PositionStatistics.fit(errors, draws.gamma(2.0, size=5000))
    values = made.standardize_errors(torch.from_numpy(errors)).numpy()
    assert values.mean() == pytest.approx(0, abs=1e-9)
    assert values.std(ddof=1) == pytest.approx(1)
    with pytest.raises(FaroutError, match="numbers"):
        PositionStatistics.fit(np.full((5, 2), np.nan), np.ones(5))


def test_the_error_is_the_weighted_square_of_what_does_not_come_back(fitted: Patches) -> None:
    """A denoiser that always answers 0 leaves the features themselves: no noise is in the error."""
    kept = fitted.denoiser
    fitted.denoiser = lambda x, sigma: torch.zeros_like(x)  # type: ignore[assignment]
    try:
        z = torch.randn(64, sum(fitted.backbone.channels))
        found = fitted._reconstruction_errors(z)
    finally:
        fitted.denoiser = kept
    parts = z.split(fitted.backbone.channels, dim=1)
    expected = torch.stack([part.square().mean(1) for part in parts]).mean(0)
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2))


# -- maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 8), slice(0, 8)), (slice(20, 28), slice(8, 16))])
def test_both_maps_point_at_the_damage(fitted: Patches, good: Path, rows: slice, columns: slice) -> None:
    image = open_source(good)[0].clone()
    image[:, rows, columns] = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    measured = fitted.measure(batch(fitted, image[None].float() / 255), maps=True)
    assert measured.maps is not None
    assert measured.maps.shape == (1, 64, 64)
    for name in ("diffusion", "knn"):
        heat = measured.pictures[name][0, 0]
        row, column = divmod(int(heat.argmax()), 64)
        assert rows.start * 2 - 4 <= row < rows.stop * 2 + 4, name
        assert columns.start * 2 - 4 <= column < columns.stop * 2 + 4, name
        assert heat.max() > 4


def test_damaged_images_score_higher(fitted: Patches, good: Path) -> None:
    images = torch.stack([open_source(good)[i] for i in range(10)]).float() / 255
    damaged = images.clone()
    damaged[:, :, 4:12, 20:28] = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    one, two = fitted.score(images), fitted.score(damaged)
    for name in ("diffusion_top", "knn_top"):
        assert (two.indicators[name] > one.indicators[name] + 1).all()


@pytest.mark.slow
def test_maps_are_of_the_chosen_score(fitted: Patches, good: Path) -> None:
    own = fitted.measure(batch(fitted, good), maps=True)
    other = fitted.with_scoring(score="knn_mean").measure(batch(fitted, good), maps=True)
    assert own.maps is not None
    assert other.maps is not None
    assert torch.equal(own.maps, own.pictures["diffusion"][:, 0])
    assert torch.equal(other.maps, own.pictures["knn"][:, 0])


def test_maps_change_no_score_and_agree_in_any_batch(fitted: Patches, good: Path) -> None:
    whole = batch(fitted, good)
    measured = fitted.measure(whole, maps=True)
    assert torch.equal(fitted.measure(whole).values, measured.values)  # type: ignore[arg-type]
    alone = fitted.measure(Batch(whole.keys[7:8], whole.images[7:8], None, (7,)), maps=True)
    assert_close(alone.maps[0], measured.maps[7])  # type: ignore[index]


# -- models and banks ---------------------------------------------------------------------------------------------


def test_the_middle_layers_are_seen(fitted: Patches) -> None:
    assert fitted.backbone.layers == (1, 2, 3)
    assert Patches(layers=(2, 4), size=32).build_features().layers == (2, 4)


def test_cost_counts_positions_levels_and_draws(fitted: Patches) -> None:
    cost = fitted.cost()
    assert cost.nfe == 8 * 8 * 2 * 2
    assert cost.gmacs > 0


def test_at_most_max_images_are_used(good: Path) -> None:
    made = Patches(**{**SMALL, "epochs": 1, "max_images": 5}).fit(good, alpha=0.1, statistics=15)
    assert made.diffusion is not None
    assert len(made.diffusion.trained_on) == 5
    assert made.describe_statistics()["bank"] == 5 * 64
    assert not made.diffusion.trained_on & (made.statistics_hashes | made.calibration_hashes)


@pytest.mark.slow
def test_a_given_model_gets_a_bank_of_statistics_images(fitted: Patches, good: Path) -> None:
    """As for the control with random weights; the deviations come from the other half."""
    assert fitted.diffusion is not None
    made = Patches(**SMALL).fit(good, fitted.diffusion.with_random_weights(), alpha=0.1, statistics=16)
    assert made.describe_statistics()["bank"] == 8 * 64
    assert np.isfinite(made.score(good).score).all()
    again = Patches(**SMALL).fit(good, fitted.diffusion, alpha=0.1, statistics=6)
    assert again.describe_statistics()["bank"] == 3 * 64


@pytest.mark.slow
def test_a_second_fit_forgets_the_first_bank(fitted: Patches, good: Path) -> None:
    assert fitted.diffusion is not None
    made = Patches(**{**SMALL, "epochs": 1}).fit(good, alpha=0.1, statistics=15)
    first = made.get_state()["bank"]
    made.fit(good, fitted.diffusion, alpha=0.1, statistics=6)
    assert len(made.get_state()["bank"]) == 3 * 64 != len(first)


@pytest.mark.slow
def test_models_of_something_else_are_refused(fitted: Patches, good: Path) -> None:
    small = {"size": 64, "layers": (1, 2, 3), "hidden": 32, "embedding": 16, "blocks": 1}
    semantic = Semantic(denoiser="lfdn", bottleneck=32, epochs=1, **small)  # type: ignore[arg-type]
    pooled = semantic.fit(good, alpha=0.1, statistics=15).diffusion
    residual = Semantic(updates=2, **small).fit(good, alpha=0.1, statistics=15).diffusion  # type: ignore[arg-type]
    for of_images in (pooled, residual):
        with pytest.raises(FaroutError, match="pooled features"):
            Patches(**SMALL).fit(good, of_images, alpha=0.1)
    with pytest.raises(FaroutError, match="grid of side 8"):
        Patches(**{**SMALL, "side": 4}).fit(good, fitted.diffusion, alpha=0.1)
    with pytest.raises(FaroutError, match="another backbone"):
        Patches(**SMALL, layers=(2,)).fit(good, fitted.diffusion, alpha=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": "mse"}, "knn_top"),
        ({"side": 0}, "side"),
        ({"share": 0.0}, "share"),
        ({"max_images": 1}, "max_images"),
        ({"levels": (100,)}, "0 to 99"),
        ({"levels": ()}, "0 to 99"),
        ({"levels": (80, 80)}, "different"),
        ({"batch": 0}, "batch"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(FaroutError, match=words):
        Patches(**settings)


def test_measuring_before_a_fit_is_refused() -> None:
    with pytest.raises(FaroutError, match="fit"):
        Patches().measure(Batch((), torch.zeros(0, 3, 32, 32), None, ()))


def test_too_few_training_images_are_said(tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="left to train"):
        Patches(**SMALL).fit(pictures(tmp_path / "few", 12), alpha=0.1, statistics=30)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_detector(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, update = {**SMALL, "epochs": 2}, TrainingRun._update
    whole = Patches(**short).fit(good, alpha=0.1, statistics=15)

    def stopping(self: TrainingRun, batches: object) -> None:
        if self.completed == 20:
            raise KeyboardInterrupt
        update(self, batches)

    settings = {"alpha": 0.1, "statistics": 15, "checkpoints": tmp_path / "c"}
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_update", stopping)
        with pytest.raises(KeyboardInterrupt):
            Patches(**short).fit(good, **settings)
    assert Patches(**short).fit(good, **settings, resume=True).fingerprint == whole.fingerprint


def test_a_loaded_detector_makes_the_same_maps(fitted: Patches, good: Path, tmp_path: Path) -> None:
    fitted.save(tmp_path / "d")
    loaded = load(tmp_path / "d")
    whole = batch(fitted, good)
    assert torch.equal(loaded.measure(whole, maps=True).maps, fitted.measure(whole, maps=True).maps)  # type: ignore[arg-type]
    assert loaded.describe_statistics() == fitted.describe_statistics()


def test_nothing_is_written_to_the_cache_of_features(
    fitted: Patches, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of every position would fill a disk."""
    monkeypatch.setenv("FAROUT_CACHE", str(tmp_path))
    kept, fitted.runtime = fitted.runtime, replace(fitted.runtime, cache=True)
    try:
        assert all(each.features is None for each in fitted.load_batches(open_source(good)))
    finally:
        fitted.runtime = kept
    assert not list(tmp_path.iterdir())
