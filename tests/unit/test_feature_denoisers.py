"""The empirical and the residual denoiser: exact cases, and agreement with independent formulas."""

import numpy as np
import pytest
import torch

from farout.core.errors import FaroutError
from farout.diffusion.denoiser import GaussianDenoiser
from farout.diffusion.empirical import EmpiricalDenoiser, measure_neighbor_distances
from farout.features.densities import Mahalanobis, PrincipalAxes
from farout.features.residual_denoiser import ResidualDenoiser, ResidualNetwork

pytestmark = pytest.mark.numerics


def vectors(count: int = 50, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_empirical_denoiser_points_along_the_kernel_densitys_gradient() -> None:
    """sigma^2 grad log p = D(x) - x, with p the mean of Gaussian kernels, differentiated by torch."""
    rows, sigma = vectors(), 0.7
    x = vectors(5).flip(0).requires_grad_()
    log_density = torch.logsumexp(-torch.cdist(x, rows).square() / (2 * sigma**2), dim=1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    denoised = EmpiricalDenoiser(rows)(x.detach(), torch.full((5,), sigma))
    torch.testing.assert_close(denoised - x.detach(), sigma**2 * gradient)


def test_the_empirical_denoiser_goes_from_the_nearest_vector_to_the_mean() -> None:
    rows = vectors()
    denoiser = EmpiricalDenoiser(rows)
    x = rows[:3] + 0.01
    torch.testing.assert_close(denoiser(x, torch.full((3,), 1e-3)), rows[:3])
    torch.testing.assert_close(denoiser(x, torch.full((3,), 1e4)), rows.mean(0).expand(3, -1), atol=1e-6, rtol=0)
    assert denoiser.evaluations == 6


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sigma = vectors(), torch.full((50,), 0.5)
    whole = EmpiricalDenoiser(rows)(rows + 0.1, sigma)
    monkeypatch.setattr("farout.diffusion.empirical._BYTES_PER_CHUNK", 8 * 50 * 2)  # two rows at a time
    torch.testing.assert_close(EmpiricalDenoiser(rows)(rows + 0.1, sigma), whole)


def test_scales_widen_the_kernels_of_single_vectors() -> None:
    """Between two vectors, the one with the wider kernel has the larger weight: exp(-1/8) against exp(-1/2)."""
    pair = torch.tensor([[0.0], [2.0]])
    middle = EmpiricalDenoiser(pair, torch.tensor([1.0, 2.0]))(torch.ones(1, 1), torch.ones(1))
    assert float(middle) == pytest.approx(2 / (1 + np.exp(1 / 8 - 1 / 2)))
    equal = EmpiricalDenoiser(vectors(), torch.full((50,), 0.5))(vectors(5) + 0.1, torch.ones(5))
    torch.testing.assert_close(equal, EmpiricalDenoiser(vectors())(vectors(5) + 0.1, torch.full((5,), 0.5)))
    for scales in (torch.ones(3), torch.zeros(2)):
        with pytest.raises(FaroutError, match="positive scales"):
            EmpiricalDenoiser(pair, scales)


def test_distances_of_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of step 1, the second neighbor is at distance 1, the tenth at 5, and at the ends at 2 and 10."""
    line = torch.arange(200.0)[:, None]
    second = measure_neighbor_distances(line, 2)
    assert second[[0, 100, 199]].tolist() == pytest.approx([2, 1, 2])
    monkeypatch.setattr("farout.diffusion.empirical._BYTES_PER_CHUNK", 8 * 200 * 7)  # seven rows at a time
    assert measure_neighbor_distances(line)[[0, 100]].tolist() == pytest.approx([10, 5])
    assert measure_neighbor_distances(line[:3]).tolist() == pytest.approx([2, 1, 2])
    copies = torch.cat([line, torch.zeros(20, 1)])
    assert measure_neighbor_distances(copies)[-1] == pytest.approx(0.5)
    assert measure_neighbor_distances(torch.zeros(20, 3)).tolist() == pytest.approx([1e-6] * 20)
    with pytest.raises(FaroutError, match="expected vectors"):
        measure_neighbor_distances(torch.zeros(0, 3))


def test_the_untrained_residual_denoiser_is_the_gaussians() -> None:
    variances = torch.tensor([0.1, 1.0, 4.0])
    denoiser = ResidualDenoiser(ResidualNetwork(3, hidden=8, embedding=4, blocks=1), variances)
    x, sigma = vectors(20, 3).float(), torch.rand(20) + 0.1
    exact = GaussianDenoiser(torch.zeros(3), torch.diag(variances))
    torch.testing.assert_close(denoiser(x, sigma), exact(x, sigma))


def test_the_loss_of_the_gaussian_on_gaussian_data_is_one() -> None:
    """The weight makes the unexplained variance 1 at every level and in every coordinate."""
    variances = torch.tensor([0.1, 1.0, 4.0])
    denoiser = ResidualDenoiser(ResidualNetwork(3, hidden=8, embedding=4, blocks=1), variances)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(40000, 3, generator=generator) * variances.sqrt()
    assert float(denoiser.loss(x0, generator, 0.1, 3.0)) == pytest.approx(1, abs=0.03)


def test_principal_axes_are_uncorrelated_and_whitened_ones_give_the_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + 3
    whitened = PrincipalAxes.fit(x, whiten=True)
    np.testing.assert_allclose(np.square(whitened.transform(x)).mean(1), Mahalanobis.fit(x).score(x))
    plain = PrincipalAxes.fit(x, whiten=False)
    covariance = np.cov(plain.transform(x).T)
    assert plain.variances.mean() == pytest.approx(1)
    np.testing.assert_allclose(covariance, np.diag(plain.variances), atol=0.05)
    np.testing.assert_allclose(PrincipalAxes.from_arrays(plain.to_arrays()).transform(x), plain.transform(x))
