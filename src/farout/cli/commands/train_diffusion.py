"""`farout train diffusion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farout.cli.terminal import print_text
from farout.diffusion.model import DiffusionModel

__all__ = ["print_diffusion_model"]


def print_diffusion_model(model: DiffusionModel, arguments: Mapping[str, Any]) -> None:
    """Prints the number of training images and parameters, and the folder."""
    size = f"{len(model.trained_on)} images ({model.parameters:,} parameters)"
    print_text(f"Diffusion model trained on {size}; written to {arguments['out']}")
