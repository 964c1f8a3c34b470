"""All solvers by name."""

from __future__ import annotations

from torch import Tensor

from farout.core.errors import FaroutError
from farout.diffusion.schedule import NoiseSchedule
from farout.diffusion.solvers.base import Solver, VPSolver
from farout.diffusion.solvers.ddim import DDIM
from farout.diffusion.solvers.dpm_solver import DPMSolver2M
from farout.diffusion.solvers.heun import Heun
from farout.diffusion.solvers.ndm import NDM1, NDM4
from farout.diffusion.solvers.plms import PLMS
from farout.diffusion.solvers.pndm import PNDM2, PNDM4
from farout.diffusion.solvers.probability_flow import ProbabilityFlow
from farout.diffusion.solvers.unipc import UniPC

__all__ = ["SOLVERS", "create_solver", "is_adaptive", "solver_path"]

SOLVERS: dict[str, type[Solver]] = {
    "ddim": DDIM,
    "heun": Heun,
    "dpm_solver_2m": DPMSolver2M,
    "unipc": UniPC,
    "plms": PLMS,
    "pndm2": PNDM2,
    "pndm4": PNDM4,
    "ndm1": NDM1,
    "ndm4": NDM4,
    "probability_flow": ProbabilityFlow,
}


def create_solver(name: str, schedule: NoiseSchedule) -> Solver:
    """The solver of this name for networks of this schedule; raises FaroutError for an unknown name."""
    if name not in SOLVERS:
        raise FaroutError(f"there is no solver {name!r}; expected one of {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    return solver(schedule) if issubclass(solver, VPSolver) else solver()


def is_adaptive(name: str) -> bool:
    """Whether the method chooses its own steps between two noise levels."""
    return name == "probability_flow"


def solver_path(name: str, path: Tensor) -> Tensor:
    """The path (steps + 1,) as the solver expects it: start and end alone where it chooses its own steps."""
    return path[[0, -1]] if is_adaptive(name) else path
