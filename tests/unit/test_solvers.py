"""Solvers: exact on Gaussian data, equal to diffusers' schedulers, and each row as if it were alone."""

import math

import diffusers
import pytest
import torch
from torch import Tensor

from exact import exact_flow, oracle
from farout.core.errors import FaroutError
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import GaussianDenoiser, GuidedDenoiser, expand_dims
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.adams_bashforth import AdamsBashforth
from farout.diffusion.solvers.base import Evaluation, Solver
from farout.diffusion.solvers.ddim import DDIM
from farout.diffusion.solvers.dpm_solver import DPMSolver2M
from farout.diffusion.solvers.heun import Heun
from farout.diffusion.solvers.plms import PLMS
from farout.diffusion.solvers.registry import SOLVERS, create_solver, solver_path
from narrow import narrow_device
from tolerances import assert_close

pytestmark = pytest.mark.numerics

SCHEDULE_FREE = {
    "ddim": DDIM(),
    "heun": Heun(),
    "dpm_solver_2m": DPMSolver2M(),
    "plms": PLMS(),
    "ab4": AdamsBashforth(4),
    "ab1": AdamsBashforth(1),
}
SCHEDULE = NoiseSchedule("scaled_linear", 0.0015, 0.0195)


def error(solver: Solver, steps: int, start: float = 2.0, end: float = 0.1) -> float:
    denoiser = oracle()
    x = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    sigmas = torch.logspace(math.log10(start), math.log10(end), steps + 1).repeat(5, 1)
    return float((solver(denoiser, x, sigmas) - exact_flow(denoiser, x, start, end)).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm_solver_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Halving the length of the steps divides the error by about 2^order."""
    solver = SCHEDULE_FREE[name]
    ratio = error(solver, 20) / error(solver, 40)
    assert 0.75 * 2**order < ratio < 1.5 * 2**order


def test_adams_bashforth_orders_rise_on_even_steps() -> None:
    """The paper's coefficients assume equal steps; on such a path every order beats the one below."""
    denoiser, x = oracle(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(2, 0.4, 65).repeat(5, 1)
    truth = exact_flow(denoiser, x, 2, 0.4)
    errors = [float((AdamsBashforth(order)(denoiser, x, sigmas) - truth).abs().max()) for order in (1, 2, 3)]
    assert errors[0] > 4 * errors[1] > 4 * errors[2]
    assert float((PLMS()(denoiser, x, sigmas) - truth).abs().max()) < errors[1]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    """Rows of different starts and lengths, finished rows included, end as if each were solved alone."""
    denoiser = oracle()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    starts = [noise_levels.strided_path(SCHEDULE, start, 10) for start in (30, 200, 10, 90)]
    together = SCHEDULE_FREE[name](denoiser, x, noise_levels.pad_paths(starts))
    alone = torch.cat([SCHEDULE_FREE[name](denoiser, x[i : i + 1], starts[i][None]) for i in range(4)])
    assert_close(together, alone)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_rows_that_do_not_change_are_not_evaluated(name: str) -> None:
    denoiser = oracle()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    sigmas = noise_levels.pad_paths([torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1.0, 0.5]), torch.tensor([1.0])])
    moved = SCHEDULE_FREE[name](denoiser, x, sigmas)
    assert torch.equal(moved[2], x[2])
    assert not torch.allclose(moved[1], x[1], atol=1e-3)
    assert denoiser.evaluations == {"heun": 6, "plms": 5}.get(name, 3)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_2m", "plms"])
def test_a_rising_path_inverts_a_falling_one(name: str) -> None:
    denoiser = oracle()
    x = oracle().mean.float().repeat(2, 1) + 0.3
    up = torch.logspace(-1, 0.3, 300).repeat(2, 1)
    there = SCHEDULE_FREE[name](denoiser, x, up)
    back = SCHEDULE_FREE[name](denoiser, there, up.flip(1))
    torch.testing.assert_close(back, x, atol=2e-2, rtol=0)
    assert float((there - x).abs().max()) > 0.1


def vp(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.double() ** 2).sqrt()


def run_theirs(scheduler: diffusers.SchedulerMixin, x: Tensor, denoiser: GaussianDenoiser) -> Tensor:
    """A diffusers scheduler's loop in VP space with the oracle's eps; x is ours (x0 + sigma eps)."""
    first = SCHEDULE.sigma_of(int(scheduler.timesteps[0]))
    sample = vp(x.double(), first)
    for t in scheduler.timesteps:
        sigma = SCHEDULE.sigma_of(int(t))
        ours = sample * (1 + sigma**2).sqrt()
        eps = (ours - denoiser(ours, sigma.repeat(len(ours)))) / sigma
        sample = scheduler.step(eps, t, sample).prev_sample
    return sample


CONFIG = {k: v for k, v in SCHEDULE.to_diffusers_config().items() if k != "_class_name"}


def test_plms_is_diffusers_and_the_papers() -> None:
    """The paper's grid 991, 981, …, 1 and then level 0; diffusers' PNDM without Runge-Kutta steps walks the same."""
    scheduler = diffusers.PNDMScheduler.from_config(
        {**CONFIG, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    )
    scheduler.set_timesteps(100)
    x = 30 * torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    denoiser = oracle()
    ours = PLMS()(denoiser, x, noise_levels.strided_path(SCHEDULE, 991, 10).repeat(2, 1))
    assert denoiser.evaluations == 2 * 101
    theirs = run_theirs(scheduler, x, oracle())
    torch.testing.assert_close(vp(ours.double(), SCHEDULE.sigma[0]), theirs, atol=2e-4, rtol=2e-4)


def test_ddim_is_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler.from_config({**CONFIG, "set_alpha_to_one": True, "timestep_spacing": "leading"})
    scheduler.set_timesteps(20)
    x = 30 * torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    levels = SCHEDULE.sigma_of(scheduler.timesteps).float()
    ours = DDIM()(oracle(), x, torch.cat([levels, torch.zeros(1)]).repeat(2, 1))
    torch.testing.assert_close(ours.double(), run_theirs(scheduler, x, oracle()), atol=2e-4, rtol=2e-4)


def test_2m_is_diffusers() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        {**CONFIG, "algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    )
    scheduler.set_timesteps(10)
    x = 30 * torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    levels = SCHEDULE.sigma_of(scheduler.timesteps).float()
    ours = DPMSolver2M()(oracle(), x, torch.cat([levels, torch.zeros(1)]).repeat(2, 1))
    torch.testing.assert_close(ours.double(), run_theirs(scheduler, x, oracle()), atol=5e-4, rtol=5e-4)


def test_heun_is_diffusers() -> None:
    """Their Heun scheduler interleaves its evaluations and ends at sigma 0; it works in our scaling."""
    scheduler = diffusers.HeunDiscreteScheduler.from_config(CONFIG)
    scheduler.set_timesteps(12)
    x = 30 * torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).float()
    ours = Heun()(oracle(), x, levels.unique_consecutive().repeat(2, 1))
    sample, denoiser = x.double(), oracle()
    for t in scheduler.timesteps:
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        sigma = scheduler.sigmas[scheduler.step_index].double()
        sample = scheduler.step((sample - denoiser(sample, sigma.repeat(2))) / sigma, t, sample).prev_sample
    torch.testing.assert_close(ours.double(), sample, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("skip", "starts", "evaluations"),
    [(2, 50, 2550), (4, 25, 1250), (8, 13, 650), (16, 7, 350), (32, 4, 200), (64, 2, 68)],
)
def test_evaluations_of_the_papers_grid(skip: int, starts: int, evaluations: int) -> None:
    """The reconstruction paper's grid: start k costs k + 2 evaluations."""
    labels = [10 * k + 1 for k in range(0, 100, skip)]
    assert len(labels) == starts
    denoiser = oracle()
    x = torch.randn(starts, 6, generator=torch.Generator().manual_seed(0))
    PLMS()(denoiser, x, noise_levels.pad_paths([noise_levels.strided_path(SCHEDULE, label, 10) for label in labels]))
    assert denoiser.evaluations == evaluations


def test_the_callback_sees_first_evaluations_of_moving_rows() -> None:
    seen: list[Evaluation] = []
    x = torch.ones(2, 6)
    sigmas = noise_levels.pad_paths([torch.tensor([1.0, 0.5, 0.1]), torch.tensor([2.0, 1.0])])
    Heun()(oracle(), x, sigmas, callback=seen.append)
    assert [e.rows.tolist() for e in seen] == [[0, 1], [0]]
    assert seen[0].sigma.tolist() == [1.0, 2.0]
    torch.testing.assert_close(seen[0].x0, oracle()(x, torch.tensor([1.0, 2.0])))


class _TwoClasses:
    """A conditional denoiser: the mean of the class, pulled towards x."""

    def __init__(self) -> None:
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        self.evaluations += len(x)
        return condition.tensors["mean"] + 0.1 * x


def test_a_guide_can_do_what_guidance_does() -> None:
    """Branches through a stateful guide equal the stateless wrapper; its state follows its rows; Heun refuses it."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    wanted, null = Condition({"mean": torch.eye(3)[:, :2]}), Condition({"mean": torch.zeros(3, 2)})
    sigmas = noise_levels.pad_paths(
        [torch.tensor([1.0, 0.5, 0.1]), torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0, 0.5])]
    )
    steps: list[list[int]] = []

    def guide(branches: dict[str, Tensor], sigma: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        count = state.get("count", torch.zeros(len(sigma))) + 1
        steps.append(count.int().tolist())
        return branches["null"] + 3 * (branches["on"] - branches["null"]), {"count": count}

    guided = DDIM()(_TwoClasses(), x, sigmas, {"on": wanted, "null": null}, guide=guide)
    plain = DDIM()(
        GuidedDenoiser(_TwoClasses(), 3, lambda count: Condition({"mean": torch.zeros(count, 2)})), x, sigmas, wanted
    )
    torch.testing.assert_close(guided, plain)
    assert steps == [[1, 1, 1], [2, 2]]
    with pytest.raises(FaroutError, match="more than once"):
        Heun()(_TwoClasses(), x, sigmas, {"on": wanted, "null": null}, guide=guide)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_no_float64_on_the_device(name: str) -> None:
    """Apple's has none."""
    path = torch.stack([solver_path(name, noise_levels.even_path(SCHEDULE, 6))] * 2)
    x, solve = path[:, :1] * torch.randn(2, 5), create_solver(name, SCHEDULE)

    def standard(x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        return x / (1 + expand_dims(sigma, x) ** 2)

    expected = solve(standard, x, path)
    with narrow_device() as device:
        with pytest.raises(TypeError, match="float64"):
            x.to(device).double()
        found = solve(standard, x.to(device), path.to(device)).cpu()
    torch.testing.assert_close(found, expected)


def test_invalid_paths_are_errors() -> None:
    with pytest.raises(FaroutError, match="steps \\+ 1"):
        DDIM()(oracle(), torch.ones(2, 6), torch.ones(3, 2))
    with pytest.raises(FaroutError, match="orders 1 to 4"):
        AdamsBashforth(5)
