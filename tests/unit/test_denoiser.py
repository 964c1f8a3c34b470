"""The denoiser contract: adapters agree with each other, with the oracle, and whatever batch a row comes in."""

import pytest
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import ClampedDenoiser, GaussianDenoiser, GuidedDenoiser, NetworkDenoiser, expand_dims
from farout.diffusion.losses import LOG_SIGMA_MEAN, LOG_SIGMA_STD, denoising_loss, sample_levels, sample_sigmas
from farout.diffusion.noise import image_noise, shared_noise
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.unets import build_network
from tolerances import assert_close

pytestmark = pytest.mark.numerics

SCHEDULE = NoiseSchedule()


class _Exact(nn.Module):
    """A variance-preserving network that knows N(0, s^2 I) data: it answers eps, v or x0 exactly."""

    def __init__(self, prediction: str, spread: float = 0.5, extra: bool = False) -> None:
        super().__init__()
        self.prediction, self.variance, self.extra = prediction, spread**2, extra
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        abar = SCHEDULE.abar[t.long()].float().reshape(-1, *[1] * (x.ndim - 1))
        x0 = abar.sqrt() * self.variance / (abar * self.variance + 1 - abar) * x
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        answer = {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}
        out = answer[self.prediction]
        return torch.cat([out, torch.full_like(out, 7)], 1) if self.extra else out


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "learned-variance"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_adapter_is_the_oracle(prediction: str, extra: bool) -> None:
    network = _Exact(prediction, extra=extra)
    adapter = NetworkDenoiser(network, SCHEDULE, prediction)
    oracle = GaussianDenoiser(torch.zeros(12), 0.25 * torch.eye(12))
    t = torch.tensor([3, 250, 600])
    sigma = SCHEDULE.sigma_of(t).float()
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * expand_dims(
        sigma, torch.zeros(3, 3, 2, 2)
    )
    torch.testing.assert_close(adapter(x, sigma), oracle(x, sigma), atol=2e-4, rtol=1e-3)
    assert torch.equal(network.times[-1], t.float()), "a sigma of the table must reach the network as its exact t"
    assert adapter.evaluations == 3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_a_perfect_answer_is_the_irreducible_one(prediction: str) -> None:
    """Targets and answers share one convention: data that are one point have a denoiser with loss 0."""
    point = torch.full((64, 1, 2, 2), 0.3)

    class Knows(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            abar = SCHEDULE.abar[t.long()].float()[:, None, None, None]
            eps = (x - abar.sqrt() * 0.3) / (1 - abar).sqrt()
            v = abar.sqrt() * eps - (1 - abar).sqrt() * 0.3
            return {"epsilon": eps, "v_prediction": v, "sample": torch.full_like(x, 0.3)}[prediction]

    adapter = NetworkDenoiser(Knows(), SCHEDULE, prediction)
    assert float(denoising_loss(adapter, point, torch.Generator().manual_seed(0))) < 1e-5
    assert float(denoising_loss(adapter, point + 1, torch.Generator().manual_seed(0))) > 1e-2


def test_conversions_are_differentiable() -> None:
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    NetworkDenoiser(_Exact("v_prediction"), SCHEDULE, "v_prediction")(x, torch.tensor([0.5, 2.0])).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())


@pytest.mark.parametrize("batch", [1, 7, 32, 64])
def test_a_row_agrees_in_any_batch(batch: int) -> None:
    torch.manual_seed(0)
    network = build_network("tiny", 1, 12).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x, sigma = torch.randn(64, 1, 12, 12), torch.linspace(0.1, 3, 64)
    with torch.no_grad():
        whole = NetworkDenoiser(network, SCHEDULE)(x, sigma)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        adapter = NetworkDenoiser(network, SCHEDULE)
        parts = torch.cat([adapter(x[i], sigma[i]) for i in order.split(batch)])
    assert_close(parts, whole[order])
    assert adapter.evaluations == 64


def test_guidance_counts_both_branches_and_interpolates() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
            return mean.expand_as(x)

    adapter = NetworkDenoiser(Mean(), SCHEDULE, "sample")
    condition = Condition({"mean": torch.ones(3, 1)})
    x, sigma = torch.randn(3, 5), torch.ones(3)

    def null(count: int) -> Condition:
        return Condition({"mean": torch.zeros(count, 1)})

    for scale in (0.0, 0.5, 3.0):
        torch.testing.assert_close(GuidedDenoiser(adapter, scale, null)(x, sigma, condition), torch.full((3, 5), scale))
    assert adapter.evaluations == 18
    GuidedDenoiser(adapter, 1.0, null)(x, sigma, condition)
    assert adapter.evaluations == 21
    with pytest.raises(FaroutError, match="condition"):
        GuidedDenoiser(adapter, 2.0, null)(x, sigma)
    assert float(ClampedDenoiser(adapter, -0.5, 0.5)(x, sigma, condition).max()) == 0.5


def test_bad_sigmas_are_refused() -> None:
    adapter = NetworkDenoiser(_Exact("epsilon"), SCHEDULE)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(FaroutError, match="positive, finite"):
            adapter(torch.zeros(1, 3, 2, 2), torch.tensor([bad]))


def test_conditions_keep_rows_together() -> None:
    condition = Condition({"a": torch.arange(3), "b": torch.arange(6).reshape(3, 2)})
    assert condition.rows(torch.tensor([2, 0])).tensors["b"].tolist() == [[4, 5], [0, 1]]
    assert condition.repeat(2).tensors["a"].tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(FaroutError, match="leading dimension"):
        Condition({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(FaroutError, match="joined"):
        Condition.join([condition, Condition({"a": torch.zeros(1)})])


def test_noise_depends_on_its_name_alone() -> None:
    keys = ["a/1.png", "b/1.png", "c"]
    whole = image_noise(keys, (1, 4, 4), seed=3, level=170, repeat=0)
    assert torch.equal(image_noise(keys[::-1], (1, 4, 4), 3, 170, 0), whole.flip(0))
    assert torch.equal(image_noise(keys, (1, 4, 4), 3, 170.0, 0), whole)
    others = [shared_noise((1, 4, 4), *name) for name in [(3, 170, 0), (4, 170, 0), (3, 171, 0), (3, 170, 1)]]
    everything = [*whole, *others]
    for i, one in enumerate(everything):
        assert all(not torch.equal(one, other) for other in everything[i + 1 :])
    many = shared_noise((100, 100), 0, 1, 2)
    assert abs(float(many.mean())) < 0.04
    assert abs(float(many.std()) - 1) < 0.03


def test_levels_are_sampled_as_stated() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform, low = (sample_levels(20000, 1000, how, generator) for how in ("uniform", "low_noise"))
    assert abs(float((uniform < 250).float().mean()) - 0.25) < 0.02
    assert abs(float((low < 250).float().mean()) - 0.5) < 0.02
    assert int(uniform.min()) >= 0
    assert int(uniform.max()) <= 999


def test_log_normal_levels_are_spread_evenly_over_a_batch() -> None:
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    logs = sample_sigmas(20000, schedule, "log_normal", generator).log()
    assert abs(float(logs.mean()) - LOG_SIGMA_MEAN) < 0.03
    assert abs(float(logs.std()) - LOG_SIGMA_STD) < 0.06  # the smallest sigmas are clamped
    sigmas = sample_sigmas(10000, schedule, "log_normal", generator)
    assert float(schedule.sigma[0]) <= float(sigmas.min()) <= float(sigmas.max()) <= float(schedule.sigma[-1])
    few = sample_sigmas(4, schedule, "log_normal", generator).log()
    assert float(few[0]) < float(few[1]) < LOG_SIGMA_MEAN < float(few[2]) < float(few[3])


@pytest.mark.parametrize(("channels", "count"), [(1, 17_709_953), (3, 17_714_563)])
def test_the_small_network_is_the_papers(channels: int, count: int) -> None:
    """The released network's unused projections are in this count, here they are used."""
    assert sum(p.numel() for p in build_network("small", channels, 28).parameters()) == count
