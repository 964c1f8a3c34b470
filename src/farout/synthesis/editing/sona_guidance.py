"""Guidance of SONA: removes an image's class, adds the target, and keeps the region that belongs to neither.

SONA, semantic outlier generation via nuisance awareness (Yoon et al., AAAI 2025, arXiv 2408.14841), is a form of SEGA
(Brack et al. 2023). The class of an image is visible where the class condition changes the predicted noise most;
background, light and texture (the nuisance) are where it changes the predicted noise least.
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

__all__ = ["BRANCHES", "RegionCallback", "Regions", "SonaConfig", "SonaGuide", "compute_guidance", "find_regions"]

BRANCHES = ("null", "class", "target")
"""Names of the conditions that the guide combines; without `target` nothing is added."""


@dataclass(frozen=True)
class SonaConfig:
    """Guidance constants; the defaults are the published ones. Raises FaroutError for values out of range.

    A warm-up is a number of steps, counted from the start of each image, or, below 1, a share of all steps: 0.4, 0.2
    and 0.2 are the paper's 20, 10 and 10 of 50. Until the first warm-up ends there is no guidance; until the last one
    ends the warm terms are averaged; afterwards they are added, with momentum.

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
        quantiles = ("nuisance_quantile", "class_quantile", "target_quantile")
        weights = ("scale", "nuisance_weight", "class_weight", "target_weight")
        warmups = ("nuisance_warmup", "class_warmup", "target_warmup")

        def is_warmup(value: float) -> bool:
            return 0 <= value < 1 or (1 <= value < float("inf") and value == int(value))

        rules = [
            *((name, 0 <= getattr(self, name) <= 1, "a share in [0, 1]") for name in quantiles),
            *((name, 0 <= getattr(self, name) < float("inf"), "0 or more") for name in weights),
            *((name, is_warmup(getattr(self, name)), "a share below 1, or a whole number") for name in warmups),
            # for a constant direction d the momentum converges to d / (1 - mu)
            ("momentum_scale", 0 <= self.momentum_scale < 1, "a number from 0 to below 1"),
            ("momentum_decay", 0 <= self.momentum_decay < 1, "a number from 0 to below 1"),
            ("granularity", self.granularity in ("channel", "joint", "spatial"), "channel, joint or spatial"),
            ("soft", self.soft in ("none", "linear", "sigmoid"), "none, linear or sigmoid"),
            ("skip", self.skip in ("exact", "early"), "exact or early"),
        ]
        check_options(self, "guidance option", rules)
        if not self.nuisance_quantile < self.class_quantile:
            raise FaroutError(
                f"nuisance_quantile {self.nuisance_quantile} must be below class_quantile {self.class_quantile}: "
                "the kept region is not removed"
            )

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of the nuisance, class and target terms."""
        return self.nuisance_weight, self.class_weight, self.target_weight

    @property
    def warmups(self) -> tuple[float, float, float]:
        """Warm-ups of the nuisance, class and target terms."""
        return self.nuisance_warmup, self.class_warmup, self.target_warmup

    def for_steps(self, steps: int) -> SonaConfig:
        """The same configuration with every warm-up as a number of steps: shares of `steps`, rounded."""
        nuisance, own, target = (float(round(steps * warmup) if warmup < 1 else warmup) for warmup in self.warmups)
        return replace(self, nuisance_warmup=nuisance, class_warmup=own, target_warmup=target)


@dataclass(frozen=True)
class Regions:
    """Masks (B, C, H, W), bool, of the three guidance terms.

    Attributes:
        nuisance_mask: the region that is kept (M_N).
        class_mask: the region from which the class is removed (M_S).
        target_mask: the region to which the target is added (M_O).
        nuisance_weight: weight of the kept region in [0, 1]; 0 outside of `nuisance_mask`.
    """

    nuisance_mask: Tensor
    class_mask: Tensor
    target_mask: Tensor
    nuisance_weight: Tensor


def find_regions(a: Tensor, b: Tensor, config: SonaConfig) -> Regions:
    """Find the regions from a = s (eps_class - eps_null) and b = s (eps_target - eps_null).

    M_N = |a| <= q_N;  M_S = |a| >= q_S;  M_O = |b| >= q_O and not M_N. The quantiles q are computed for each image
    alone, linear between values.

    a, b: (B, C, H, W), float32 or float64.
    """
    magnitude_a, magnitude_b = a.abs(), b.abs()
    if config.granularity == "spatial":
        magnitude_a, magnitude_b = (size.mean(1, keepdim=True).expand_as(size) for size in (magnitude_a, magnitude_b))
    q_n, q_s = _quantiles(magnitude_a, (config.nuisance_quantile, config.class_quantile), config)
    (q_o,) = _quantiles(magnitude_b, (config.target_quantile,), config)
    mask_n, mask_s, mask_o = magnitude_a <= q_n, magnitude_a >= q_s, magnitude_b >= q_o
    if config.exclude:
        mask_o = mask_o & ~mask_n
    weight = torch.ones_like(magnitude_a)
    if config.soft != "none":
        ratio = magnitude_a / q_n.clamp(min=torch.finfo(a.dtype).tiny)
        weight = (1 - ratio).clamp(0, 1) if config.soft == "linear" else 1 - torch.sigmoid(10 * ratio)
    return Regions(mask_n, mask_s, mask_o, mask_n * weight)


def _quantiles(values: Tensor, shares: tuple[float, ...], config: SonaConfig) -> list[Tensor]:
    """Quantiles of values (B, C, …) per channel, or over all channels, in a shape that broadcasts with `values`."""
    flat = values.flatten(1)[:, None] if config.granularity == "joint" else values.flatten(2)
    # one sort for all quantiles; torch.quantile also accepts 16 million values at most
    ordered = flat.sort(dim=2).values
    quantiles = []
    for share in shares:
        position = share * (ordered.shape[2] - 1)
        below = int(position)
        above = min(below + 1, ordered.shape[2] - 1)
        quantile = torch.lerp(ordered[..., below], ordered[..., above], position - below)
        quantiles.append(quantile.reshape(*quantile.shape, *[1] * (values.ndim - 2)))
    return quantiles


def compute_guidance(
    e0: Tensor, e1: Tensor, e2: Tensor | None, state: RowState, config: SonaConfig
) -> tuple[Tensor, RowState, Regions]:
    """Compute the guidance of one step: what is added to the unconditional eps, the next state, and the regions.

    Args:
        e0: eps without condition, (B, C, H, W); converted to float32 (float64 is kept).
        e1: eps under the class.
        e2: eps under the target; None: nothing is added.
        state: `step` (B,), the number of finished steps, and `momentum` (B, C, H, W); empty before the first step.
            Other entries are passed on.
        config: with warm-ups in steps, see `SonaConfig.for_steps`.
    """
    e0 = e0.to(torch.promote_types(e0.dtype, torch.float32))
    step = state.get("step", torch.zeros(len(e0), dtype=torch.int64, device=e0.device))
    momentum = state.get("momentum", torch.zeros_like(e0))

    # directions of the class and of the target
    a = config.scale * (e1 - e0)
    b = config.scale * ((e0 if e2 is None else e2) - e0)
    regions = find_regions(a, b, config)

    # d_N = a M_N keeps the nuisance, d_S = -a M_S removes the class, d_O = b M_O adds the target
    terms = [a * regions.nuisance_weight, -a * regions.class_mask, b * regions.target_mask]

    # g = w_N d_N + w_S d_S + w_O d_O + mu m, computed in every step, also during the warm-ups
    weights = torch.tensor(config.weights, dtype=a.dtype, device=a.device)
    g = sum((weight * term for weight, term in zip(config.weights, terms)), config.momentum_scale * momentum)

    # all terms warm: g; some warm: their weighted mean, without momentum; none warm: 0
    is_warm = torch.stack([step >= warmup for warmup in config.warmups], dim=1)
    warm_weights = is_warm * weights
    shares = warm_weights / warm_weights.sum(1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    mean_of_warm = sum((_expand(share, a) * term for share, term in zip(shares.T, terms)), torch.zeros_like(a))
    guidance = torch.where(_expand(is_warm.all(1), a), g, mean_of_warm)

    # m <- beta m + (1 - beta) g, where g already contains mu m
    momentum = config.momentum_decay * momentum + (1 - config.momentum_decay) * g
    return guidance, {**state, "step": step + 1, "momentum": momentum}, regions


def _expand(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) reshaped to (B, 1, …), in their own type."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


RegionCallback = Callable[[Tensor, Tensor, Regions], None]
"""Called after each step with the rows of the batch (R,), their numbers of finished steps (R,) and their regions."""


class SonaGuide:
    """SONA as a stateful guide of the solvers (see `farout.diffusion.solvers.base`), for the conditions in `BRANCHES`.

    Differences of eps are differences of x0 divided by -sigma, so networks that predict eps, v or x0 are guided alike.
    Every row counts its own steps. The unconditional branch is evaluated in every row, the others only where they can
    change the result: for the paper's starts (K uniform in 1 to 49 of 50 steps) this needs 69 % of the network rows of
    the published layout, 57 % with `skip="early"`.

    Args:
        config: with warm-ups in steps.
        limits: range that x0 is clamped to; None: not clamped.
        on_regions: called with the regions of every step.
    """

    def __init__(
        self,
        config: SonaConfig,
        limits: tuple[float, float] | None = None,
        on_regions: RegionCallback | None = None,
    ) -> None:
        self.config, self.limits, self.on_regions = config, limits, on_regions

    def initial_state(self, sigmas: Tensor) -> RowState:
        """The initial state from paths (B, steps + 1): `row`, its index; `step`, 0; `steps`, the length of its path."""
        steps = (sigmas[:, 1:] != sigmas[:, :-1]).sum(1)
        return {"row": torch.arange(len(steps), device=steps.device), "step": torch.zeros_like(steps), "steps": steps}

    def required_branches(self, state: RowState) -> Mapping[str, Tensor]:
        """The rows that need the class branch and the target branch.

        A term matters while it is warm, and before that through the momentum, which counts once all terms are warm.
        """
        config, step = self.config, state["step"]
        uses_momentum = (state["steps"] > max(config.warmups)) & (config.momentum_scale > 0)
        feeds_momentum = uses_momentum & (config.skip == "exact" or step >= min(config.warmups))
        needs_nuisance, needs_class, needs_target = (
            (feeds_momentum | (step >= warmup)) & (weight > 0)
            for weight, warmup in zip(config.weights, config.warmups, strict=True)
        )
        # the mask of the target excludes the nuisance, which depends on the class
        return {"class": needs_nuisance | needs_class | (needs_target & config.exclude), "target": needs_target}

    def __call__(self, predictions: Mapping[str, Tensor], sigma: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """Combine the x0 of `BRANCHES` (R, …) to the guided x0; raises FaroutError if null or class are missing."""
        if not {"null", "class"} <= set(predictions):
            raise FaroutError(f"this guide requires predictions called {', '.join(BRANCHES)}, got {list(predictions)}")
        null, wide_sigma = predictions["null"], expand_dims(sigma, predictions["null"])
        # eps = (x - x0) / sigma; only differences of eps count, so eps of the null branch is taken as 0
        e1, e2 = ((null - predictions.get(name, null)) / wide_sigma for name in ("class", "target"))
        guidance, new_state, regions = compute_guidance(torch.zeros_like(null), e1, e2, state, self.config)
        if self.on_regions is not None:
            self.on_regions(state["row"], state["step"], regions)
        x0 = null - wide_sigma * guidance
        return (x0 if self.limits is None else x0.clamp(*self.limits)), new_state
