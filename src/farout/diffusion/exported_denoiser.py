"""The denoiser of a diffusion model as one torch module: x, sigma and class in, x0 out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from farout.diffusion.denoiser import expand_dims
from farout.diffusion.model import DiffusionModel

__all__ = ["ExportedDenoiser"]


class ExportedDenoiser(nn.Module):
    """`NetworkDenoiser` as a module: conversion of sigma, network and x0, and a table of the classes' conditions.

    Args:
        model: the diffusion model.

    Attributes:
        has_classes: whether `forward` requires classes.
        null_class: the class of rows without a class; None: there is none.
    """

    log_sigmas: Tensor

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.network: Any = copy.deepcopy(model.network).cpu().float().eval().requires_grad_(False)
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, Upsample2D) and layer.interpolate and not (layer.norm or layer.use_conv_transpose):
                self.network.set_submodule(name, _Upsampling(layer))
        self.prediction, self.channels = model.prediction, model.shape[0]
        self.register_buffer("log_sigmas", model.schedule.sigma.log().clone())
        conditioning = model.conditioning
        self.has_classes, self.null_class = conditioning is not None, None
        self.tables: list[str] = []
        if conditioning is not None:
            conditions = conditioning(torch.arange(conditioning.num_classes))
            if conditioning.has_null:
                self.null_class = conditioning.num_classes
                conditions = conditions.join([conditions, conditioning.null_condition(1)])
            for name, table in conditions.tensors.items():
                self.tables.append(name)
                self.register_buffer(f"table_{name}", table.detach().cpu().clone())

    def forward(self, x: Tensor, sigma: Tensor, classes: Tensor | None = None) -> Tensor:
        """x = x0 + sigma noise (B, C, H, W) float32, sigma (B,) float32, classes (B,) int64 -> x0."""
        condition = {name: self.get_buffer(f"table_{name}")[classes] for name in self.tables}
        broad = expand_dims(sigma, x)
        scale = (1 + broad.square()).sqrt()
        output = self.network(x / scale, self._level(sigma).to(torch.float32), **condition, return_dict=False)[0]
        predicted = output[:, : self.channels]  # without learned variances
        if self.prediction == "epsilon":
            return x - broad * predicted
        if self.prediction == "v_prediction":
            return (x / scale - broad * predicted) / scale
        return predicted

    def _level(self, sigma: Tensor) -> Tensor:
        """`NoiseSchedule.t_of`, with comparisons instead of a search, which not every runtime has."""
        last = self.log_sigmas.shape[0] - 1
        log_sigma = sigma.to(torch.float64).clamp(min=1e-30).log()
        above = (self.log_sigmas[None, :] < log_sigma[:, None]).to(torch.int64).sum(1).clamp(1, last)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        weight = torch.where(high > low, (log_sigma - low) / (high - low).clamp(min=1e-30), 0.0)
        t = ((above - 1).to(torch.float64) + weight).clamp(0, last)
        nearest = torch.floor(t + 0.5)
        is_level = (self.log_sigmas[nearest.to(torch.int64)] - log_sigma).abs() < 1e-6
        return torch.where(is_level, nearest, t)


class _Upsampling(nn.Module):
    """diffusers' `Upsample2D` without its conditions on the size of the batch, which a graph cannot contain."""

    def __init__(self, layer: Upsample2D) -> None:
        super().__init__()
        conv = layer.conv if layer.name == "conv" else layer.Conv2d_0
        self.conv: nn.Module = conv if layer.use_conv and conv is not None else nn.Identity()

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        size = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        return self.conv(functional.interpolate(hidden_states, **size, mode="nearest"))
