"""Rate and curvature of the path to noise: exact on Gaussian data, what each score sees, what it takes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.detectors.calibration import set_calibration
from farout.detectors.diffpath import DiffPath
from farout.diffusion.denoiser import GaussianDenoiser
from farout.diffusion.schedule import NoiseSchedule
from small import conditional, latent, model

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:it is not known which images:farout.core.errors.MisleadingResultWarning"),
]

SIZE = 64
SPREAD = torch.linspace(0.1, 0.4, SIZE, dtype=torch.float64)
"""Standard deviations of the pixels in [-1, 1], independent; their mean in the model is 0."""


def images(count: int, factor: float = 1.0, mean: float = 0.0, seed: int = 0) -> Batch:
    """In [0, 1], pixels that are N(mean, factor^2 SPREAD^2) in [-1, 1]."""
    drawn = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pixels = (1 + mean + factor * SPREAD * drawn) / 2
    return Batch(tuple(map(str, range(count))), pixels.reshape(-1, 1, 8, 8).float(), None, tuple(range(count)))


def detector(**arguments: object) -> DiffPath:
    """With the exact denoiser of that data, which is clamped only on request."""
    made = DiffPath(**{"clamp": False, **arguments})
    untrained = model()
    made.preprocessing = untrained.preprocessing
    made.diffusion = untrained
    made.attach_runtime(Runtime())
    exact = GaussianDenoiser(torch.zeros(SIZE), torch.diag(SPREAD**2))
    made.denoiser = untrained.clamp_x0(exact) if made.config["clamp"] else exact
    return made


def by_hand(x: Tensor, levels: list[int], clamp: float) -> tuple[Tensor, Tensor]:
    """eps (B, n, D) and its derivative (B, n - 1, D) on the Gaussian's path in Euler steps, float64."""
    sigmas = NoiseSchedule().sigma[levels]
    found = []
    for sigma, then in zip(sigmas, [*sigmas[1:], sigmas[-1]], strict=True):
        eps = (x - (x * SPREAD**2 / (SPREAD**2 + sigma**2)).clamp(-clamp, clamp)) / sigma
        found.append(eps)
        x = x + (then - sigma) * eps
    eps = torch.stack(found, dim=1)
    return eps, len(levels) * eps.diff(dim=1)


@pytest.mark.parametrize("clamp", [False, True])
def test_powers_are_those_of_the_gaussian_path(clamp: bool) -> None:
    batch = images(6, factor=3.0)
    x = 2 * batch.images.double().flatten(1) - 1
    assert float(x.abs().max()) > 1.5, "clamping is to be seen"
    parts = by_hand(x, [0, 250, 500, 750], 1.0 if clamp else torch.inf)
    measured = detector(steps=4, clamp=clamp).measure(batch)
    for name, values in zip(("rate", "curvature"), parts, strict=True):
        powers = torch.stack([values.pow(power).mean((1, 2)) for power in (1, 2, 3)], dim=1)
        torch.testing.assert_close(measured.vectors[name].double(), powers, rtol=1e-3, atol=1e-5)


def test_ten_evaluations_one_a_step() -> None:
    for arguments, count in (({}, 10), ({"steps": 5}, 5), ({"clamp": False}, 10)):
        made = DiffPath(**arguments)
        made.preprocessing = model().preprocessing
        made.diffusion = model()
        made.attach_runtime(Runtime())
        assert made.cost().nfe == count


@pytest.fixture(scope="module")
def scored() -> DiffPath:
    """Normal images are a little brighter than the model's."""
    made = detector()
    made.statistics = made.measure(images(300, mean=0.1))
    made.fit_statistics(made.statistics)
    set_calibration(made, made.measure(images(200, mean=0.1, seed=1)))
    return made


def share_above(made: DiffPath, batch: Batch, name: str) -> float:
    """How often an image of the batch scores above a calibration image: the AUROC."""
    far, own = made.compute_scores(made.measure(batch))[name], made.compute_scores(made.calibration)[name]
    return float((far[:, None] > own[None]).double().mean())


@pytest.mark.parametrize("name", ["six", "curvature", "rate"])
def test_too_little_and_too_much_are_both_far(scored: DiffPath, name: str) -> None:
    for factor in (0.5, 2.0):
        assert share_above(scored, images(100, factor, 0.1, seed=2), name) > 0.95


def test_only_six_sees_the_sign(scored: DiffPath) -> None:
    """Section 3.5: images with the sign of their pixels flipped have the same norms."""
    good = images(100, mean=0.1, seed=2)
    flipped = Batch(good.keys, 1 - good.images, None, good.indices)
    for name in ("curvature", "rate"):
        assert share_above(scored, flipped, name) == pytest.approx(share_above(scored, good, name), abs=1e-3)
    assert share_above(scored, flipped, "six") > 0.9


def test_it_works_on_latents_and_with_a_null_condition() -> None:
    """Latents have no range to be clamped to."""
    shown = [images(count, seed=count).images.clamp(0, 1) for count in (40, 5)]
    for network in (latent(), conditional()):
        made = DiffPath(steps=3, clamp=True).fit(shown[0], diffusion=network, statistics=10)
        assert np.isfinite(made.score(shown[1]).score).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "at least 2"),
        ({"components": 0}, "at least 1"),
        ({"score": "best"}, "best"),
        ({"steps": 1000}, "999"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        DiffPath(**arguments).fit(images(40).images.clamp(0, 1), diffusion=model(), statistics=10)


def test_presets_are_those_of_paper_and_code() -> None:
    assert DiffPath.from_preset("paper").config["clamp"] is False
    assert DiffPath.from_preset("released").config["clamp"] is True
    assert DiffPath.from_preset("paper-1d").score_name == "curvature"
