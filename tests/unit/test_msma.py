"""Score norms at many levels: exact on Gaussian data, levels, densities, what it takes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.detectors.calibration import set_calibration
from farout.detectors.msma import MSMA
from farout.diffusion.denoiser import GaussianDenoiser
from farout.diffusion.schedule import NoiseSchedule
from small import conditional, latent, model

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"),
]

SIZE = 64
RANDOM = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=RANDOM, dtype=torch.float64))[0]
SPREAD = torch.linspace(0.01, 0.2, SIZE, dtype=torch.float64)
"""Standard deviations of the data along the columns of BASIS; the mean is 0.5."""


def images(count: int, factor: float = 1.0, seed: int = 0) -> Batch:
    """Pixels of N(0.5, factor^2 C), C = BASIS diag(SPREAD^2) BASIS^T."""
    drawn = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pixels = 0.5 + factor * (drawn * SPREAD) @ BASIS.T
    return Batch(tuple(map(str, range(count))), pixels.reshape(-1, 1, 8, 8).float(), None, tuple(range(count)))


def detector(**arguments: object) -> MSMA:
    """With the exact denoiser of that data."""
    made = MSMA(**arguments)
    untrained = model(data_range=(0.0, 1.0))
    made.preprocessing = untrained.preprocessing
    made.diffusion = untrained
    made.attach_runtime(Runtime())
    made.denoiser = GaussianDenoiser(torch.full((SIZE,), 0.5), BASIS @ torch.diag(SPREAD**2) @ BASIS.T)
    return made


def norms(made: MSMA, batch: Batch) -> Tensor:
    values = made.measure(batch).values
    assert values is not None
    return values[:, :, 0, 0].double()


def test_norms_are_those_of_the_gaussian_score() -> None:
    """s(x, sigma) = -(C + sigma^2 I)^-1 (x - mean), and the measured norm is sigma |s|."""
    made = detector()
    batch = images(5)
    along = (batch.images.double().flatten(1) - 0.5) @ BASIS
    for level, found in zip(made.levels, norms(made, batch).T, strict=True):
        sigma = float(NoiseSchedule().sigma[level])
        torch.testing.assert_close(found, sigma * (along / (SPREAD**2 + sigma**2)).norm(dim=1), rtol=1e-4, atol=1e-6)


def test_levels_are_even_in_log_sigma_between_the_ends() -> None:
    """In the schedule's reach; sigma is that of pixels in [0, 1], whatever range the network has."""
    schedule = NoiseSchedule()
    sigmas = schedule.sigma[list(detector(sigma_min=0.1, sigma_max=1.0, count=4).levels)]
    torch.testing.assert_close(sigmas, 10 ** torch.linspace(-1, 0, 4, dtype=torch.float64), rtol=0.05, atol=0)
    wide = MSMA(sigma_min=0.1, sigma_max=1.0, count=4)
    wide.diffusion = model(data_range=(-1.0, 1.0))
    wide.attach_runtime(Runtime())
    torch.testing.assert_close(schedule.sigma[list(wide.levels)], 2 * sigmas, rtol=0.05, atol=0)
    whole = detector(sigma_min=1e-9, sigma_max=1e9, count=7)
    assert (whole.levels[0], whole.levels[-1], len(whole.levels)) == (0, 999, 7)
    assert detector(levels=(30, 10)).levels == (10, 30)
    assert len(detector(sigma_min=0.04, sigma_max=0.05, count=50).levels) < 50, "what rounds to one level counts once"


def test_ten_evaluations_and_no_noise() -> None:
    made = MSMA.from_preset("paper")
    made.preprocessing = model().preprocessing
    made.diffusion = model()
    made.attach_runtime(Runtime())
    assert made.cost().nfe == made.rows_per_image == 10
    assert torch.equal(norms(made, images(3)), norms(made, images(3)))


@pytest.fixture(scope="module")
def scored() -> MSMA:
    made = detector()
    made.statistics = made.measure(images(300))
    made.fit_statistics(made.statistics)
    set_calibration(made, made.measure(images(200, seed=1)))
    return made


@pytest.mark.parametrize("name", ["mixture", "mahalanobis", "nearest"])
def test_too_small_and_too_large_norms_are_both_far(scored: MSMA, name: str) -> None:
    own = scored.compute_scores(scored.calibration)[name]
    for factor in (0.5, 2.0):
        far = scored.compute_scores(scored.measure(images(100, factor, seed=2)))[name]
        assert float((far[:, None] > own[None]).double().mean()) > 0.95


def test_choices_are_refitted_without_a_network(scored: MSMA) -> None:
    found = scored.with_scoring(neighbors=1, components=1).compute_scores(scored.calibration)
    assert bool((found["nearest"] < scored.compute_scores(scored.calibration)["nearest"]).all())
    assert scored.mixture is not None
    with pytest.raises(FaroutError, match="cannot be changed after the fit"):
        scored.with_scoring(count=3)


def test_it_works_on_latents_and_with_a_null_condition() -> None:
    for network in (latent(), conditional()):
        made = MSMA(count=3).fit(images(40).images, diffusion=network, statistics=10)
        assert np.isfinite(made.score(images(5, seed=3).images).score).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "at least 1"),
        ({"sigma_min": 1.0, "sigma_max": 0.5}, "sigma_min < sigma_max"),
        ({"score": "best"}, "best"),
        ({"levels": (50, 100), "count": 2}, "count is 2, but is only used without levels"),
        ({"levels": (50, 100), "sigma_max": 2.0}, "sigma_max is 2.0"),
        ({"levels": (50, 2000)}, "999"),
        ({"levels": (50, 50)}, "different"),
        ({"levels": ()}, "different"),
        ({"sigma_min": 1e3, "sigma_max": 1e4}, "outside the schedule"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        detector(**arguments)
    with pytest.raises(FaroutError, match=message):
        MSMA(**arguments).fit(images(40).images, diffusion=model(), statistics=10)
