"""`farout train diffusion`."""

from __future__ import annotations

from farout.diffusion.model import DiffusionModel

__all__ = ["print_diffusion_model"]


def print_diffusion_model(model: DiffusionModel) -> None:
    """Prints the number of training images and parameters."""
    print(f"trained on {len(model.trained_on)} images, {model.parameters:,} parameters")
