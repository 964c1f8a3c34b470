"""What a synthesizer declares about itself in class variables."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SynthesisRequirements"]


@dataclass(frozen=True)
class SynthesisRequirements:
    """The networks that a synthesizer requires, in addition to labels.

    Args:
        diffusion: whether a diffusion model is required.
        class_conditional: whether the diffusion model must be conditioned on classes.
        classifier: whether a classifier is required.
    """

    diffusion: bool = False
    class_conditional: bool = False
    classifier: bool = False
