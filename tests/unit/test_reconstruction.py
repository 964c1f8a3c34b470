"""The reconstruction detector: exact on Gaussian data, and the checks of its card."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.preprocessing import Preprocessing
from farout.detectors.calibration import set_calibration
from farout.detectors.reconstruction import Reconstruction
from farout.detectors.reconstruction.denoising_paths import build_denoising_paths, paper_levels
from farout.detectors.reconstruction.difficulty import IMAGE_STATISTICS, AdjustedErrors, compute_image_statistics
from farout.detectors.reconstruction.metrics import METRICS
from farout.detectors.results import Measurements
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from small import latent, model
from tolerances import assert_close

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"),
]

SCHEDULE = NoiseSchedule()


class Gaussian(nn.Module):
    """The exact eps network of pixels N(mean, spread^2), independent."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, spread**2
        self.config = {"block_out_channels": (1,), "in_channels": 1}
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = SCHEDULE.abar[t.long()].float().to(x.device)[:, None, None, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * self.mean) / (abar * self.variance + 1 - abar)


MEAN, SPREAD = 0.5, 0.08


def detector(**arguments: object) -> Reconstruction:
    preprocessing = Preprocessing(size=(16, 16), channels=1, native=(16, 16))
    exact = DiffusionModel(Gaussian(MEAN, SPREAD), SCHEDULE, preprocessing, data_range=(0.0, 1.0))
    made = Reconstruction(**arguments)
    made.preprocessing = preprocessing
    made.diffusion = exact
    made.attach_runtime(Runtime())
    return made


def images(count: int = 200, spread: float = SPREAD, seed: int = 0) -> Batch:
    noise = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(
        tuple(f"{seed}/{i}" for i in range(count)), (MEAN + spread * noise).clamp(0, 1), None, tuple(range(count))
    )


def metric(measured: Measurements, name: str) -> Tensor:
    assert measured.values is not None
    return measured.values[..., METRICS.index(name)]


LEVELS = (50, 170, 330)


def test_oneshot_errors_are_those_of_the_posterior_mean() -> None:
    """E (x0hat - x0)^2 = s^2 sigma^2 / (s^2 + sigma^2); E (eps_hat - eps)^2 = s^2 / (s^2 + sigma^2)."""
    measured = detector(levels=LEVELS, noise="image").measure(images(100))
    for row, t in enumerate(LEVELS):
        sigma2 = float(SCHEDULE.sigma[t]) ** 2
        expected = SPREAD**2 * sigma2 / (SPREAD**2 + sigma2)
        assert float(metric(measured, "mse")[:, row].mean()) == pytest.approx(expected, rel=0.02)
        noise = SPREAD**2 / (SPREAD**2 + sigma2)
        assert float(metric(measured, "eps_error")[:, row].mean()) == pytest.approx(noise, rel=0.02)
        assert float(metric(measured, "score_norm")[:, row].mean()) == pytest.approx(1 - noise, rel=0.02)


def flow_error(t: int, end: float) -> float:
    """Expected squared error after the exact probability flow from level t to sigma = `end`."""
    start = float(SCHEDULE.sigma[t])
    gain = math.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))
    return (gain - 1) ** 2 * SPREAD**2 + (gain * start) ** 2


def test_exact_follows_the_flow_and_keeps_the_last_noise() -> None:
    """PLMS on the paper's grid, level by level the exact flow down to level 0, whose noise stays: at t = 11 the error
    is not far above its floor 1 - abar_0 = .0015.
    """
    levels = (11, 161, 321)
    measured = detector(mode="exact", levels=levels, draws=1, noise="image").measure(images(50))
    for row, t in enumerate(levels):
        mean = float(metric(measured, "mse")[:, row].mean())
        assert mean == pytest.approx(flow_error(t, float(SCHEDULE.sigma[0])), rel=0.12)
    assert float(metric(measured, "mse")[:, 0].mean()) > 0.0015


@pytest.mark.slow
def test_fast_lies_between_the_posterior_mean_and_the_flow() -> None:
    """Few steps fall short of a sample: its error is above the mean's and below the flow's, and rises with steps."""
    levels = (170, 330)
    errors = [
        metric(detector(mode="fast", levels=levels, steps=steps, draws=1).measure(images(50)), "mse").mean((0, 2))
        for steps in (1, 3, 8)
    ]
    for row, t in enumerate(levels):
        sigma2 = float(SCHEDULE.sigma[t]) ** 2
        few = [float(error[row]) for error in errors]
        assert few[0] == pytest.approx(SPREAD**2 * sigma2 / (SPREAD**2 + sigma2), rel=0.05)
        assert few[0] < few[1] < few[2] < flow_error(t, 0.0)


@pytest.mark.parametrize(("skip", "count"), [pytest.param(16, 350, marks=pytest.mark.slow), (64, 68)])
def test_evaluations_per_image(skip: int, count: int) -> None:
    """Start k of the paper's grid costs k + 2; the other grids are the solver's test."""
    assert detector(mode="exact", skip=skip, draws=1).cost().nfe == count


def test_evaluations_of_the_other_modes() -> None:
    assert detector(mode="fast", draws=1).cost().nfe <= 20
    assert detector(mode="oneshot").cost().nfe <= 16


@pytest.mark.slow
def test_evaluations_of_the_released_grid() -> None:
    assert detector(mode="exact", skip=16, draws=1, grid="released").cost().nfe == 350


def test_start_sets() -> None:
    """The paper's first code, and the released one."""
    assert paper_levels(16) == (1, 161, 321, 481, 641, 801, 961)
    assert paper_levels(16, "released") == (10, 170, 330, 490, 650, 810, 970)
    assert [len(paper_levels(s)) for s in (1, 2, 3, 4, 5, 8, 16, 32, 64)] == [100, 50, 34, 25, 20, 13, 7, 4, 2]
    assert [len(paper_levels(s, "released")) for s in (1, 2, 4, 8, 16, 32, 64)] == [99, 50, 25, 13, 7, 4, 2]


def test_antithetic_pairs_mirror_each_other() -> None:
    made = detector(levels=(100,), draws=4)
    noise = made._noise(("a", "b"), (1, 8, 8))
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0, 0, 0], -noise[0, 0, 1])
    assert torch.equal(noise[0, 0, 2], -noise[0, 0, 3])
    assert not torch.equal(noise[0, 0, 0], noise[0, 0, 2])


def test_noise_per_image_follows_the_key() -> None:
    made = detector(levels=(100,), draws=2, noise="image")
    batch = images(6)
    whole = made.measure(batch)
    some = Batch(batch.keys[3:], batch.images[3:], None, (3, 4, 5))
    assert whole.values is not None
    measured = made.measure(some).values
    assert measured is not None
    assert_close(measured, whole.values[3:])


@pytest.fixture(scope="module")
def scored() -> Reconstruction:
    made = detector(levels=LEVELS)
    made.statistics = made.measure_statistics(images(150))
    made.fit_statistics(made.statistics)
    set_calibration(made, made.measure(images(150, seed=1)))
    return made


def test_z_of_the_statistics_images_is_standard(scored: Reconstruction) -> None:
    """Mean 0 and deviation 1 at every level and metric."""
    z = scored.compute_z(scored.statistics)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, len(METRICS)).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3, len(METRICS)).double(), atol=1e-9, rtol=0)


def test_the_papers_score_by_hand(scored: Reconstruction) -> None:
    """mean over levels of z_mse + z_perceptual; mean |z|; one metric alone."""
    z = scored.compute_z(scored.calibration)
    mse, perceptual = z[..., METRICS.index("mse")], z[..., METRICS.index("perceptual")]
    combined = scored.compute_scores(scored.calibration)
    torch.testing.assert_close(combined["mean_z"], (mse + perceptual).mean(1))
    torch.testing.assert_close(combined["two_sided"], torch.stack([mse, perceptual], -1).abs().mean((1, 2)))
    torch.testing.assert_close(combined["mean_z_mse"], mse.mean(1))


def test_the_combined_score_by_hand(scored: Reconstruction) -> None:
    """Fisher's combination of the upper tails of the adjusted error and of the log distance."""
    found = scored.compute_scores(scored.statistics)
    z = found["adjusted_error"]
    assert abs(float(z.mean())) < 1e-9
    assert float(z.std()) == pytest.approx(1)
    assert bool((found["combined"] > -torch.special.log_ndtr(-z)).all())
    far = scored.compute_scores(scored.measure(images(20, spread=2 * SPREAD, seed=3)))["combined"]
    assert float(far.min()) > float(found["combined"].max())


def test_the_linear_error_is_that_of_a_wiener_filter() -> None:
    """Against noised images, filtered in the frequency domain."""
    generator = torch.Generator().manual_seed(0)
    image, sigma = torch.rand(1, 1, 12, 10, generator=generator).double(), 0.3
    found = compute_image_statistics(image.float(), torch.tensor([sigma, 2 * sigma]))
    assert found.shape == (1, 2, len(IMAGE_STATISTICS))
    frequency = torch.fft.fftfreq(12)[:, None] ** 2 + torch.fft.fftfreq(10) ** 2
    prior = 1 / (frequency.double() + 0.03**2)
    prior[0, 0] = 0
    prior = 0.1 * prior / prior.mean()
    centered = image[0, 0] - image.mean()
    noised = centered + sigma * torch.randn(4000, 12, 10, generator=generator).double()
    filtered = torch.fft.ifft2(torch.fft.fft2(noised) * prior / (prior + sigma**2)).real
    assert float(found[0, 0, 0].exp()) == pytest.approx(float((filtered - centered).square().mean()), rel=0.02)
    assert torch.equal(found[0, 0, 1:], found[0, 1, 1:]), "the others do not depend on the level"


def test_adjusted_errors_do_not_depend_on_the_difficulty() -> None:
    random = np.random.default_rng(0)
    difficulty = random.normal(size=(800, 2))
    log_errors = (3 * difficulty[:, :1] + difficulty[:, 1:] ** 2 + 0.1 * random.normal(size=(800, 1))).repeat(2, 1)
    fitted = AdjustedErrors.fit(difficulty[:400], log_errors[:400])
    residuals = fitted.transform(difficulty[400:], log_errors[400:])
    assert abs(float(np.corrcoef(residuals[:, 0], difficulty[400:, 0])[0, 1])) < 0.2
    assert 0.2 < residuals.std() < 2
    shifted = fitted.transform(difficulty[400:], log_errors[400:] + 0.5)
    assert float((shifted[:, :1] > residuals[None, :, 0]).mean()) > 0.95, "log errors have a deviation of about 3"


def test_measurements_of_earlier_versions_have_the_earlier_scores(scored: Reconstruction) -> None:
    """They have no image statistics; the folder of the detector names its score, so that it stays what it was."""
    values = scored.statistics.values
    assert values is not None
    old = Measurements(scored.statistics.keys, values[..., : len(METRICS)], scored.statistics.levels, METRICS)
    made = detector(levels=LEVELS, score="mahalanobis")
    made.fit_statistics(old)
    assert "combined" not in made.compute_scores(old)
    torch.testing.assert_close(
        made.compute_scores(old)["mahalanobis"], scored.compute_scores(scored.statistics)["mahalanobis"]
    )
    restored = detector(levels=LEVELS, score="mahalanobis")
    restored.set_state({name: value for name, value in made.get_state().items() if "error" not in name})
    assert torch.equal(restored.compute_scores(old)["mean_z"], made.compute_scores(old)["mean_z"])
    with pytest.raises(FaroutError, match="fit the detector again"):
        detector(levels=LEVELS).fit_statistics(old)


@pytest.mark.slow
def test_complexity_bias_and_its_cure(scored: Reconstruction) -> None:
    """Low-contrast images score as nearer one-sidedly; two-sided densities find them."""
    low = scored.compute_scores(scored.measure(images(200, spread=0.8 * SPREAD, seed=2)))
    own = scored.compute_scores(scored.calibration)

    def share_above(name: str) -> float:
        return float((low[name][:, None] > own[name][None]).double().mean())

    assert share_above("mean_z_mse") < 0.3
    assert share_above("mahalanobis") > 0.9
    assert share_above("mixture") > 0.9


def test_choices_of_levels_after_the_fact(scored: Reconstruction) -> None:
    some = scored.with_scoring(min_t=100, t_skip=1, score="mean_z")
    z = scored.compute_z(scored.calibration)[:, 1:]
    expected = (z[..., METRICS.index("mse")] + z[..., METRICS.index("perceptual")]).mean(1)
    torch.testing.assert_close(some.compute_scores(scored.calibration)["mean_z"], expected)
    assert some.compute_z(scored.calibration).shape[1] == 2
    assert scored.with_scoring(t_skip=2).compute_z(scored.calibration).shape[1] == 2
    with pytest.raises(FaroutError, match="leave none"):
        scored.with_scoring(min_t=900)


def test_maps_point_at_the_damage(scored: Reconstruction) -> None:
    batch = images(4, seed=5)
    damaged = batch.images.clone()
    damaged[:, :, 2:6, 9:13] = 1.0
    maps = scored.measure(Batch(batch.keys, damaged, None, batch.indices), maps=True).maps
    assert maps is not None
    assert maps.shape == (4, 16, 16)
    inside = maps[:, 2:6, 9:13].mean((1, 2))
    rest = (maps.sum((1, 2)) - maps[:, 2:6, 9:13].sum((1, 2))) / (16 * 16 - 16)
    assert bool((inside > rest + 3).all())
    plain = scored.measure(batch, maps=True).maps
    assert plain is not None
    assert abs(float(plain.mean())) < 0.5, "maps of ordinary images are standardised"


def test_paper_preset_is_the_papers() -> None:
    config = Reconstruction.presets["paper"]
    made = Reconstruction(**{**config, "perceptual": "lite0"})
    assert made.config["mode"] == "exact"
    assert made.score_name == "mean_z"
    names = ("mode", "levels", "skip", "grid", "steps", "solver")
    assert build_denoising_paths(SCHEDULE, **{name: made.config[name] for name in names}).levels == paper_levels(16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("mse", "beauty")}, "beauty"),
        ({"score": "best"}, "best"),
        ({"draws": 0}, "at least 1"),
        ({"levels": (50, 2000)}, "999"),
        ({"levels": (50, 50)}, "different"),
        ({"mode": "exact", "levels": (0, 10)}, "from 1"),
        ({"mode": "slow"}, "slow"),
        ({"mode": "slow", "levels": (50,)}, "slow"),
        ({"levels": ()}, "different"),
        ({"perceptual": "alex"}, "lpips"),
        ({"grid": "papers"}, "released"),
        ({"skip": 8}, "skip is 8, but is only used in mode exact without levels"),
        ({"mode": "exact", "levels": (50,), "grid": "released"}, "mode exact without levels"),
        ({"steps": 3}, "steps is 3, but is only used in mode fast"),
        ({"mode": "exact", "solver": "ddim"}, "in mode fast"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        detector(**arguments)


def test_it_works_on_latents() -> None:
    made = Reconstruction(levels=(50, 100), draws=2).fit(images(40).images, diffusion=latent(), statistics=10)
    assert np.isfinite(made.score(images(5, seed=3).images).score).all()


def test_scores_of_constant_metrics_are_numbers() -> None:
    made = Reconstruction(metrics=("mse",), density_metrics=("mse",))
    names = (*METRICS, *IMAGE_STATISTICS)
    values = torch.full((20, 2, 1, len(names)), 0.5)
    measurements = Measurements(tuple(map(str, range(20))), values, (50.0, 100.0), names)
    made.fit_statistics(measurements)
    assert all(bool(torch.isfinite(score).all()) for score in made.compute_scores(measurements).values())


def test_untrained_models_fit_too() -> None:
    """A model with size and channels of its own: gray 16 px images, an 8 px network."""
    made = Reconstruction(levels=(50,), draws=1).fit(images(40).images, diffusion=model(), statistics=10)
    assert made.preprocessing.native == (16, 16)
    assert made.preprocessing.size == (8, 8)
