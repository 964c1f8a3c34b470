"""Variants of a source: flips, rotations and corruptions of its images, the same for every order and subset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from farout.data.decoding import from_pil, to_pil
from farout.data.source_spec import DEFAULT_STRENGTHS

__all__ = ["apply_variant"]


def apply_variant(
    image: Tensor, name: str, strength: float | None, identity: str, other: Callable[[int], Tensor]
) -> Tensor:
    """Apply variant `name` to a uint8 image (C, H, W); the result is uint8 with the same number of channels.

    The variants are `vflip`, `hflip`; `rot90`, `rot180`, `rot270` (counterclockwise); `blur` (Gaussian, `strength` =
    standard deviation in pixels); `contrast` (`strength` times the distance to the image's mean); `noise` (Gaussian,
    standard deviation as a fraction of the range); `patch` (a square with side `strength` x the shorter side, pasted
    from another image of the set). Noise and patches are drawn from `identity`, the image's content hash, so that they
    do not depend on order or subset. `other(draw)` returns another image of the set for a non-negative integer.
    """
    if name not in DEFAULT_STRENGTHS:
        raise ValueError(f"unknown variant {name!r}; expected one of {', '.join(DEFAULT_STRENGTHS)}")
    if name in _EXACT:
        return _EXACT[name](image).contiguous()
    value = strength if strength is not None else DEFAULT_STRENGTHS[name]
    if value is None:
        raise ValueError(f"variant {name!r} requires a strength")
    seed = hashlib.blake2b(f"{name}:{identity}".encode(), digest_size=8).digest()
    draws = np.random.default_rng(int.from_bytes(seed, "big"))
    if name == "patch":
        return _patch(image, value, draws, other)
    return _CORRUPTIONS[name](image, value, draws)


_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "vflip": lambda image: image.flip(-2),
    "hflip": lambda image: image.flip(-1),
    "rot90": lambda image: torch.rot90(image, 1, (-2, -1)),
    "rot180": lambda image: torch.rot90(image, 2, (-2, -1)),
    "rot270": lambda image: torch.rot90(image, 3, (-2, -1)),
}


def _blur(image: Tensor, sigma: float, draws: np.random.Generator) -> Tensor:
    return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(sigma)))


def _contrast(image: Tensor, factor: float, draws: np.random.Generator) -> Tensor:
    values = image.double()
    return ((values - values.mean()) * factor + values.mean()).round().clamp(0, 255).to(torch.uint8)


def _noise(image: Tensor, deviation: float, draws: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(draws.standard_normal(tuple(image.shape)))
    return (image.double() + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


_CORRUPTIONS: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "blur": _blur,
    "contrast": _contrast,
    "noise": _noise,
}


def _patch(image: Tensor, fraction: float, draws: np.random.Generator, other: Callable[[int], Tensor]) -> Tensor:
    _, height, width = image.shape
    side = max(1, round(fraction * min(height, width)))
    top, left = int(draws.integers(height - side + 1)), int(draws.integers(width - side + 1))
    donor = _match_size(other(int(draws.integers(2**62))), image)
    result = image.clone()
    area = (slice(None), slice(top, top + side), slice(left, left + side))
    result[area] = donor[area]
    return result


def _match_size(donor: Tensor, image: Tensor) -> Tensor:
    """Convert `donor` to the size and channels of the image that receives its patch."""
    picture = to_pil(donor).convert("L" if image.shape[0] == 1 else "RGB")
    height, width = image.shape[-2:]
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return from_pil(picture)
