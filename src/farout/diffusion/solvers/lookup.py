"""All numerical methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Solver
from farout.diffusion.solvers.ddim import ddim
from farout.diffusion.solvers.dpm_solver import dpm_solver_2m
from farout.diffusion.solvers.heun import heun
from farout.diffusion.solvers.ndm import ndm1, ndm4
from farout.diffusion.solvers.plms import plms
from farout.diffusion.solvers.pndm import pndm2, pndm4
from farout.diffusion.solvers.probability_flow import probability_flow
from farout.diffusion.solvers.unipc import unipc

__all__ = ["SOLVERS", "is_adaptive", "rehearse", "solver_by_name", "solver_path"]


def _any(solver: Solver) -> Callable[[NoiseSchedule], Solver]:
    return lambda schedule: solver


SOLVERS: Mapping[str, Callable[[NoiseSchedule], Solver]] = MappingProxyType(
    {
        "ddim": _any(ddim),
        "heun": _any(heun),
        "dpm_solver_2m": _any(dpm_solver_2m),
        "unipc": _any(unipc),
        "plms": _any(plms),
        "pndm2": _any(pndm2),
        "pndm4": pndm4,
        "ndm1": ndm1,
        "ndm4": ndm4,
        "probability_flow": probability_flow,
    }
)
"""Makers of solvers for a schedule, by name."""


def solver_by_name(name: str, schedule: NoiseSchedule) -> Solver:
    """The solver of that name for networks of that schedule; raises FaroutError for a name that is not in `SOLVERS`."""
    if name not in SOLVERS:
        raise FaroutError(f"there is no solver {name!r}; expected one of {', '.join(SOLVERS)}")
    return SOLVERS[name](schedule)


def is_adaptive(name: str) -> bool:
    """Whether the method finds its own steps between two ends."""
    return name == "probability_flow"


def solver_path(name: str, path: Tensor) -> Tensor:
    """The path (steps + 1,) as the solver takes it: start and end alone where it finds its own steps."""
    return path[[0, -1]] if is_adaptive(name) else path


def rehearse(solver: Solver, sigmas: Tensor, *, guided: bool = False) -> None:
    """Walks paths (B, steps + 1) without a network: one that the solver cannot follow raises its FaroutError now, not
    after the work that comes before. `guided`: under a stateful guide.
    """
    condition = {"alone": Condition()} if guided else None
    guide = (lambda found, sigma, state: (found["alone"], state)) if guided else None
    still = torch.zeros(len(sigmas), 1)
    solver(lambda x, sigma, condition=None: x, still, sigmas.cpu(), condition, guide=guide)
