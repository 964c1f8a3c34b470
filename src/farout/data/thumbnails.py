"""Small copies of images that near-copies are found on."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from farout.data.decoding import to_pil

__all__ = ["COLOR_SIDE", "REDUCED_SIZE", "SIDE", "THUMBNAIL_BYTES", "make_thumbnail"]

SIDE = 32
"""Side of the luminance."""
COLOR_SIDE = 4
"""Side of the two color differences."""
REDUCED_SIZE = (6 * SIDE, 6 * SIDE)
"""Least size of an image that a thumbnail is made from."""
THUMBNAIL_BYTES = SIDE**2 + 2 * COLOR_SIDE**2


def make_thumbnail(pixels: Tensor) -> bytes:
    """Reduce a uint8 image (C, H, W) to luminance of 32 x 32 and color of 4 x 4, by integer arithmetic."""
    # of large images every n-th pixel suffices: the 6 x 6 pixels and more of a thumbnail's pixel are averaged
    rows, columns = (max(1, side // (6 * SIDE)) for side in pixels.shape[1:])
    image = to_pil(pixels[:, ::rows, ::columns])
    if image.mode == "L":
        luminance, colors = image, bytes([128]) * (2 * COLOR_SIDE**2)
    else:
        luminance, *chroma = image.convert("YCbCr").split()
        size = (COLOR_SIDE, COLOR_SIDE)
        colors = b"".join(channel.resize(size, Image.Resampling.BOX).tobytes() for channel in chroma)
    return luminance.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes() + colors
