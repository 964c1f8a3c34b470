"""A denoiser of vectors that starts as the exact denoiser of a Gaussian and learns what differs from it."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from farout.core.chunking import BatchSize, call_in_chunks, check_batch_size
from farout.core.devices import Precision, autocast
from farout.core.errors import FaroutError
from farout.diffusion.conditioning.base import Condition
from farout.features.feature_denoiser import initialize_with_zeros

__all__ = ["ResidualDenoiser", "ResidualNetwork"]

_FREQUENCIES = 8
"""Number of sines and of cosines of log sigma; their periods are 4 pi / k."""


class ResidualNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as in diffusers
    """The learned part F of `ResidualDenoiser`, a residual network on vectors (B, width); zero before training.

    h = Linear(x); in each block h = h + Linear0(SiLU(LN(Linear(SiLU(LN(h))) + Linear(e)))); the output is
    Linear0(SiLU(LN(h))). Linear0 starts at zero, e is a two-layer network of sines and cosines of log sigma.

    Args:
        width: number of features.
        hidden: width of the hidden layers.
        embedding: width of the embedding of the noise level.
        blocks: number of blocks.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int, hidden: int = 512, embedding: int = 128, blocks: int = 3) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        if min(width, hidden, embedding, blocks) < 1:
            raise FaroutError(f"widths and blocks must be at least 1, got {dict(self.config)}")
        self.enter = nn.Linear(width, hidden)
        self.level = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.stack = nn.ModuleList(_Block(hidden, embedding) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), initialize_with_zeros(nn.Linear(hidden, width)))

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        """x (B, width), log_sigma (B,) -> (B, width)."""
        angles = log_sigma.float()[:, None] / 2 * torch.arange(1, _FREQUENCIES + 1, device=x.device)
        e, h = self.level(torch.cat([angles.cos(), angles.sin()], dim=1)), self.enter(x)
        for block in self.stack:
            h = block(h, e)
        return self.leave(h)


class _Block(nn.Module):
    def __init__(self, hidden: int, embedding: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.level = nn.Linear(embedding, hidden)
        self.leave = nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), initialize_with_zeros(nn.Linear(hidden, hidden)))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + self.leave(self.enter(h) + self.level(e))


class ResidualDenoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, log sigma), for vectors whose coordinates are uncorrelated.

    With v the variance of a coordinate (Karras et al. 2022, table 1, for every coordinate on its own),

        c_skip = v / (v + sigma^2),  c_out = sigma sqrt(v / (v + sigma^2)),  c_in = 1 / sqrt(v + sigma^2).

    For F = 0 this is the exact denoiser of a Gaussian with these variances.

    Args:
        network: F.
        variances: (width,), positive.
        batch_size: the most rows of one network call; `auto`: by memory.
        precision: precision of the network; D is float32.

    Attributes:
        evaluations: rows evaluated so far.
    """

    def __init__(
        self, network: nn.Module, variances: Tensor, batch_size: BatchSize = "auto", precision: Precision = "fp32"
    ) -> None:
        self.network, self.variances = network, variances.float()
        self.batch_size, self.precision = check_batch_size(batch_size), precision
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """x (B, width), sigma (B,) -> the expected clean vectors (B, width), float32."""
        self.evaluations += len(x)
        c_skip, c_out, c_in = self.coefficients(sigma)

        def call(scaled: Tensor, log_sigma: Tensor) -> Tensor:
            with autocast(scaled.device, self.precision):
                output: Tensor = self.network(scaled, log_sigma)
            return output.float()

        learned = call_in_chunks(self.network, call, c_in * x, sigma.log(), batch_size=self.batch_size)
        return c_skip * x + c_out * learned

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, (B, width) each."""
        v, s = self.variances.to(sigma.device), sigma[:, None]
        total = v + s**2
        return v / total, s * (v / total).sqrt(), 1 / total.sqrt()

    def loss(self, x0: Tensor, generator: torch.Generator, lowest: float, highest: float) -> Tensor:
        """Mean over rows and coordinates of ||D(x0 + sigma noise, sigma) - x0||^2 / c_out^2, log sigma uniform.

        The weight makes the target of F have variance 1 at every level. 1 - the loss is the share of a Gaussian's
        unexplained variance that F explains.

        Args:
            x0: clean vectors (B, width).
            generator: of the levels and the noise, on the CPU.
            lowest: lowest sigma.
            highest: highest sigma.
        """
        position = torch.rand(len(x0), generator=generator).to(x0.device)
        sigma = torch.exp(math.log(lowest) + position * math.log(highest / lowest))
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        c_skip, c_out, c_in = self.coefficients(sigma)
        x = x0 + sigma[:, None] * noise
        target = (x0 - c_skip * x) / c_out
        return (self.network(c_in * x, sigma.log()).float() - target).square().mean()
