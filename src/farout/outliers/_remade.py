"""Images made again in the pass that makes outliers of them, by the same network on the same way, with nothing changed.

A classifier is given them as images of their classes, so that being generated is not what tells outliers apart
(Yoon et al. 2025 learn from all images twice, as they are and as the autoencoder returns them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farout.diffusion import paths
from farout.diffusion.conditioning import Condition
from farout.diffusion.denoiser import Clamped, Denoiser, spread
from farout.diffusion.methods import rehearse
from farout.outliers._starts import Draw, Plan, Start
from farout.outliers.base import Remade

__all__ = ["rehearse_remaking", "remade"]


def rehearse_remaking(plan: Plan) -> None:
    """Raises FaroutError for a solver that cannot go the way back from the lowest and the highest level."""
    if plan.model.autoencoder is None:
        ends = (plan.method.k_min, plan.method.k_max)
        rehearse(plan.solve, paths.pad([plan.path(_steps_back(plan, k)) for k in ends]))


@torch.no_grad()
def remade(plan: Plan, start: Start, indices: Sequence[int]) -> Remade | None:
    """The images of a start, made again, of those outliers number `indices` that are the first of their image; None
    where none is.

    With an autoencoder: what it makes of the latents that outliers start from, at level 0. Else each is noised with the
    noise of its outlier, to its level or to the middle of the steps where that is lower, and denoised by the same
    solver under its own class, without guidance: from further up a new sample of its class would come back (see
    `farout.diffusion.round_trip`).
    """
    rows = [row for row, index in enumerate(indices) if index < len(plan.order)]
    if not rows:
        return None
    draws = [start.draws[row] for row in rows]
    x0, levels = start.clean[rows], [0.0] * len(rows)
    if plan.model.autoencoder is None:
        x0 = _there_and_back(plan, draws, x0, start.own.rows(torch.tensor(rows, device=x0.device)))
        levels = [plan.level(_steps_back(plan, draw.k)) for draw in draws]
    hashes = [plan.work.source.content_hash(draw.place) for draw in draws]
    return Remade(rows, plan.model.decode(x0).cpu(), {"level": levels, "source_hash": hashes})


def _steps_back(plan: Plan, k: int) -> int:
    """Of the K steps of an outlier, those from the middle down."""
    return min(k, max(1, plan.method.steps // 2))


def _there_and_back(plan: Plan, draws: Sequence[Draw], clean: Tensor, own: Condition) -> Tensor:
    sigmas = paths.pad([plan.path(_steps_back(plan, draw.k)) for draw in draws]).to(clean.device)
    noise = torch.stack([draw.noise for draw in draws]).to(clean.device)
    denoiser: Denoiser = plan.denoiser
    if plan.limits is not None:
        denoiser = Clamped(denoiser, *plan.limits)
    return plan.solve(denoiser, clean + spread(sigmas[:, 0], clean) * noise, sigmas, own)
