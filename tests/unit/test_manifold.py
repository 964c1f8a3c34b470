"""The manifold of class vectors: the paper's rules, densities of the vectors, and sampling."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from curves import DIM, LABELS, SHORT, VECTORS, linear, short
from farout.core.errors import FaroutError
from farout.synthesis.ncis import network_training
from farout.synthesis.ncis.class_gaussians import ClassGaussians, sample_noise_round
from farout.synthesis.ncis.manifold import Manifold, ManifoldConfig, SampledVectors, fit_manifold
from farout.synthesis.ncis.volume_preserving import VolumePreservingNetwork
from farout.training.config import learning_rate
from tolerances import assert_close

pytestmark = pytest.mark.numerics


@pytest.fixture(params=[short, linear])
def either(request: pytest.FixtureRequest) -> Manifold:
    return request.param()


# -- the paper's rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_count_of_invariants_on_data_of_known_rank(rank: int) -> None:
    """Equal variances along r axes: the share passes 95 % at the last of them, so j = r - 1, and k = D - j."""
    axes = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))[0][:rank]
    signs = torch.tensor([[1.0 if index >> bit & 1 else -1.0 for bit in range(rank)] for index in range(2**rank)])
    x = signs @ axes + 3
    assert network_training.count_invariants(x, torch.zeros(len(x)), 1, 5) == [10 - (rank - 1)]
    assert network_training.count_invariants(x, torch.zeros(len(x)), 1, 100 - 1e-9) == [10], (
        "the first exceeds any share"
    )
    both = torch.cat([x, signs[:, :1] @ axes[:1]])
    labels = torch.cat([torch.zeros(len(x)), torch.ones(len(signs))])
    assert network_training.count_invariants(both, labels, 2, 5) == [10 - (rank - 1), 10]


def shares(*variances: float) -> Tensor:
    """Two vectors along each axis, with these shares of the variance."""
    x = torch.zeros(2 * len(variances), 4)
    for axis, variance in enumerate(variances):
        x[2 * axis : 2 * axis + 2, axis] = torch.tensor([1.0, -1.0]) * variance**0.5
    return x


def test_the_count_follows_the_share_and_is_an_integer_mean() -> None:
    """Of shares 0.6, 0.36 and 0.04 the second passes 95 % but not 97 %."""
    vectors = torch.cat([shares(0.6, 0.36, 0.04), shares(0.6, 0.39, 0.01)])
    labels = torch.arange(12) // 6
    assert network_training.count_invariants(vectors, labels, 2, 5) == [3, 3]
    assert network_training.count_invariants(vectors, labels, 2, 3) == [2, 3]
    config = replace(SHORT, map="linear", held_out=0.0, pca_variance=3.0)
    assert fit_manifold(vectors, labels, config).invariants == 2, "the integer part of 2.5"


def test_the_learning_rate_falls_to_a_tenth() -> None:
    rate = ManifoldConfig.learning_rate
    settings = network_training.training_config(ManifoldConfig(steps=11), 100, seed=0)
    factors = [learning_rate(settings, step) / rate for step in range(11)]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.55)
    assert learning_rate(network_training.training_config(ManifoldConfig(steps=1), 100, seed=0), 0) == rate


def test_training_uses_that_learning_rate_and_validates_at_even_intervals() -> None:
    history = short().history
    assert [entry["step"] for entry in history if "held_out_invariants" in entry] == [0, 4, 8, 12]
    updates = [entry for entry in history if "invariant_loss" in entry]
    assert [entry["step"] for entry in updates] == list(range(1, 13))
    assert updates[-1]["learning_rate"] == pytest.approx(0.1 * SHORT.learning_rate)
    assert all(entry["reconstruction_loss"] > 0 for entry in updates)
    assert len(short().reference_distances["training"]) == 108
    assert len(short().reference_distances["held_out"]) == 12
    assert ManifoldConfig.from_preset("paper").total_steps(50_000) == 156_400
    assert SHORT.total_steps(50_000) == 12


def test_two_updates_per_batch_with_one_computation_of_matrices_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reconstruction uses the weights after the first update, and z from before it."""
    torch.manual_seed(0)
    net = VolumePreservingNetwork(DIM, 2)
    calls = []
    kind = type(net.rotations.parametrizations.weight[0])
    monkeypatch.setattr(kind, "forward", lambda self, x, old=kind.forward: calls.append(1) or old(self, x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net(VECTORS[:8], LABELS[:8])
    twin = VolumePreservingNetwork(DIM, 2)
    twin.load_state_dict(net.state_dict())
    calls.clear()
    losses = []
    for update in network_training.flattening_step(4)(net, [VECTORS[:8], LABELS[:8]], torch.Generator()):
        optimizer.zero_grad()
        update["loss"].backward()
        optimizer.step()
        losses.append(update["loss"])
    flat, rebuilt = losses
    assert len(calls) == 2
    assert flat.item() == pytest.approx(before[:, -4:].square().mean().item(), rel=1e-5)
    steps = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(VECTORS[:8], LABELS[:8])[:, -4:].square().mean().backward()
    steps.step()
    code = torch.cat([before[:, :2], torch.zeros(8, 4)], dim=1)
    wanted = (twin.inverse(code, LABELS[:8]) - VECTORS[:8]).square().mean()
    assert rebuilt.item() == pytest.approx(wanted.item(), rel=1e-4)


# -- densities ----------------------------------------------------------------------------------------------------


def test_the_density_is_that_of_the_vectors(either: Manifold) -> None:
    """log N(z) + log |det dz/dx|, by automatic differentiation, shift and scale included."""
    x, labels = VECTORS[:4], LABELS[:4]
    for row, label, found in zip(x, labels, either.log_density(x, labels), strict=True):
        one = label[None]

        def turn(v: Tensor, one: Tensor = one) -> Tensor:
            return either.network((v[None] - either.shift) / either.scale, one)[0]

        jacobian = torch.autograd.functional.jacobian(turn, row).double()
        gaussians = either.gaussians
        normal = MultivariateNormal(gaussians.means[label], scale_tril=gaussians.cholesky[label])
        with torch.no_grad():
            wanted = normal.log_prob(turn(row).double()) + torch.linalg.slogdet(jacobian)[1]
        assert found.item() == pytest.approx(wanted.item(), abs=1e-3)


def test_a_linear_manifold_is_the_gaussian_of_the_vectors() -> None:
    """A rotation does not change the covariance and its regularization."""
    rows = torch.tensor([i for i in range(len(LABELS)) if LABELS[i] == 1])
    kept = fit_manifold(VECTORS, LABELS, replace(SHORT, map="linear", held_out=0.0), 2)
    table = VECTORS[rows].double()
    ridge = kept.gaussians.strength * kept.scale**2
    covariance = table.T.cov() + ridge * torch.eye(DIM)
    both = [VECTORS[label == LABELS].double().T.cov().diagonal().mean() for label in (0, 1)]
    assert ridge == pytest.approx(0.05 * float(sum(both)) / 2, rel=1e-4)
    normal = MultivariateNormal(table.mean(0), covariance)
    found = kept.log_density(VECTORS[rows], LABELS[rows])
    assert torch.allclose(found, normal.log_prob(table), atol=1e-4)
    apart = table - table.mean(0)
    wanted = (apart @ torch.linalg.inv(covariance) * apart).sum(1) / DIM
    assert torch.allclose(kept.distances(VECTORS[rows], LABELS[rows]), wanted, atol=1e-4)


def test_a_weight_in_units_of_the_vectors() -> None:
    config = replace(SHORT, map="linear", regularization="absolute", reg_weight=0.01)
    for scale in (True, False):
        fitted = fit_manifold(VECTORS, LABELS, replace(config, scale=scale), 2)
        assert fitted.gaussians.strength * fitted.scale**2 == pytest.approx(0.01)


def test_shrinkage_maximizes_the_likelihood_of_held_out_vectors() -> None:
    """Few vectors in many dimensions need more of it than many; the whole grid is searched."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1200, 12, generator=generator) * torch.linspace(0.05, 3, 12)
    labels, held = torch.arange(1200) % 2, (z[1000:], torch.arange(200) % 2)
    few, many = (ClassGaussians.fit_shrinkage(z[:n], labels[:n], ["a", "b"], held) for n in (16, 1000))
    assert many.strength < few.strength

    def likelihood(a: float) -> float:
        total = 0.0
        for label in (0, 1):
            table = z[:16][labels[:16] == label].double()
            cov = table.T.cov()
            normal = MultivariateNormal(table.mean(0), (1 - a) * cov + a * cov.diagonal().mean() * torch.eye(12))
            total += float(normal.log_prob(held[0][held[1] == label].double()).sum())
        return total

    others = [likelihood(a) for a in (0.001, 0.01, 0.1, 0.3, 0.9, 1.0)]
    assert likelihood(few.strength) >= max(others) - 1e-6
    fitted = fit_manifold(VECTORS, LABELS, replace(SHORT, map="linear", regularization="held_out"), 2)
    assert 0 < fitted.gaussians.strength <= 1


# -- sampling -----------------------------------------------------------------------------------------------------


def test_samples_are_mapped_back_by_the_inverse(either: Manifold) -> None:
    drawn = either.sample(8, seed=1)
    assert isinstance(drawn, SampledVectors)
    assert drawn.vectors.shape == (16, DIM)
    assert drawn.vectors.dtype == torch.float32
    assert drawn.labels.tolist() == [0] * 8 + [1] * 8
    assert torch.allclose(either.distances(drawn.vectors, drawn.labels), drawn.distance, rtol=1e-3)
    assert torch.allclose(either.log_density(drawn.vectors, drawn.labels), drawn.log_density, atol=5e-2)


def test_only_the_tail_of_each_round_is_kept(either: Manifold) -> None:
    """Compared with the densities of all candidates of the round."""
    drawn = either.sample(8, seed=1)
    for label in (0, 1):
        gaussians = either.gaussians
        normal = MultivariateNormal(gaussians.means[label], scale_tril=gaussians.cholesky[label])
        for number in range(2):
            z = (
                gaussians.means[label]
                + sample_noise_round(DIM, SHORT.candidates, 1, label, number) @ gaussians.cholesky[label].T
            )
            densities = normal.log_prob(z) - DIM * math.log(either.scale)
            bound = densities.quantile((SHORT.kept - 0.5) / (SHORT.candidates - 1))
            rows = slice(8 * label + 4 * number, 8 * label + 4 * number + 4)
            assert (drawn.log_density[rows] <= bound).all()
            assert torch.allclose(drawn.log_density[rows], densities.sort().values[:4])


def test_the_published_tail_is_the_published_share() -> None:
    config = ManifoldConfig.from_preset("paper")
    assert (config.candidates, config.kept) == (3330, 10)
    fitted = fit_manifold(VECTORS, LABELS, ManifoldConfig(map="linear"), 2)
    drawn = fitted.sample(10)
    everything = sample_noise_round(DIM, 3330, 0, 0, 0).square().sum(1) / DIM
    assert drawn.distance[:10].min() >= everything.quantile(1 - 0.0031)


def test_more_samples_do_not_change_the_first_ones(either: Manifold) -> None:
    few, many = either.sample(6, seed=1), either.sample(11, seed=1)
    assert_close(few.vectors[:6], many.vectors[:6])
    assert_close(few.vectors[6:], many.vectors[11:17])
    assert not torch.allclose(many.vectors[4:8], many.vectors[:4], atol=1e-3), "rounds differ"
    assert not torch.allclose(either.sample(6, seed=2).vectors, few.vectors, atol=1e-3)


def test_settings_of_sampling(either: Manifold) -> None:
    plain = either.sample(4)
    assert either.sample(4, temperature=2.0).distance.mean() == pytest.approx(4 * float(plain.distance.mean()))
    assert either.sample(4, candidates=400).distance.mean() > plain.distance.mean(), "4 of 400 are farther than 4 of 40"
    assert either.sample(4, candidates=4).distance.mean() < plain.distance.mean()
    for wrong in ({"per_class": 0}, {"kept": 41}, {"temperature": 0.0}, {"candidates": -1}):
        with pytest.raises(FaroutError, match="expected"):
            either.sample(**{"per_class": 4, **wrong})


@pytest.mark.slow
def test_every_setting_changes_the_samples() -> None:
    """Except the device, and the validations of so short a training."""
    other = {
        **{"map": "linear", "layers": 2, "orthogonal_map": "matrix_exp", "center": False, "scale": False},
        **{"pca_variance": 0.1, "steps": 5, "epochs": 1, "batch_size": 30, "learning_rate": 1e-2},
        **{"final_factor": 1.0, "train_fraction": 0.5, "held_out": 0.2, "regularization": "held_out"},
        **{"reg_weight": 0.2, "candidates": 41, "kept": 3, "temperature": 2.0},
    }
    assert {each.name for each in fields(ManifoldConfig)} - set(other) == {"validations", "checkpoint", "device"}
    plain = short().sample(6, seed=1).vectors
    for name, value in other.items():
        start = replace(SHORT, steps=ManifoldConfig.steps) if name == "epochs" else SHORT
        fitted = fit_manifold(VECTORS, LABELS, replace(start, **{name: value}), ["bow", "wave"], seed=3)
        assert not torch.equal(fitted.sample(6, seed=1).vectors, plain), name


def test_distances_of_samples_are_compared_with_held_out_vectors(either: Manifold) -> None:
    compared = either.compare_distances(either.sample(8))
    assert list(compared) == ["sampled", "training", "held_out"]
    assert compared["sampled"]["low"] > compared["training"]["high"]
    assert compared["held_out"]["low"] <= compared["held_out"]["median"] <= compared["held_out"]["high"]
    rows = either.distances(VECTORS, LABELS)
    known = torch.cat([either.reference_distances["training"], either.reference_distances["held_out"]])
    assert torch.allclose(rows.sort().values, known.sort().values, atol=1e-6)


def test_centering_is_undone() -> None:
    """Samples of shifted vectors are shifted: the released code leaves them at the origin."""
    for center in (True, False):
        config = replace(SHORT, map="linear", center=center)
        here, there = (fit_manifold(VECTORS + shift, LABELS, config, 2) for shift in (0.0, 50.0))
        a, b = (one.sample(4).vectors.mean(0) for one in (here, there))
        assert torch.allclose(b - a, torch.full((DIM,), 50.0), atol=0.5)
    trained = fit_manifold(VECTORS + 50, LABELS, SHORT, 2)
    assert torch.allclose(trained.sample(4).vectors.mean(0), torch.full((DIM,), 50.0), atol=5)
    assert torch.allclose(trained.from_flat_space(trained.to_flat_space(VECTORS, LABELS), LABELS), VECTORS, atol=1e-3)
