"""PLMS, the sampler of the first Stable Diffusion code (Rombach et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

from farout.diffusion.solvers.adams_bashforth import AdamsBashforth

__all__ = ["PLMS"]


class PLMS(AdamsBashforth):
    """Adams-Bashforth of order 4 on eps, whose first step is a Heun step; n + 1 evaluations for n steps.

    It is the pseudo linear multistep method of Liu et al. (2022) without the Runge-Kutta warm-up: the second and third
    step are of orders 2 and 3.
    """

    evaluates_once: ClassVar[bool] = False
    heun_start: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(4)
        self.name = "plms"
