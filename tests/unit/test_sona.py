"""SONA: its guidance compared with the equations, and the network rows that it evaluates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farout.core.errors import FaroutError
from farout.diffusion import noise_levels
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.denoiser import ClampedDenoiser, NetworkDenoiser, Prediction
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.ddim import DDIM
from farout.diffusion.solvers.dpm_solver import DPMSolver2M
from farout.diffusion.solvers.registry import SOLVERS, create_solver
from farout.synthesis.editing.sona_guidance import SonaConfig, SonaGuide, compute_guidance, find_regions
from tolerances import assert_close

pytestmark = pytest.mark.numerics

SCHEDULE = NoiseSchedule("scaled_linear", 0.00085, 0.012)
N = 50
LEVELS = noise_levels.leading_levels(SCHEDULE, N)


# the guidance


def toy_eps(z: Tensor, t: float, shift: float) -> Tensor:
    """A smooth denoiser of variance-preserving z (B, C, H, W); conditions differ by `shift`, unevenly in space."""
    height, width = z.shape[-2:]
    grid = torch.arange(height * width, dtype=z.dtype).reshape(height, width)
    place = torch.sin(grid * 0.37 + 1) * torch.cos(grid * 0.11)
    return torch.tanh(0.8 * z + 0.1 * t / 1000) + shift * 0.02 * place * (1 + 0.3 * torch.sin(3 * z + shift))


def by_hand(z0: Tensor, noise: Tensor, start: int) -> Tensor:
    """The method line by line, with DDIM: the guided image from step K = `start`."""
    abar = SCHEDULE.abar
    s, lam_n, lam_s, lam_o, mu, beta = 10, 0.1, 0.9, 0.9, 0.3, 0.6

    def quantile(values: Tensor, q: float) -> Tensor:
        return torch.quantile(values.abs().flatten(2), q, dim=2)[..., None, None]

    t = LEVELS[start - 1]
    z, m = abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * noise, torch.zeros_like(z0)
    for i in range(start):
        t = LEVELS[start - 1 - i]
        e0, e1, e2 = (toy_eps(z, t, shift) for shift in (0.0, 1.0, -1.7))
        a, b = s * (e1 - e0), s * (e2 - e0)
        m_n, m_s = a.abs() <= quantile(a, lam_n), a.abs() >= quantile(a, lam_s)
        m_o = (b.abs() >= quantile(b, lam_o)) & ~m_n
        d_n, d_s, d_o = a * m_n, -a * m_s, b * m_o
        g = d_n + d_s + d_o + mu * m
        m = beta * m + (1 - beta) * g
        added = g if i >= 20 else (d_s + d_o) / 2 if i >= 10 else torch.zeros_like(g)
        eps = e0 + added
        x0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        if i == start - 1:
            return x0
        then = LEVELS[start - 2 - i]
        z = abar[then].sqrt() * x0 + (1 - abar[then]).sqrt() * eps
    raise AssertionError("no step was taken")


def drawn(count: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and their noise, the same for any number of images."""
    both = torch.randn(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    return both[:, 0].tanh(), both[:, 1]


@pytest.mark.parametrize("start", [5, 15, 30, 49])
def test_the_guidance_follows_the_equations(start: int) -> None:
    """In float64 and the library's own variables, x = z / sqrt(abar) and sigma."""
    z0, noise = drawn()
    config, state, sigma = SonaConfig().for_steps(N), {}, SCHEDULE.sigma
    x = z0 + sigma[LEVELS[start - 1]] * noise
    for i in range(start):
        t = LEVELS[start - 1 - i]
        z = x * SCHEDULE.abar[t].sqrt()
        e0, e1, e2 = (toy_eps(z, t, shift) for shift in (0.0, 1.0, -1.7))
        added, state, _ = compute_guidance(e0, e1, e2, state, config)
        then = sigma[LEVELS[start - 2 - i]] if i < start - 1 else 0.0
        x = x + (then - sigma[t]) * (e0 + added)
    expected = by_hand(z0, noise, start)
    torch.testing.assert_close(x, expected, atol=1e-10, rtol=1e-10)


class Toy:
    """`toy_eps` as a denoiser; a condition is a shift. It counts rows."""

    def __init__(self) -> None:
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        self.evaluations += len(x)
        rows = zip(x, sigma.tolist(), condition.tensors["shift"].tolist(), strict=True)
        return torch.stack([self._row(each[None], value, shift)[0] for each, value, shift in rows])

    @staticmethod
    def _row(x: Tensor, sigma: float, shift: float) -> Tensor:
        t = float(SCHEDULE.t_of(torch.tensor(sigma)))
        return x - sigma * toy_eps(x / (1 + sigma**2) ** 0.5, t, shift)


def shifts(count: int, *names: str) -> dict[str, Condition]:
    values = {"null": 0.0, "class": 1.0, "target": -1.7}
    return {name: Condition({"shift": torch.full((count,), values[name])}) for name in names or tuple(values)}


def path(start: int) -> Tensor:
    sigmas = SCHEDULE.sigma_of(torch.tensor(LEVELS[:start][::-1]))
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def walked(
    starts: list[int],
    guide: Any,
    solver: Solver | None = None,
    denoiser: Any = None,
    names: tuple[str, ...] = ("null", "class", "target"),
) -> Tensor:
    z0, noise = drawn(len(starts), torch.float32)
    sigmas = noise_levels.pad_paths([path(start) for start in starts])
    x = z0 + sigmas[:, 0, None, None, None] * noise
    return (solver or DDIM())(denoiser or Toy(), x, sigmas, shifts(len(starts), *names), guide=guide)


class Unsparing:
    """The same guide without `required_branches`: all branches are evaluated for all rows."""

    def __init__(self, config: SonaConfig) -> None:
        self.guide = SonaGuide(config)

    def __call__(self, predictions: Any, sigma: Tensor, state: Any) -> Any:
        return self.guide(predictions, sigma, state)


PAPER = SonaConfig().for_steps(N)


def test_the_loop_follows_the_equations_with_a_start_per_image() -> None:
    """Through the library's DDIM, in float32, all starts in one batch."""
    starts = [5, 15, 30, 49]
    z0, noise = drawn(4)
    together = walked(starts, SonaGuide(PAPER))
    for row, start in enumerate(starts):
        expected = by_hand(z0[row : row + 1], noise[row : row + 1], start)
        assert float((together[row] - expected[0]).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("solver", [DDIM(), DPMSolver2M()], ids=["ddim", "2m"])
def test_skipped_branches_do_not_change_the_result(solver: Solver) -> None:
    starts = [3, 10, 11, 20, 21, 35]
    spared, whole = Toy(), Toy()
    some, every = (
        walked(starts, guide, solver, toy) for guide, toy in ((SonaGuide(PAPER), spared), (Unsparing(PAPER), whole))
    )
    assert_close(some, every)
    assert whole.evaluations == 3 * sum(starts)
    # without guidance; the same; one step of three; ten; all
    assert spared.evaluations == 3 + 10 + (10 + 3) + (10 + 30) + 63 + 105


def test_the_share_of_the_published_rows_that_is_evaluated() -> None:
    """The published layout has four rows a step: null, class, class again, target."""
    starts = list(range(1, N))
    published = 4 * sum(starts)
    shares = {}
    for skip in ("exact", "early"):
        asked: list[int] = []

        def answer(x: Tensor, sigma: Tensor, condition: Any, asked: list[int] = asked) -> Tensor:
            asked.append(len(x))
            return 0.5 * x

        walked(starts, SonaGuide(replace(PAPER, skip=skip)), denoiser=answer)
        shares[skip] = sum(asked) / published
    assert shares["exact"] == pytest.approx(0.687, abs=1e-3)
    assert shares["early"] == pytest.approx(0.568, abs=1e-3)


def test_skipping_early_steps_changes_little() -> None:
    exact, early = (walked([49], SonaGuide(replace(PAPER, skip=skip))) for skip in ("exact", "early"))
    unguided = walked([49], SonaGuide(replace(PAPER, scale=0.0)))
    assert 0 < float((exact - early).norm()) < 0.1 * float((exact - unguided).norm())


@pytest.mark.parametrize("limits", [None, (-0.8, 0.8)])
def test_before_the_first_warm_up_denoising_is_unconditional(limits: tuple[float, float] | None) -> None:
    starts = [1, 7, 10]
    guided = walked(starts, SonaGuide(PAPER, limits))
    z0, noise = drawn(3, torch.float32)
    sigmas = noise_levels.pad_paths([path(start) for start in starts])
    toy = Toy() if limits is None else ClampedDenoiser(Toy(), *limits)
    plain = DDIM()(toy, z0 + sigmas[:, 0, None, None, None] * noise, sigmas, shifts(3)["null"])
    assert_close(guided, plain)
    without = walked([11], SonaGuide(replace(PAPER, scale=0.0)))
    assert not torch.allclose(walked([11], SonaGuide(PAPER)), without, atol=1e-3)


def test_an_image_does_not_depend_on_its_batch() -> None:
    starts = [30, 12, 49]
    together = walked(starts, SonaGuide(PAPER))
    assert_close(together[:1], walked(starts[:1], SonaGuide(PAPER)))


def test_without_a_target_two_rows_are_evaluated() -> None:
    removing = replace(PAPER, target_weight=0.0)
    alone, beside = Toy(), Toy()
    without = walked([30], SonaGuide(removing), denoiser=alone, names=("null", "class"))
    assert_close(without, walked([30], SonaGuide(removing), denoiser=beside))
    assert alone.evaluations == beside.evaluations == 60


class Native(nn.Module):
    """`toy_eps` as a network of its own kind of prediction: z (B, C, H, W) and levels t (B,) -> eps, v or x0."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, z: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        rows = zip(z, t.tolist(), shift.tolist(), strict=True)
        eps = torch.stack([toy_eps(each[None], level, value)[0] for each, level, value in rows])
        signal = SCHEDULE.abar[t.long()].float()[:, None, None, None]
        clean = (z - (1 - signal).sqrt() * eps) / signal.sqrt()
        v = signal.sqrt() * eps - (1 - signal).sqrt() * clean
        return {"epsilon": eps, "v_prediction": v, "sample": clean}[self.prediction]


def test_every_prediction_type_is_guided_equally() -> None:
    kinds: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
    made = [
        walked([12, 22], SonaGuide(PAPER), denoiser=NetworkDenoiser(Native(kind), SCHEDULE, kind)) for kind in kinds
    ]
    torch.testing.assert_close(made[0], walked([12, 22], SonaGuide(PAPER)), rtol=1e-3, atol=1e-3)
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=1e-3, atol=1e-3)


# regions


def directions(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, target = torch.randn(2, 5, 3, 16, 16, generator=generator)
    return own, target


def test_regions_are_disjoint_shares_of_each_channel() -> None:
    own, target = directions()
    found = find_regions(own, target, SonaConfig())
    for mask, share in ((found.nuisance_mask, 0.1), (found.class_mask, 0.1)):
        torch.testing.assert_close(mask.float().mean((2, 3)), torch.full((5, 3), share), atol=0.005, rtol=0)
    assert bool((found.target_mask.float().mean((2, 3)) <= 0.105).all())
    assert not bool((found.nuisance_mask & found.class_mask).any())
    assert not bool((found.nuisance_mask & found.target_mask).any())
    overlapping = find_regions(own, target, SonaConfig(exclude=False))
    assert bool((overlapping.nuisance_mask & overlapping.target_mask).any())
    assert torch.equal(overlapping.target_mask & ~found.nuisance_mask, found.target_mask)


def test_quantiles_are_torchs() -> None:
    own, _ = directions()
    wanted = {
        "channel": torch.quantile(own.abs().flatten(2), 0.9, dim=2)[..., None, None],
        "joint": torch.quantile(own.abs().flatten(1), 0.9, dim=1)[:, None, None, None],
    }
    for granularity, limit in wanted.items():
        found = find_regions(own, own, SonaConfig(granularity=granularity)).class_mask
        assert torch.equal(found, own.abs() >= limit)


def test_one_mask_for_all_channels() -> None:
    own, target = directions()
    found = find_regions(own, target, SonaConfig(granularity="spatial"))
    for mask in (found.nuisance_mask, found.class_mask, found.target_mask):
        assert torch.equal(mask, mask[:, :1].expand_as(mask))
    size = own.abs().mean(1)
    assert torch.equal(found.class_mask[:, 0], size >= torch.quantile(size.flatten(1), 0.9, dim=1)[:, None, None])


@pytest.mark.parametrize(
    ("soft", "weight"),
    [("linear", lambda ratio: (1 - ratio).clamp(0, 1)), ("sigmoid", lambda ratio: 1 - torch.sigmoid(10 * ratio))],
)
def test_soft_nuisance(soft: Any, weight: Callable[[Tensor], Tensor]) -> None:
    own, target = directions()
    found = find_regions(own, target, SonaConfig(soft=soft))
    low = torch.quantile(own.abs().flatten(2), 0.1, dim=2)[..., None, None]
    torch.testing.assert_close(found.nuisance_weight, weight(own.abs() / low) * (own.abs() <= low))
    assert torch.equal(found.nuisance_mask, own.abs() <= low)
    # equal values cause no division by zero
    assert bool(find_regions(torch.zeros_like(own), target, SonaConfig(soft=soft)).nuisance_weight.isfinite().all())


def test_each_term_can_be_left_out() -> None:
    own, target = (each.double() for each in directions())
    null, late = torch.zeros_like(own), {"step": torch.full((5,), 30)}
    whole = compute_guidance(null, own, target, late, PAPER)[0]
    parts = []
    for name in ("nuisance_weight", "class_weight", "target_weight"):
        without = compute_guidance(null, own, target, late, replace(PAPER, **{name: 0.0}))[0]
        parts.append(whole - without)
    torch.testing.assert_close(sum(parts), whole)
    regions = find_regions(10 * own, 10 * target, PAPER)
    for part, mask in zip(parts, (regions.nuisance_mask, regions.class_mask, regions.target_mask), strict=True):
        assert bool((part[~mask].abs() < 1e-12).all())
        assert bool(part[mask].abs().max() > 0)
    assert bool((parts[1] * own <= 0).all()), "the class is removed"
    assert bool((parts[2] * target >= 0).all()), "the target is added"


def test_guidance_is_computed_in_full_precision() -> None:
    own, target = directions()
    low = [each.bfloat16() for each in (torch.zeros_like(own), own, target)]
    state = {"step": torch.full((5,), 30)}
    added = compute_guidance(*low, state, PAPER)[0]
    assert added.dtype == torch.float32
    assert torch.equal(added, compute_guidance(*[each.float() for each in low], state, PAPER)[0])


# settings


def test_warm_ups_are_steps_or_shares() -> None:
    assert SonaConfig().for_steps(50).warmups == (20, 10, 10)
    assert SonaConfig().for_steps(20).warmups == (8, 4, 4)
    given = SonaConfig(nuisance_warmup=7, class_warmup=0, target_warmup=0.5)
    assert given.for_steps(20).warmups == (7, 0, 10)
    assert given.for_steps(20).for_steps(50) == given.for_steps(20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale is -1"),
        ({"target_quantile": 1.5}, "target_quantile is 1.5; expected a share"),
        ({"nuisance_warmup": 1.5}, "nuisance_warmup is 1.5; expected a share below 1, or a whole number"),
        ({"class_warmup": -3.0}, "class_warmup is -3.0"),
        ({"class_warmup": float("-inf")}, "class_warmup is -inf"),
        ({"momentum_scale": 1.0}, "momentum_scale"),
        ({"momentum_decay": -0.1}, "momentum_decay"),
        ({"granularity": "pixel"}, "granularity is 'pixel'"),
        ({"soft": "hard"}, "soft is 'hard'"),
        ({"skip": "all"}, "skip is 'all'"),
        ({"nuisance_quantile": 0.95}, "the kept region is not removed"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        SonaConfig(**settings)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_can_be_guided(name: str) -> None:
    solver = create_solver(name, SCHEDULE)
    if name in ("ddim", "dpm_solver_2m", "unipc", "ndm1"):
        solver.check(path(30)[None], guided=True)
    else:
        with pytest.raises(FaroutError, match="more than once per step"):
            solver.check(path(30)[None], guided=True)


def test_a_guide_requires_its_branches() -> None:
    with pytest.raises(FaroutError, match="null, class, target"):
        walked([12], SonaGuide(PAPER), names=("null", "target"))


def test_the_published_grid() -> None:
    assert LEVELS[:3] == [1, 21, 41]
    assert LEVELS[-1] == 981
    assert noise_levels.leading_levels(SCHEDULE, 1000)[-1] == 999
    with pytest.raises(FaroutError, match="1 to 1000"):
        noise_levels.leading_levels(SCHEDULE, 1001)
