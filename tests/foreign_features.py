"""DLSR's denoiser and EfficientNet-b0 of efficientnet_pytorch: their tensor names, from the published structure."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreign_unets import embed_time


class LfdnBlock(nn.Module):
    def __init__(self, hidden: int, narrow: int, time: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(1, hidden), nn.SiLU(), nn.Linear(hidden, narrow))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, narrow))
        self.out_layers = nn.Sequential(nn.GroupNorm(1, narrow), nn.SiLU(), nn.Dropout(0), nn.Linear(narrow, hidden))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x) + self.emb_layers(e))


class Lfdn(nn.Module):
    def __init__(self, width: int, hidden: int, narrow: int, time: int, blocks: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_proj = nn.Sequential(nn.SiLU(), nn.Linear(width, hidden))
        self.time_embed = nn.Sequential(nn.Linear(hidden, time), nn.SiLU(), nn.Linear(time, time))
        self.res_blocks = nn.ModuleList(LfdnBlock(hidden, narrow, time) for _ in range(blocks))
        self.out = nn.Sequential(nn.GroupNorm(1, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, e = self.input_proj(x), self.time_embed(embed_time(t, self.hidden, last=0, sine_first=False))
        for block in self.res_blocks:
            h = block(h, e)
        return self.out(h)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's padding: as much as an output of ceil(size / stride) needs, the odd pixel on the right and below."""
    need = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in (x.shape[-1], x.shape[-2])]
    return functional.pad(x, [side for n in need for side in (n // 2, n - n // 2)])


class MobileBlock(nn.Module):
    def __init__(self, cin: int, cout: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner, squeezed = cin * expand, max(1, cin // 4)
        self.kernel, self.stride, self.residual = kernel, stride, cin == cout and stride == 1
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(cin, inner, 1, bias=False), nn.BatchNorm2d(inner, 1e-3)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, 1e-3)
        self._se_reduce, self._se_expand = nn.Conv2d(inner, squeezed, 1), nn.Conv2d(squeezed, inner, 1)
        self._project_conv, self._bn2 = nn.Conv2d(inner, cout, 1, bias=False), nn.BatchNorm2d(cout, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self._bn0(self._expand_conv(x))) if hasattr(self, "_bn0") else x
        h = functional.silu(self._bn1(self._depthwise_conv(pad_same(h, self.kernel, self.stride))))
        gate = self._se_expand(functional.silu(self._se_reduce(h.mean((2, 3), keepdim=True))))
        h = self._bn2(self._project_conv(h * gate.sigmoid()))
        return x + h if self.residual else h


class EfficientNetB0(nn.Module):
    """Stages of (repeats, kernel, stride, expansion, channels)."""

    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, c = [], 32
        for repeats, kernel, stride, expand, cout in self.stages:
            for number in range(repeats):
                blocks.append(MobileBlock(c, cout, expand, kernel, 1 if number else stride))
                c = cout
        self._blocks: Any = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self._bn0(self._conv_stem(pad_same(x, 3, 2))))
        for block in self._blocks:
            h = block(h)
        return self._fc(functional.silu(self._bn1(self._conv_head(h))).mean((2, 3)))


def randomize_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random running statistics of all batch normalizations."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return network
