"""Noise schedules: conversions between t, abar and sigma.

A variance-preserving process mixes `x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise`. Divided by `sqrt(abar)` it reads
`x = x0 + sigma noise` with `sigma = sqrt((1 - abar) / abar)`: the convention of this library.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from farout.core.errors import FaroutError

__all__ = ["NoiseSchedule", "ScheduleKind"]

ScheduleKind = Literal["scaled_linear", "linear", "cosine", "sigmoid", "trained"]
_MAX_LEVELS = 100_000
_DIFFUSERS_NAMES = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete noise schedule of T levels, t = 0 (least noise) to T - 1.

    Args:
        kind: `scaled_linear`: beta_t = (sqrt(b0) + t/(T-1) (sqrt(b1) - sqrt(b0)))^2, the reconstruction paper's;
            `linear`: beta_t on a straight line (Ho et al. 2020); `cosine`: abar = cos^2((t/T + .008)/1.008 pi/2)
            (Nichol & Dhariwal 2021), betas at most .999; `sigmoid`: betas along a logistic curve from -6 to 6;
            `trained`: the given `betas`.
        beta_start: first beta (unused by `cosine` and `trained`).
        beta_end: last beta (unused by `cosine` and `trained`).
        num_levels: number of levels T.
        snr_shift: f multiplies the signal-to-noise ratio at every level: SNR' = f abar / (1 - abar).
        sigma_max: the largest sigma, needed where the schedule ends in abar = 0 (infinite sigma).
        betas: the betas of `trained`.

    Raises:
        FaroutError: for an unknown kind, values out of range, or abar = 0 without `sigma_max`.
    """

    kind: ScheduleKind = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    num_levels: int = 1000
    snr_shift: float = 1.0
    sigma_max: float | None = None
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise FaroutError(
                f"there is no schedule {self.kind!r}; expected one of {', '.join(get_args(ScheduleKind))}"
            )
        if not 2 <= self.num_levels <= _MAX_LEVELS or not 0 < self.snr_shift < math.inf:
            raise FaroutError(
                f"a schedule requires num_levels from 2 to {_MAX_LEVELS:,} and snr_shift > 0, got {self.num_levels} "
                f"and {self.snr_shift}"
            )
        if (self.kind == "trained") != (self.betas is not None):
            raise FaroutError(f"schedule kind {self.kind!r} requires betas exactly if it is 'trained'")
        if self.betas is not None and len(self.betas) != self.num_levels:
            raise FaroutError(f"{len(self.betas)} betas were given for {self.num_levels} levels")
        betas = self.betas or (self.beta_start, self.beta_end)
        if not all(0 < beta <= 1 for beta in betas):
            raise FaroutError(f"betas must be above 0 and at most 1, got {min(betas):g} to {max(betas):g}")
        if not bool(torch.isfinite(self.sigma).all()):
            raise FaroutError("this schedule ends in abar = 0 (infinite sigma); give sigma_max, e.g. sigma_max=150")

    @cached_property
    def abar(self) -> Tensor:
        """Cumulative products of 1 - beta, float64 (T,), after the SNR shift."""
        plain = torch.cumprod(1 - self._betas(), dim=0)
        if self.snr_shift == 1:
            return plain
        return 1 / (1 / (self.snr_shift * plain / (1 - plain)) + 1)

    @cached_property
    def sigma(self) -> Tensor:
        """Noise per unit of signal, sqrt((1 - abar) / abar), float64 (T,), rising."""
        sigma = ((1 - self.abar) / self.abar).sqrt()
        return sigma if self.sigma_max is None else sigma.clamp(max=self.sigma_max)

    def _betas(self) -> Tensor:
        ramp = torch.linspace(0, 1, self.num_levels, dtype=torch.float64)
        low, high = self.beta_start, self.beta_end
        if self.kind == "linear":
            return low + ramp * (high - low)
        if self.kind == "scaled_linear":
            return (math.sqrt(low) + ramp * (math.sqrt(high) - math.sqrt(low))) ** 2
        if self.kind == "sigmoid":
            return torch.sigmoid(12 * ramp - 6) * (high - low) + low
        if self.kind == "cosine":
            edges = torch.arange(self.num_levels + 1, dtype=torch.float64) / self.num_levels
            curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
        return torch.tensor(self.betas, dtype=torch.float64)

    def sigma_of(self, t: Tensor | int | float) -> Tensor:
        """sigma (float64) at level t of any shape; linear in log sigma between levels.

        Raises FaroutError for t outside 0 to T - 1.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        if t.numel() and not (float(t.min()) >= 0 and float(t.max()) <= self.num_levels - 1):
            raise FaroutError(f"t must be in 0 to {self.num_levels - 1}, got {float(t.min()):g} to {float(t.max()):g}")
        below = t.floor().long()
        above = (below + 1).clamp(max=self.num_levels - 1)
        log = self.sigma.log()
        between = torch.lerp(log[below], log[above], t - below).exp()
        return torch.where(t == below, self.sigma[below], between)

    def t_of(self, sigma: Tensor) -> Tensor:
        """t (float64) at `sigma` of any shape.

        Exact for entries of the table (also rounded to float32), linear in log sigma between them, clamped outside.
        """
        log_sigma = sigma.detach().cpu().double().clamp(min=1e-30).log()
        log = self.sigma.log()
        above = torch.searchsorted(log, log_sigma.contiguous()).clamp(1, self.num_levels - 1)
        low, high = log[above - 1], log[above]
        weight = torch.where(high > low, (log_sigma - low) / (high - low).clamp(min=1e-30), torch.zeros_like(low))
        t = (above - 1 + weight).clamp(0, self.num_levels - 1)
        nearest = t.round()
        return torch.where((log[nearest.long()] - log_sigma).abs() < 1e-6, nearest, t)

    def to_diffusers_config(self) -> dict[str, Any]:
        """The configuration of a diffusers scheduler with the same schedule."""
        config: dict[str, Any] = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.num_levels,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "clip_sample": False,
        }
        if self.snr_shift == 1 and self.kind in _DIFFUSERS_NAMES:
            config["beta_schedule"] = _DIFFUSERS_NAMES[self.kind]
        else:
            ratio = torch.cat([self.abar[:1], self.abar[1:] / self.abar[:-1]])
            config["trained_betas"] = (1 - ratio).tolist()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_diffusers_config(cls, config: dict[str, Any]) -> NoiseSchedule:
        """The schedule of a configuration of any diffusers scheduler with betas.

        Raises FaroutError for an unknown schedule, such as that of flow matching, and for betas that are rescaled to
        end in abar = 0.
        """
        num_levels = int(config.get("num_train_timesteps", 1000))
        if config.get("rescale_betas_zero_snr"):
            raise FaroutError(
                "this scheduler rescales its betas to end in abar = 0 (rescale_betas_zero_snr), where sigma "
                "is infinite; such a model cannot be loaded"
            )
        if config.get("trained_betas") is not None:
            return cls(kind="trained", num_levels=num_levels, betas=tuple(config["trained_betas"]))
        names = {theirs: ours for ours, theirs in _DIFFUSERS_NAMES.items()}
        name = config.get("beta_schedule")
        if name not in names:
            raise FaroutError(
                f"beta schedule {name!r} of this scheduler is not supported; expected one of {sorted(names)}"
            )
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        return cls(kind=names[name], beta_start=start, beta_end=end, num_levels=num_levels)  # type: ignore[arg-type]
