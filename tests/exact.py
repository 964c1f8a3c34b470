"""Gaussian data, whose denoiser and whose flow to noise and back are known exactly."""

import torch
from torch import Tensor

from farout.diffusion.denoiser import GaussianDenoiser


def oracle(dimension: int = 6) -> GaussianDenoiser:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(dimension, dimension, generator=generator) / 3
    return GaussianDenoiser(torch.linspace(-1, 1, dimension), root @ root.T + 0.05 * torch.eye(dimension))


def exact_flow(denoiser: GaussianDenoiser, x: Tensor, start: float, end: float) -> Tensor:
    """The probability flow of Gaussian data: each eigendirection scales by sqrt((l + end^2) / (l + start^2))."""
    gain = ((denoiser.eigenvalues + end**2) / (denoiser.eigenvalues + start**2)).sqrt()
    return (denoiser.mean + (gain * ((x.double() - denoiser.mean) @ denoiser.basis)) @ denoiser.basis.T).float()
