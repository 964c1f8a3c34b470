"""Guidance of SONA: takes an image's class out, puts another in, and keeps what belongs to neither.

SONA, semantic outlier generation via nuisance awareness (Yoon et al., AAAI 2025, arXiv 2408.14841), is a form of SEGA
(Brack et al. 2023). Where the class changes the predicted noise most, an image shows its class; where it changes it
least, background, light and texture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from farout.core.errors import FaroutError, check_options
from farout.diffusion.denoiser import expand_dims
from farout.diffusion.solvers.base import RowState

__all__ = ["BRANCHES", "Regions", "SonaConfig", "SonaGuide", "Watch", "sona_guidance", "sona_regions"]

BRANCHES = ("null", "class", "target")
"""Names of the conditions that go with the guide; without `target` nothing is put in."""
_SOFT = ("none", "linear", "sigmoid")


@dataclass(frozen=True)
class SonaConfig:
    """Guidance constants; the defaults are the published ones. Raises FaroutError for values out of range.

    A warm-up is a number of steps, counted from where an image starts, or below 1 a share of all steps: 0.4, 0.2 and
    0.2 are the paper's 20, 10 and 10 of 50. Before any warm-up is over nothing is guided; once some are, the terms that
    are warm are averaged; once all are, they are added up, with momentum.

    Args:
        scale: guidance scale s of all three terms.
        nuisance_quantile: share of each channel, where the class has least influence, that is kept (nuisance region).
        class_quantile: quantile above which the class has most influence and is removed.
        target_quantile: quantile above which the target has most influence and is added.
        nuisance_weight: weight of the term that keeps the nuisance; 0: off.
        class_weight: weight of the term that removes the class; 0: off.
        target_weight: weight of the term that adds the target; 0: off.
        nuisance_warmup: steps before the nuisance term starts; below 1: share of all steps.
        class_warmup: steps before the class term starts; below 1: share of all steps.
        target_warmup: steps before the target term starts; below 1: share of all steps.
        momentum_scale: weight mu of the momentum.
        momentum_decay: decay beta of the momentum per step.
        granularity: quantiles and masks: per `channel`; `joint`: quantiles over all channels; `spatial`: one mask for
            all channels, by mean magnitude.
        soft: weight of the kept region: `none` (1), `linear` (1 - |a| / q) or `sigmoid` (1 - sigmoid(10 |a| / q)).
        exclude: do not add the target where the nuisance is kept.
        skip: network calls to skip: `exact` (only those that cannot change the image) or `early` (also those before the
            first warm-up ends, without their share of the momentum).
    """

    scale: float = 10.0
    nuisance_quantile: float = 0.1
    class_quantile: float = 0.9
    target_quantile: float = 0.9
    nuisance_weight: float = 1.0
    class_weight: float = 1.0
    target_weight: float = 1.0
    nuisance_warmup: float = 0.4
    class_warmup: float = 0.2
    target_warmup: float = 0.2
    momentum_scale: float = 0.3
    momentum_decay: float = 0.6
    granularity: Literal["channel", "joint", "spatial"] = "channel"
    soft: Literal["none", "linear", "sigmoid"] = "none"
    exclude: bool = True
    skip: Literal["exact", "early"] = "exact"

    def __post_init__(self) -> None:
        check_options(self, "guidance option", self._rules())
        if not self.nuisance_quantile < self.class_quantile:
            raise FaroutError(
                f"nuisance_quantile {self.nuisance_quantile} must be below class_quantile {self.class_quantile}: "
                "what is kept is not taken out"
            )

    def _rules(self) -> list[tuple[str, bool, str]]:
        quantiles = ("nuisance_quantile", "class_quantile", "target_quantile")
        weights = ("scale", "nuisance_weight", "class_weight", "target_weight")
        warm_ups = ("nuisance_warmup", "class_warmup", "target_warmup")
        inside = "a number from 0 to below 1"
        return [
            *((name, 0 <= getattr(self, name) <= 1, "a share in [0, 1]") for name in quantiles),
            *((name, 0 <= getattr(self, name) < float("inf"), "0 or more") for name in weights),
            *((name, _is_warm_up(getattr(self, name)), "a share below 1, or a whole number") for name in warm_ups),
            # the momentum of one direction goes to 1 / (1 - mu) times that direction
            ("momentum_scale", 0 <= self.momentum_scale < 1, inside),
            ("momentum_decay", 0 <= self.momentum_decay < 1, inside),
            ("granularity", self.granularity in ("channel", "joint", "spatial"), "channel, joint or spatial"),
            ("soft", self.soft in _SOFT, ", ".join(_SOFT)),
            ("skip", self.skip in ("exact", "early"), "exact or early"),
        ]

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of keeping, taking out and putting in."""
        return self.nuisance_weight, self.class_weight, self.target_weight

    @property
    def warm_ups(self) -> tuple[float, float, float]:
        """Of keeping, taking out and putting in."""
        return self.nuisance_warmup, self.class_warmup, self.target_warmup

    def for_steps(self, steps: int) -> SonaConfig:
        """With every warm-up in steps: shares are of `steps`, rounded."""
        counts = [float(round(steps * given) if given < 1 else given) for given in self.warm_ups]
        return replace(self, nuisance_warmup=counts[0], class_warmup=counts[1], target_warmup=counts[2])


def _is_warm_up(given: float) -> bool:
    return 0 <= given < 1 or (1 <= given < float("inf") and given == int(given))


@dataclass(frozen=True)
class Regions:
    """Where an image shows what: masks (B, C, H, W), bool, and a weight.

    nuisance: is kept; own: the class is taken out; target: the target is put in; kept: weight of what is kept, within
    `nuisance`, in [0, 1].
    """

    nuisance: Tensor
    own: Tensor
    target: Tensor
    kept: Tensor


def sona_regions(own: Tensor, target: Tensor, config: SonaConfig) -> Regions:
    """Regions by the magnitudes of two directions, a = s (eps_class - eps_null) and b = s (eps_target - eps_null).

    Nuisance: |a| <= its low quantile; own: |a| >= its high quantile; target: |b| >= its quantile, and not nuisance. The
    quantiles are of each image alone, linear between values.

    own, target: (B, C, H, W), in float32 or float64.
    """
    own, target = _magnitude(own, config), _magnitude(target, config)
    low, high = _quantiles(own, (config.nuisance_quantile, config.class_quantile), config)
    (wanted,) = _quantiles(target, (config.target_quantile,), config)
    nuisance = own <= low
    inside = target >= wanted
    kept = nuisance * _softness(own, low, config)
    return Regions(nuisance, own >= high, inside & ~nuisance if config.exclude else inside, kept)


def _magnitude(direction: Tensor, config: SonaConfig) -> Tensor:
    size = direction.abs()
    return size.mean(1, keepdim=True).expand_as(size) if config.granularity == "spatial" else size


def _quantiles(values: Tensor, shares: tuple[float, ...], config: SonaConfig) -> list[Tensor]:
    """Quantiles of each channel, or of all channels, of values (B, C, …), in a shape that goes with them."""
    flat = values.flatten(1)[:, None] if config.granularity == "joint" else values.flatten(2)
    ordered = flat.sort(dim=2).values  # one order for all quantiles; torch.quantile takes 16 million values at most
    found = []
    for share in shares:
        place = share * (ordered.shape[2] - 1)
        below = int(place)
        above = min(below + 1, ordered.shape[2] - 1)
        between = torch.lerp(ordered[..., below], ordered[..., above], place - below)
        found.append(between.reshape(*between.shape, *[1] * (values.ndim - 2)))
    return found


def _softness(magnitude: Tensor, low: Tensor, config: SonaConfig) -> Tensor:
    if config.soft == "none":
        return torch.ones_like(magnitude)
    ratio = magnitude / low.clamp(min=torch.finfo(magnitude.dtype).tiny)
    return (1 - ratio).clamp(0, 1) if config.soft == "linear" else 1 - torch.sigmoid(10 * ratio)


def sona_guidance(
    null: Tensor, own: Tensor, target: Tensor | None, state: RowState, config: SonaConfig
) -> tuple[Tensor, RowState, Regions]:
    """What is added to the unconditional eps in one step, the next state, and the regions.

    With a, b, and the masks N (kept), S (own) and O (target) of `sona_regions`:

        d_N = a N,   d_S = -a S,   d_O = b O
        g = w_N d_N + w_S d_S + w_O d_O + mu m,   m' = beta m + (1 - beta) g

    The answer is g once all warm-ups are over; else the mean of the terms that are warm, weighted, without momentum;
    else 0. g and m go on in either case.

    Args:
        null, own, target: eps without condition, under the class and under the target, (B, C, H, W); no target: nothing
            is put in. They are taken to float32, float64 stays.
        state: `step` (B,), steps done, and `momentum` (B, C, H, W); empty before the first step. What else is in it is
            left alone.
        config: with warm-ups in steps, see `SonaConfig.for_steps`.
    """
    null = null.to(torch.promote_types(null.dtype, torch.float32))
    out, into = (config.scale * ((null if each is None else each) - null) for each in (own, target))
    found = sona_regions(out, into, config)
    terms = [out * found.kept, -out * found.own, into * found.target]
    step = state.get("step", torch.zeros(len(null), dtype=torch.int64, device=null.device))
    momentum = state.get("momentum", torch.zeros_like(null))
    whole = sum((weight * term for weight, term in zip(config.weights, terms)), config.momentum_scale * momentum)
    warm = torch.stack([step >= count for count in config.warm_ups], dim=1)
    answer = torch.where(_wide(warm.all(1), whole), whole, _averaged(terms, warm, config))
    after = config.momentum_decay * momentum + (1 - config.momentum_decay) * whole
    return answer, {**state, "step": step + 1, "momentum": after}, found


def _averaged(terms: list[Tensor], warm: Tensor, config: SonaConfig) -> Tensor:
    """The weighted mean of the terms that are warm (B, 3); 0 where none is."""
    weights = warm * torch.tensor(config.weights, dtype=terms[0].dtype, device=warm.device)
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return sum((_wide(share, term) * term for share, term in zip(shares.T, terms)), torch.zeros_like(terms[0]))


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


Watch = Callable[[Tensor, Tensor, Regions], None]
"""Given the rows of the batch (R,), the steps that they have done (R,) and their regions, after each step."""


class SonaGuide:
    """The stateful guide of `farout.diffusion.solvers.base`, for the conditions named in `BRANCHES`.

    Differences of eps are differences of x0 over -sigma, so networks that predict eps, v or x0 are guided alike. Every
    row counts its own steps. The unconditional answer is asked for in every row, the others where they matter: of the
    paper's starts (K uniform in 1 to 49 of 50 steps) that leaves 69 network rows in a hundred of the published layout,
    57 with `skip="early"`.

    Args:
        config: with warm-ups in steps.
        limits: x0 is clamped to these; None: it is not.
        watch: is shown the regions of every step.
    """

    def __init__(
        self, config: SonaConfig, limits: tuple[float, float] | None = None, watch: Watch | None = None
    ) -> None:
        self.config, self.limits, self.watch = config, limits, watch

    def initial_state(self, sigmas: Tensor) -> RowState:
        """For each row: `row`, its number; `step`, 0; `steps`, how many it will go, of paths (B, steps + 1)."""
        steps = (sigmas[:, 1:] != sigmas[:, :-1]).sum(1)
        return {"row": torch.arange(len(steps), device=steps.device), "step": torch.zeros_like(steps), "steps": steps}

    def required_branches(self, state: RowState) -> Mapping[str, Tensor]:
        """Which rows require the class and the target.

        A term matters where it is warm, and before that through the momentum, which counts once all terms are warm.
        """
        config, step = self.config, state["step"]
        counts = (state["steps"] > max(config.warm_ups)) & (config.momentum_scale > 0)
        remembered = counts & (config.skip == "exact" or step >= min(config.warm_ups))
        kept, own, put = (
            (remembered | (step >= warm_up)) & (weight > 0)
            for weight, warm_up in zip(config.weights, config.warm_ups, strict=True)
        )
        return {"class": kept | own | (put & config.exclude), "target": put}

    def __call__(self, predictions: Mapping[str, Tensor], sigma: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """x0 of `BRANCHES` (R, …) -> the guided x0; raises FaroutError where null or class are missing."""
        if not {"null", "class"} <= set(predictions):
            raise FaroutError(f"this guide requires predictions called {', '.join(BRANCHES)}, got {list(predictions)}")
        null, wide = predictions["null"], expand_dims(sigma, predictions["null"])
        # eps is (x - x0) / sigma; that of the null branch is taken as 0, for only differences count
        own, target = ((null - predictions.get(name, null)) / wide for name in BRANCHES[1:])
        added, after, found = sona_guidance(torch.zeros_like(null), own, target, state, self.config)
        if self.watch is not None:
            self.watch(state["row"], state["step"], found)
        x0 = null - wide * added
        return (x0 if self.limits is None else x0.clamp(*self.limits)), after
