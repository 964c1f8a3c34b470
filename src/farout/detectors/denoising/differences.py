"""How far a classifier's view of an image moves when the image is noised and denoised: the distances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from farout.classifiers.model import Outputs
from farout.core.devices import in_float64

__all__ = ["METRICS", "POST_HOC", "SPACES", "Distance", "PostHoc", "changes", "post_hoc", "views"]

Distance = Literal["l1", "l2", "argmax"]
PostHoc = Literal["energy", "max_logit", "msp"]
SPACES = ("logit", "feature", "pixel")
POST_HOC: tuple[str, ...] = get_args(PostHoc)
_REACHES, _DISTANCES = ("global", "local"), get_args(Distance)
METRICS = (*(f"{space}_{reach}_{distance}" for space in SPACES for reach in _REACHES for distance in _DISTANCES),)
"""What is measured at every level and draw: from the clean image (`global`) and from the level below (`local`)."""
_TINY = 1e-10


def views(images: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    """What of the images (B, …) is compared: logits (B, K), features (B, D), pixels (B, C H W), each divided by its
    Euclidean norm + 1e-10.
    """
    found = {"logit": outputs.logits, "feature": outputs.features, "pixel": images.flatten(1).float()}
    return {name: value / (value.norm(dim=1, keepdim=True) + _TINY) for name, value in found.items()}


def changes(clean: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> Tensor:
    """Distances (B, level, draw, metric) of `moved` (B, level, draw, d), by space, from `clean` (B, draw, d).

    `global`: from the clean image; `local`: from the level below, which for the lowest one is the clean image.
    """
    columns = []
    for space in SPACES:
        start = clean[space][:, None]
        now = moved[space]
        below = torch.cat([start.expand(-1, 1, now.shape[2], -1), now[:, :-1]], dim=1)
        largest = start.argmax(-1, keepdim=True).expand(-1, now.shape[1], now.shape[2], 1)
        for base in (start, below):
            gap = now - base
            columns += [gap.abs().sum(-1), gap.norm(dim=-1), gap.gather(-1, largest)[..., 0].abs()]
    return torch.stack(columns, dim=-1)


def post_hoc(logits: Tensor) -> Tensor:
    """Scores (B, 3) of the clean image that need no diffusion, higher = further out: -logsumexp l (the energy), -max l,
    and log(1 - max softmax l), in which confident images differ where 1 - max softmax l has no digits left.
    """
    logits = in_float64(logits)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
    whole = logits.logsumexp(1)
    return torch.stack([-whole, -logits.amax(1), others.logsumexp(1) - whole], dim=1)
