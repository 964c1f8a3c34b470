"""Small U-Nets with the tensor names and the arithmetic of other programs, written from their published structure."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Wrapped(nn.Module):
    """A layer one name deeper, such as MONAI's `conv1.conv`."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.inner = name
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.inner)(x)


def embed_time(t: Tensor, width: int, *, last: int, sine_first: bool) -> Tensor:
    """Sinusoids of frequencies 10000^(-k / (width / 2 - last))."""
    half = width // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - last))
    parts = [angles.sin(), angles.cos()] if sine_first else [angles.cos(), angles.sin()]
    return torch.cat(parts, dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, heads, N, d)."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where a program starts with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        spread = 0.3 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.2
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return network.eval()


# -- MONAI ----------------------------------------------------------------------------------------------------------


class MonaiBlock(nn.Module):
    def __init__(self, cin: int, cout: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, cin, 1e-6), nn.GroupNorm(32, cout, 1e-6)
        self.conv1 = Wrapped("conv", nn.Conv2d(cin, cout, 3, padding=1))
        self.conv2 = Wrapped("conv", nn.Conv2d(cout, cout, 3, padding=1))
        self.time_emb_proj = nn.Linear(time, cout)
        self.skip_connection = nn.Identity() if cin == cout else Wrapped("conv", nn.Conv2d(cin, cout, 1))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.time_emb_proj(functional.silu(e))[:, :, None, None]
        return self.skip_connection(x) + self.conv2(functional.silu(self.norm2(h)))


class MonaiAttention(nn.Module):
    """The output projection exists and is not applied."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(32, width, 1e-6), width // head
        self.to_q, self.to_k, self.to_v, self.proj_attn = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(2).transpose(1, 2)
        mixed = attend(*(split_heads(layer(flat), self.heads) for layer in (self.to_q, self.to_k, self.to_v)))
        return x + mixed.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape)


class MonaiUNet(nn.Module):
    def __init__(self, colors: int, widths: Sequence[int], blocks: int, attends: Sequence[bool], head: int) -> None:
        super().__init__()
        self.width, time = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = Wrapped("conv", nn.Conv2d(colors, widths[0], 3, padding=1))
        self.down_blocks, self.up_blocks, skips, c = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            down: Any = nn.Module()
            down.resnets, down.attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                down.resnets.append(MonaiBlock(c, width, time))
                c = width
                skips.append(c)
                if attends[level]:
                    down.attentions.append(MonaiAttention(c, head))
            if level < len(widths) - 1:
                down.downsampler = Wrapped("op", Wrapped("conv", nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
            self.down_blocks.append(down)
        self.middle_block: Any = nn.Module()
        self.middle_block.resnet_1, self.middle_block.resnet_2 = MonaiBlock(c, c, time), MonaiBlock(c, c, time)
        self.middle_block.attention = MonaiAttention(c, head)
        for level in reversed(range(len(widths))):
            up: Any = nn.Module()
            up.resnets, up.attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                up.resnets.append(MonaiBlock(c + skips.pop(), widths[level], time))
                c = widths[level]
                if attends[level]:
                    up.attentions.append(MonaiAttention(c, head))
            if level:
                up.upsampler = Wrapped("conv", Wrapped("conv", nn.Conv2d(c, c, 3, padding=1)))
            self.up_blocks.append(up)
        last = Wrapped("conv", nn.Conv2d(c, colors, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(32, c, 1e-6), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time_embed(embed_time(t, self.width, last=0, sine_first=False))
        h = self.conv_in(x)
        skips = [h]
        down: Any
        up: Any
        for down in self.down_blocks:
            for number, block in enumerate(down.resnets):
                h = block(h, e)
                h = down.attentions[number](h) if len(down.attentions) else h
                skips.append(h)
            if hasattr(down, "downsampler"):
                h = down.downsampler(h)
                skips.append(h)
        middle = self.middle_block
        h = middle.resnet_2(middle.attention(middle.resnet_1(h, e)), e)
        for up in self.up_blocks:
            for number, block in enumerate(up.resnets):
                h = block(torch.cat([h, skips.pop()], dim=1), e)
                h = up.attentions[number](h) if len(up.attentions) else h
            if hasattr(up, "upsampler"):
                h = up.upsampler(functional.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(h)


# -- Ho et al. 2020 in PyTorch, with the class table of DiffOOD ------------------------------------------------------


class DdimBlock(nn.Module):
    def __init__(self, cin: int, cout: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, cin, 1e-6), nn.GroupNorm(32, cout, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.temb_proj = nn.Linear(time, cout)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.temb_proj(functional.silu(e))[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DdimAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        flat = [layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)]
        return x + self.proj_out(attend(*flat)[:, 0].transpose(1, 2).reshape(x.shape))


class DdimUNet(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, attends: Sequence[bool], classes: int = 0) -> None:
        super().__init__()
        self.width, time = widths[0], 4 * widths[0]
        self.temb: Any = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(widths[0], time), nn.Linear(time, time)])
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            down: Any = nn.Module()
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                down.block.append(DdimBlock(c, width, time))
                c = width
                skips.append(c)
                if attends[level]:
                    down.attn.append(DdimAttention(c))
            if level < len(widths) - 1:
                down.downsample = Wrapped("conv", nn.Conv2d(c, c, 3, stride=2))
                skips.append(c)
            self.down.append(down)
        self.mid: Any = nn.Module()
        self.mid.block_1, self.mid.block_2 = DdimBlock(c, c, time), DdimBlock(c, c, time)
        self.mid.attn_1 = DdimAttention(c)
        for level in reversed(range(len(widths))):
            up: Any = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                up.block.append(DdimBlock(c + skips.pop(), widths[level], time))
                c = widths[level]
                if attends[level]:
                    up.attn.append(DdimAttention(c))
            if level:
                up.upsample = Wrapped("conv", nn.Conv2d(c, c, 3, padding=1))
            self.up.insert(0, up)
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, 1e-6), nn.Conv2d(c, 3, 3, padding=1)
        if classes:
            self.label_emb = nn.Embedding(classes + 1, time)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        e = embed_time(t, self.width, last=1, sine_first=True)
        e = self.temb.dense[1](functional.silu(self.temb.dense[0](e)))
        e = e if y is None else e + self.label_emb(y)
        h = self.conv_in(x)
        skips = [h]
        down: Any
        up: Any
        for down in self.down:
            for number, block in enumerate(down.block):
                h = block(h, e)
                h = down.attn[number](h) if len(down.attn) else h
                skips.append(h)
            if hasattr(down, "downsample"):
                h = down.downsample(functional.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, e)), e)
        for up in reversed(self.up):
            for number, block in enumerate(up.block):
                h = block(torch.cat([h, skips.pop()], dim=1), e)
                h = up.attn[number](h) if len(up.attn) else h
            if hasattr(up, "upsample"):
                h = up.upsample(functional.interpolate(h, scale_factor=2, mode="nearest"))
        return self.conv_out(functional.silu(self.norm_out(h)))


# -- OpenAI's guided-diffusion and improved-diffusion ----------------------------------------------------------------


class GuidedBlock(nn.Module):
    """A residual block; `resample` is "up", "down" or empty."""

    def __init__(self, cin: int, cout: int, time: int, *, shift_only: bool, resample: str = "") -> None:
        super().__init__()
        self.shift_only, self.resample = shift_only, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, cout if shift_only else 2 * cout))
        last = nn.Conv2d(cout, cout, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, cout), nn.SiLU(), nn.Dropout(0.1), last)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample == "down":
            x, h = functional.avg_pool2d(x, 2), functional.avg_pool2d(h, 2)
        if self.resample == "up":
            x, h = (functional.interpolate(each, scale_factor=2, mode="nearest") for each in (x, h))
        h, change = self.in_layers[2](h), self.emb_layers(e)[:, :, None, None]
        if self.shift_only:
            return self.skip_connection(x) + self.out_layers(h + change)
        scale, shift = change.chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class GuidedAttention(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(32, width), width // head
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *_ = x.shape
        flat = self.qkv(self.norm(x).flatten(2)).reshape(b, self.heads, 3 * c // self.heads, -1)
        q, k, v = (each.transpose(-1, -2) for each in flat.chunk(3, dim=2))
        mixed = attend(q, k, v).transpose(-1, -2).reshape(b, c, -1)
        return x + self.proj_out(mixed).reshape(x.shape)


class GuidedUNet(nn.Module):
    def __init__(
        self,
        widths: Sequence[int],
        blocks: int,
        attends: Sequence[bool],
        head: int,
        *,
        by_blocks: bool,
        shift_only: bool = False,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.width, time = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)

        def block(cin: int, cout: int, resample: str = "") -> GuidedBlock:
            return GuidedBlock(cin, cout, time, shift_only=shift_only, resample=resample)

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, widths[0], 3, padding=1)])])
        self.output_blocks, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                layers = [block(c, width), *([GuidedAttention(width, head)] if attends[level] else [])]
                c = width
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(c)
            if level < len(widths) - 1:
                down = block(c, c, "down") if by_blocks else Wrapped("op", nn.Conv2d(c, c, 3, stride=2, padding=1))
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)
        self.middle_block = nn.ModuleList([block(c, c), GuidedAttention(c, head), block(c, c)])
        for level in reversed(range(len(widths))):
            for number in range(blocks + 1):
                layers = [block(c + skips.pop(), widths[level])]
                c = widths[level]
                layers += [GuidedAttention(c, head)] if attends[level] else []
                if level and number == blocks:
                    convolution = Wrapped("conv", nn.Conv2d(c, c, 3, padding=1))
                    layers.append(block(c, c, "up") if by_blocks else convolution)
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 6, 3, padding=1))

    @staticmethod
    def apply_layers(layers: Any, h: Tensor, e: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, GuidedBlock):
                h = layer(h, e)
            elif isinstance(layer, Wrapped) and layer.inner == "conv":
                h = layer(functional.interpolate(h, scale_factor=2, mode="nearest"))
            else:
                h = layer(h)
        return h

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        e = self.time_embed(embed_time(t, self.width, last=0, sine_first=False))
        e = e if y is None else e + self.label_emb(y)
        h, skips = x, []
        for layers in self.input_blocks:
            h = self.apply_layers(layers, h, e)
            skips.append(h)
        h = self.apply_layers(self.middle_block, h, e)
        for layers in self.output_blocks:
            h = self.apply_layers(layers, torch.cat([h, skips.pop()], dim=1), e)
        return self.out(h)
