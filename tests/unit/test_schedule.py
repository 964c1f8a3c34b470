"""The schedule is diffusers', and t, abar and sigma convert both ways without loss."""

import json

import diffusers
import pytest
import torch

from farout.core.errors import FaroutError
from farout.core.schema import create_dataclass
from farout.diffusion.schedule import NoiseSchedule

ALL = [
    NoiseSchedule("scaled_linear"),
    NoiseSchedule("linear", 1e-4, 0.02),
    NoiseSchedule("cosine"),
    NoiseSchedule("sigmoid", 1e-4, 0.02),
    NoiseSchedule("scaled_linear", snr_shift=0.25),
    NoiseSchedule("trained", num_levels=3, betas=(0.1, 0.2, 0.3)),
]


def test_abar_of_the_paper() -> None:
    """The reconstruction paper's schedule, by hand."""
    abar = NoiseSchedule("scaled_linear", 0.0015, 0.0195).abar
    published = {0: 0.9985, 10: 0.9832, 50: 0.917, 100: 0.823, 170: 0.679, 330: 0.350, 490: 0.124, 650: 0.0279}
    for t, value in published.items():
        assert float(abar[t]) == pytest.approx(value, abs=6e-4)
    assert float(abar[810]) == pytest.approx(0.0036, abs=6e-5)
    assert float(abar[970]) == pytest.approx(0.00025, abs=6e-6)
    assert float(abar[999]) == pytest.approx(0.00014, abs=6e-6)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.kind}-{s.snr_shift}")
def test_the_schedule_is_diffusers(schedule: NoiseSchedule) -> None:
    config = schedule.to_diffusers_config()
    theirs = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double()
    torch.testing.assert_close(theirs, schedule.abar, rtol=3e-4, atol=1e-8)
    again = NoiseSchedule.from_diffusers_config(config)
    torch.testing.assert_close(again.abar, schedule.abar, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.kind}-{s.snr_shift}")
def test_levels_convert_there_and_back_without_loss(schedule: NoiseSchedule) -> None:
    assert create_dataclass(NoiseSchedule, json.loads(json.dumps(schedule.to_dict())), "") == schedule
    t = torch.arange(schedule.num_levels)
    sigma = schedule.sigma_of(t)
    assert torch.equal(schedule.t_of(sigma.float()), t.double())
    torch.testing.assert_close(1 / (1 + sigma**2), schedule.abar)
    between = torch.tensor([0.3, 1.5])
    torch.testing.assert_close(schedule.t_of(schedule.sigma_of(between)), between.double())


def test_snr_shift_multiplies_the_ratio() -> None:
    plain, shifted = NoiseSchedule(), NoiseSchedule(snr_shift=0.25)
    torch.testing.assert_close((plain.sigma / shifted.sigma) ** 2, torch.full((1000,), 0.25, dtype=torch.float64))


def test_infinite_sigma_requires_sigma_max() -> None:
    betas = (0.5, 1.0)
    with pytest.raises(FaroutError, match="sigma_max"):
        NoiseSchedule("trained", num_levels=2, betas=betas)
    assert float(NoiseSchedule("trained", num_levels=2, betas=betas, sigma_max=150).sigma[-1]) == 150


def test_bad_values_are_named() -> None:
    with pytest.raises(FaroutError, match="999"):
        NoiseSchedule().sigma_of(1000)
    with pytest.raises(FaroutError, match="snr_shift"):
        NoiseSchedule(snr_shift=0)
    with pytest.raises(FaroutError, match="no schedule 'quadratic'"):
        NoiseSchedule("quadratic")  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.02), (-1e-4, 0.02), (1e-4, 1.5), (1e-4, float("nan"))])
def test_betas_out_of_range_are_named(start: float, end: float) -> None:
    """They would end in sigmas that are 0 or not numbers, and be called something else."""
    with pytest.raises(FaroutError, match="betas"):
        NoiseSchedule("linear", start, end)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "laplace"}, "laplace.*not supported"),
        (dict(diffusers.FlowMatchEulerDiscreteScheduler().config), "None.*not supported"),
        (dict(diffusers.DDIMScheduler(rescale_betas_zero_snr=True).config), "rescale_betas_zero_snr"),
    ],
    ids=["unknown", "flow matching", "abar 0"],
)
def test_schedulers_that_cannot_be_read_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        NoiseSchedule.from_diffusers_config(config)
