"""How much a classifier's output changes when an image is noised and denoised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from farout.classifiers.model import Outputs
from farout.core.devices import in_float64

__all__ = [
    "METRICS",
    "POSTHOC",
    "SPACES",
    "Distance",
    "PosthocScore",
    "compute_changes",
    "compute_posthoc_scores",
    "normalize_outputs",
]

Distance = Literal["l1", "l2", "argmax"]
PosthocScore = Literal["energy", "max_logit", "msp"]
SPACES = ("logit", "feature", "pixel")
POSTHOC: tuple[str, ...] = get_args(PosthocScore)
METRICS = tuple(
    f"{space}_{reference}_{distance}"
    for space in SPACES
    for reference in ("global", "local")
    for distance in get_args(Distance)
)
"""What is measured at every level and draw: the change from the clean image (`global`) and from the level below
(`local`)."""


def normalize_outputs(images: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    """Logits (B, K), features (B, D) and pixels (B, C H W), each divided by its Euclidean norm + 1e-10."""
    vectors = {"logit": outputs.logits, "feature": outputs.features, "pixel": images.flatten(1).float()}
    return {space: vector / (vector.norm(dim=1, keepdim=True) + 1e-10) for space, vector in vectors.items()}


def compute_changes(clean: Mapping[str, Tensor], denoised: Mapping[str, Tensor]) -> Tensor:
    """S_global and S_local before the mean over draws (Liu et al. 2022).

    Args:
        clean: normalized outputs f(x) (B, d) by space.
        denoised: normalized outputs f(x_t) (B, level, draw, d) by space, levels ascending.

    Returns:
        (B, level, draw, metric), in the order of METRICS. `argmax`: change of the largest component of f(x).
    """
    columns = []
    for space in SPACES:
        f_t = denoised[space]
        f_0 = clean[space][:, None, None]
        # f(x_s): the level below, and below the lowest level the clean image
        f_s = torch.cat([f_0.expand(-1, 1, f_t.shape[2], -1), f_t[:, :-1]], dim=1)
        largest = f_0.argmax(-1, keepdim=True).expand(*f_t.shape[:3], 1)
        for reference in (f_0, f_s):
            difference = f_t - reference
            columns += [
                difference.abs().sum(-1),
                difference.norm(dim=-1),
                difference.gather(-1, largest)[..., 0].abs(),
            ]
    return torch.stack(columns, dim=-1)


def compute_posthoc_scores(logits: Tensor) -> Tensor:
    """Scores of the clean image's logits l (B, K) that need no diffusion: (B, 3), in the order of POSTHOC.

    -logsumexp l (energy), -max l, and log(1 - max softmax l); the logarithm distinguishes confident images, for which
    1 - max softmax l rounds to 0.
    """
    logits = in_float64(logits)
    total = logits.logsumexp(1)
    without_largest = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
    return torch.stack([-total, -logits.amax(1), without_largest.logsumexp(1) - total], dim=1)
