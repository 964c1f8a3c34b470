"""Methods of the denoising card: orders and evaluation counts on Gaussian data, and each row as if it were alone."""

import math

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from exact import exact_flow, oracle
from farout.core.errors import FaroutError
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.probability_flow import ProbabilityFlow
from farout.diffusion.solvers.registry import SOLVERS, create_solver, solver_path
from farout.diffusion.solvers.unipc import UniPC
from farout.diffusion.solvers.vp_time import VPTime

pytestmark = pytest.mark.numerics

LINEAR = NoiseSchedule("linear", 1e-4, 0.02)
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": NoiseSchedule(),
    "cosine": NoiseSchedule("cosine", sigma_max=150.0),
    "shifted": NoiseSchedule("linear", 1e-4, 0.02, snr_shift=4.0),
}


def even_schedule() -> NoiseSchedule:
    """A schedule whose sigma rises by 0.02 a level."""
    abar = 1 / (1 + (0.1 + 0.02 * torch.arange(201, dtype=torch.float64)) ** 2)
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return NoiseSchedule("trained", num_levels=201, betas=tuple(betas.tolist()))


def error(name: str, schedule: NoiseSchedule, levels: Tensor) -> float:
    denoiser, path = oracle(), schedule.sigma_of(levels).float()
    start, end = float(path[0]), float(path[-1])
    # data at the path's start, whichever way it leads
    spread = math.sqrt(0.3 + start**2)
    x = spread * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    found = create_solver(name, schedule)(denoiser, x, solver_path(name, path).repeat(5, 1))
    return float((found - exact_flow(denoiser, x, start, end)).abs().max()) / max(1.0, end)


# -- orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("pndm2", 2), ("ndm1", 1), ("ndm4", 4), ("ddim", 1)])
def test_orders_on_a_grid_of_levels(name: str, order: int) -> None:
    """Halving the strides divides the error by about 2^order."""
    ratio = error(name, LINEAR, torch.arange(819, 98, -20)) / error(name, LINEAR, torch.arange(819, 98, -10))
    assert 0.7 * 2**order < ratio < 1.5 * 2**order


def test_orders_where_sigma_falls_evenly() -> None:
    """The coefficients of PNDM are those of equal steps: there it has its name's orders."""
    schedule = even_schedule()
    for name, order in (("pndm2", 2), ("pndm4", 4)):
        coarse, fine = (error(name, schedule, torch.arange(200, 39, -stride)) for stride in (10, 5))
        assert 0.6 * 2**order < coarse / fine < 2 * 2**order
    assert error("pndm4", schedule, torch.arange(200, 39, -5)) < error("pndm2", schedule, torch.arange(200, 39, -5)) / 4


def test_unipc_is_of_second_order_and_beats_2m() -> None:
    levels = [torch.arange(819, 98, -stride) for stride in (40, 20)]
    coarse, fine = (error("unipc", LINEAR, each) for each in levels)
    assert coarse / fine > 3.5
    assert fine < error("dpm_solver_2m", LINEAR, levels[1])


@pytest.mark.parametrize(
    "kind", [kind if kind == "shifted" else pytest.param(kind, marks=pytest.mark.slow) for kind in SCHEDULES]
)
def test_methods_in_vp_time_know_every_schedule(kind: str) -> None:
    """The card's NDM and PF are wrong for other than linear betas; here the drift comes from the schedule."""
    schedule, levels = SCHEDULES[kind], torch.arange(899, 98, -10)
    assert error("ndm4", schedule, levels) < 2e-3
    assert error("ndm4", schedule, levels) < error("ndm1", schedule, levels) / 10
    assert error("probability_flow", schedule, levels) < 1e-2


@pytest.mark.parametrize("name", SOLVERS)
def test_rising_paths_invert(name: str) -> None:
    levels = torch.arange(99, 820, 10)
    limit = {"ddim": 0.1, "ndm1": 0.1, "probability_flow": 5e-3}.get(name, 1e-2)
    assert error(name, LINEAR, levels) < limit


# -- evaluations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"), [("ddim", 0), ("pndm2", 1), ("pndm4", 9), ("ndm1", 0), ("ndm4", 9), ("unipc", 0), ("plms", 1)]
)
@pytest.mark.parametrize("steps", [6, 15, 50])
def test_evaluations_of_the_cards_table(name: str, more: int, steps: int) -> None:
    """As in the denoising paper's code: n steps cost n, n + 1 or n + 9 evaluations a row."""
    path = LINEAR.sigma_of(torch.arange(20 * steps - 1, 0, -20)).float()
    path = torch.cat([path, torch.zeros(1)])
    denoiser = oracle()
    create_solver(name, LINEAR)(denoiser, torch.randn(3, 6), path.repeat(3, 1))
    assert denoiser.evaluations == 3 * (steps + more)


def test_fewer_steps_than_a_warm_up_are_refused_before_any_evaluation() -> None:
    for name, too_few in (("pndm2", [1.0, 0.0]), ("pndm4", [1.0, 0.5, 0.3, 0.0]), ("ndm4", [1.0, 0.5, 0.3])):
        denoiser = oracle()
        good = torch.linspace(1, 0.1, 9)
        with pytest.raises(FaroutError, match=f"{name} warms up over .* a path of {len(too_few) - 1} step"):
            create_solver(name, LINEAR)(
                denoiser, torch.ones(2, 6), noise_levels.pad_paths([good, torch.tensor(too_few)])
            )
        assert denoiser.evaluations == 0
    three = torch.tensor([[1.0, 0.6, 0.3, 0.1]])
    denoiser = oracle()
    create_solver("pndm4", LINEAR)(denoiser, torch.ones(1, 6), three)
    assert denoiser.evaluations == 3 + 9


def test_impossible_paths_are_named() -> None:
    with pytest.raises(FaroutError, match="starts at sigma 0"):
        create_solver("ddim", LINEAR)(oracle(), torch.ones(1, 6), torch.tensor([[0.0, 0.5]]))
    for name in ("pndm4", "ndm1", "ndm4"):
        with pytest.raises(FaroutError, match=f"{name} integrates in the time of its schedule"):
            create_solver(name, LINEAR)(oracle(), torch.ones(1, 6), torch.tensor([[300.0, 3.0, 2.0, 1.0, 0.5]]))
    flow = ProbabilityFlow(LINEAR)
    with pytest.raises(FaroutError, match="chooses its own steps"):
        flow(oracle(), torch.ones(1, 6), torch.tensor([[3.0, 2.0, 1.0]]))
    with pytest.raises(FaroutError, match="NaN"):
        flow(lambda x, sigma, condition=None: x * torch.nan, torch.ones(1, 6), torch.tensor([[3.0, 1.0]]))
    with pytest.raises(FaroutError, match="above 0"):
        ProbabilityFlow(LINEAR, tolerance=0.0)
    with pytest.raises(FaroutError, match="there is no solver 'euler'; expected one of ddim"):
        create_solver("euler", LINEAR)


# -- rows -----------------------------------------------------------------------------------------------------------


def starts(name: str) -> list[Tensor]:
    """Paths of different starts, lengths and directions; one stands still."""
    falling = [noise_levels.strided_path(LINEAR, start, 20) for start in (399, 99, 219)]
    every = [*falling, noise_levels.strided_path(LINEAR, 159, 20).flip(0), falling[0][:1]]
    return [solver_path(name, path) for path in every]


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    solver = create_solver(name, LINEAR)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    together = solver(oracle(), x, noise_levels.pad_paths(starts(name)))
    alone = [solver(oracle(), x[i : i + 1], noise_levels.pad_paths(starts(name)[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(together[:4], torch.cat(alone), atol=1e-6, rtol=1e-6)
    assert torch.equal(together[4], x[4])


def test_rows_of_probability_flow_choose_their_own_steps() -> None:
    """A stiff row does not cost an easy one anything."""
    flow, x = ProbabilityFlow(LINEAR), torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    sigmas = torch.tensor([[100.0, 0.02], [1.0, 0.9]])
    both, one, other = oracle(), oracle(), oracle()
    flow(both, x, sigmas)
    flow(one, x[:1], sigmas[:1])
    flow(other, x[1:], sigmas[1:])
    # rounding may decide whether a step of the adaptive method is accepted
    assert both.evaluations == pytest.approx(one.evaluations + other.evaluations, rel=0.05)
    assert one.evaluations > 1.5 * other.evaluations


class _Classes:
    """A conditional denoiser: the exact one of a Gaussian around each class's mean."""

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        assert len(condition) == len(x)
        mean = condition.tensors["mean"]
        return mean + (x - mean) * (0.1 / (0.1 + sigma**2))[:, None]


@pytest.mark.parametrize("name", SOLVERS)
def test_conditions_go_with_their_rows(name: str) -> None:
    """Each row ends near the mean of its own class, also when rows leave the batch or skip stages."""
    means = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    levels = [solver_path(name, noise_levels.strided_path(LINEAR, start, 20)) for start in (999, 599, 799)]
    sigmas = noise_levels.pad_paths(levels)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    found = create_solver(name, LINEAR)(_Classes(), sigmas[:, :1] * noise, sigmas, Condition({"mean": means}))
    assert torch.cdist(found, means).argmin(1).tolist() == [0, 1, 2]


def test_a_row_that_starts_late_warms_up_on_its_own() -> None:
    """Steps that stand still come first for one row: its three RK4 steps are its first three, not the batch's."""
    path = noise_levels.strided_path(LINEAR, 199, 20)
    late = torch.cat([path[:1].expand(2), path])
    early = torch.cat([path, path[-1:].expand(2)])
    x = torch.randn(1, 6).repeat(2, 1)
    solver, denoiser = create_solver("pndm4", LINEAR), oracle()
    found = solver(denoiser, x, torch.stack([early, late]))
    torch.testing.assert_close(found[0], found[1])
    assert denoiser.evaluations == 2 * (len(path) - 1 + 9)


# -- against other people's code ------------------------------------------------------------------------------------


def test_unipc_is_diffusers() -> None:
    config = {k: v for k, v in LINEAR.to_diffusers_config().items() if k != "_class_name"}
    scheduler = diffusers.UniPCMultistepScheduler.from_config(
        {**config, "solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    )
    scheduler.set_timesteps(10)
    x = 30 * torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    denoiser, levels = oracle(), scheduler.sigmas.float()
    ours = UniPC()(denoiser, x, levels.repeat(2, 1))
    assert denoiser.evaluations == 2 * 10
    sample = x.double() / (1 + levels[0].double() ** 2).sqrt()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        noisy = sample * (1 + sigma**2).sqrt()
        eps = (noisy - oracle()(noisy, sigma.repeat(2))) / sigma
        sample = scheduler.step(eps, t, sample).prev_sample
    torch.testing.assert_close(ours.double(), sample, atol=1e-4, rtol=1e-4)


def test_probability_flow_is_scipys() -> None:
    """The same equation by scipy's RK45: the same values for about as many evaluations."""
    time, start, end = VPTime(LINEAR), 900.0, 50.0
    sigmas = LINEAR.sigma_of(torch.tensor([[start, end]]))
    x = 20 * torch.randn(1, 6, generator=torch.Generator().manual_seed(3))

    def drift(t: float, x_vp: np.ndarray) -> np.ndarray:
        """The card's: -B/2 x + B/2 eps / std."""
        now = torch.tensor([t], dtype=torch.float64)
        sigma, rate = time.sigma_of(now), float(time.beta(now))
        noisy = torch.from_numpy(x_vp)[None] * (1 + sigma**2).sqrt()
        eps = ((noisy - oracle()(noisy, sigma)) / sigma)[0].numpy()
        return -rate / 2 * x_vp + rate / 2 * eps / float(sigma / (1 + sigma**2).sqrt())

    first = (x[0].double() / (1 + sigmas[0, 0] ** 2).sqrt()).numpy()
    theirs = solve_ivp(drift, (start, end), first, method="RK45", rtol=7e-4, atol=7e-4)
    denoiser = oracle()
    ours = ProbabilityFlow(LINEAR)(denoiser, x, sigmas.float())
    assert denoiser.evaluations <= 1.5 * theirs.nfev
    expected = torch.from_numpy(theirs.y[:, -1]) * (1 + sigmas[0, 1] ** 2).sqrt()
    torch.testing.assert_close(ours[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_probability_flow_gets_better_with_its_tolerance() -> None:
    x = 20 * torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    sigmas = LINEAR.sigma_of(torch.tensor([900, 50])).float().repeat(3, 1)
    truth = exact_flow(oracle(), x, float(sigmas[0, 0]), float(sigmas[0, 1]))
    errors = [float((ProbabilityFlow(LINEAR, each)(oracle(), x, sigmas) - truth).abs().max()) for each in (1e-2, 1e-5)]
    assert errors[1] < errors[0] / 20


def test_times_levels_and_rates_are_those_of_the_schedule() -> None:
    """Entries of the table are whole levels, 0 is -1, and the rate is the betas'."""
    for schedule in SCHEDULES.values():
        time, levels = VPTime(schedule), torch.arange(0, 990, 7)
        assert torch.equal(time.t_of(schedule.sigma_of(levels).float()), levels.double())
        between = torch.linspace(0.3, 980.7, 50, dtype=torch.float64)
        torch.testing.assert_close(time.t_of(time.sigma_of(between)), between, atol=2e-4, rtol=0)
        assert time.t_of(torch.zeros(1)).tolist() == [-1]
    # closed form of the card for linear betas: B(t) = beta_0 + t (beta_999 - beta_0) / 999
    t = torch.arange(50, 950, 9, dtype=torch.float64)
    torch.testing.assert_close(VPTime(LINEAR).beta(t), 1e-4 + t * (0.0199 / 999), atol=1e-5, rtol=1.1e-2)
