"""Two curved classes of vectors, and manifolds fitted to them, that many tests share."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from farout.synthesis.ncis.manifold import Manifold, ManifoldConfig, fit_manifold

DIM = 6
SHORT = ManifoldConfig(steps=12, batch_size=64, validations=3, candidates=40, kept=4, device="cpu")


def curved(count: int, seed: int, noise: float = 0.03) -> tuple[Tensor, Tensor]:
    """Two classes on curves, a parabola and a sine, each in its own plane of DIM dimensions; in mixed order."""
    generator, shapes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    rows = []
    for bend in (lambda t: 2 * t**2, lambda t: torch.sin(3 * t)):
        turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=shapes))[0]
        t = torch.rand(count, generator=generator) * 2 - 1
        flat = noise * torch.randn(count, DIM, generator=generator)
        flat[:, 0] += 2 * t
        flat[:, 1] += bend(t)
        rows.append(flat @ turn + torch.randn(DIM, generator=shapes))
    return torch.stack(rows, dim=1).flatten(0, 1), torch.arange(2).repeat(count)


VECTORS, LABELS = curved(60, 0)


@cache
def short() -> Manifold:
    """A network with little training."""
    return fit_manifold(VECTORS, LABELS, SHORT, ["bow", "wave"], seed=3)


@cache
def linear() -> Manifold:
    """The linear baseline."""
    return fit_manifold(VECTORS, LABELS, replace(SHORT, map="linear"), 2, seed=3)
