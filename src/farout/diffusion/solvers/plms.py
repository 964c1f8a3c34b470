"""PLMS, the sampler of the first Stable Diffusion code: Adams-Bashforth of order 4 on eps."""

from __future__ import annotations

from farout.diffusion.solvers.adams_bashforth import multistep
from farout.diffusion.solvers.base import make_solver

__all__ = ["plms"]

plms = make_solver(
    multistep(4, heun_first=True),
    "plms",
    "PLMS: Adams-Bashforth of order 4 whose first step is a Heun step (one evaluation more), history per row.",
    once=False,
)
