"""Small copies of images that near-copies are found on."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from farout.data.decoding import to_pil

__all__ = ["COLOR_SIDE", "SIDE", "THUMBNAIL_BYTES", "make_thumbnail"]

SIDE = 32
"""Side of the luminance."""
COLOR_SIDE = 4
"""Side of the two color differences."""
THUMBNAIL_BYTES = SIDE**2 + 2 * COLOR_SIDE**2


def make_thumbnail(pixels: Tensor) -> bytes:
    """Reduce a uint8 image (C, H, W) to luminance of 32 x 32 and color of 4 x 4, by integer arithmetic."""
    image = to_pil(pixels)
    factors = max(1, image.width // (4 * SIDE)), max(1, image.height // (4 * SIDE))
    if max(factors) > 1:
        image = image.reduce(factors)  # much faster than resizing, which follows
    if image.mode == "L":
        luminance, colors = image, bytes([128]) * (2 * COLOR_SIDE**2)
    else:
        luminance, *chroma = image.convert("YCbCr").split()
        size = (COLOR_SIDE, COLOR_SIDE)
        colors = b"".join(channel.resize(size, Image.Resampling.BOX).tobytes() for channel in chroma)
    return luminance.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes() + colors
