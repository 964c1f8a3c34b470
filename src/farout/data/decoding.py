"""Conversion of encoded bytes, PIL images and arrays to uint8 tensors.

| input | output |
|---|---|
| gray (`L`), one bit (`1`) | 1 channel, 0..255 |
| 16-bit gray (`I;16`, `I` within 0..65535) | 1 channel, scaled: round(value / 257), never clipped |
| floating-point gray (`F`) within 0..1 | 1 channel, round(value * 255) |
| RGB, YCbCr, HSV, CMYK | 3 channels, through PIL's conversion to RGB |
| palette | 3 channels, the palette's colors |
| alpha, or a transparent color, in any mode | 3 channels, composited on white |
| several frames (GIF, TIFF) | the first frame |

EXIF orientation is applied. 16-bit RGB files are read by PIL with 8 bits a channel (the high byte).
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, SourceError, UnreadableImageError

__all__ = ["content_hash", "decode", "from_pil", "quantize", "save_png", "to_pil", "to_uint8", "unreadable_errors"]

_BROKEN = (
    OSError,  # also PIL's UnidentifiedImageError and truncated files
    SyntaxError,  # PIL raises it for broken PNG and JPEG headers
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow's decoders raise for broken data; any other exception is a bug and is not caught."""


def decode(data: bytes, key: str) -> Tensor:
    """Decode one encoded image to uint8 (C, H, W), C in {1, 3}, native size.

    Raises UnreadableImageError, starting with `key`, for data that is not a complete image.
    """
    if not data:
        raise UnreadableImageError(f"{key}: the file is empty")
    with unreadable_errors(key), Image.open(io.BytesIO(data)) as image:
        image.load()
        return from_pil(image)


@contextmanager
def unreadable_errors(key: str) -> Iterator[None]:
    """Convert what Pillow raises for broken data to an UnreadableImageError that starts with `key`."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{key}: {error}") from error
    except _BROKEN as error:
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a format that Pillow can read"
        else:
            reason = f"{error} ({type(error).__name__})" if str(error) else type(error).__name__
        raise UnreadableImageError(f"{key}: {reason}") from error


def from_pil(image: Image.Image) -> Tensor:
    """Convert a PIL image to uint8 (C, H, W) by the table of this module.

    Raises UnreadableImageError (without a key) for values whose range is not known, so that 8 bits would be a guess.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return torch.from_numpy(_gray_to_8_bits(np.asarray(image)))[None]
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def _gray_to_8_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        top, scale = 1.0, 255.0
    else:
        top, scale = 65535.0, 1 / 257
    if not (low >= 0 and high <= top):
        raise UnreadableImageError(f"gray values {low:g}..{high:g}, expected 0..{top:g}; save it with 8 or 16 bits")
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Convert (C, H, W), C in {1, 3}, uint8 or floats in [0, 1], to a PIL image of mode L or RGB."""
    if image.is_floating_point():
        image = quantize(image)
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def save_png(picture: Image.Image | Tensor, path: Path, working: Path | None = None) -> None:
    """Write a PIL image, or a tensor that `to_pil` accepts, as a PNG file, atomically.

    Args:
        picture: the image.
        path: the file.
        working: folder of the temporary file, see `store.atomic_file`.

    Raises:
        FaroutError: the tensor contains NaN or infinite values, which would become black.
    """
    if isinstance(picture, Tensor):
        if not bool(torch.isfinite(picture).all()):
            raise FaroutError(f"the image {path} contains values that are not numbers; use precision fp32")
        picture = to_pil(picture)
    with store.atomic_file(path, working) as temporary:
        picture.save(temporary, format="PNG")


def quantize(images: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8, round(255 * value); values outside are clipped."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_uint8(images: Tensor, what: str = "images") -> Tensor:
    """Convert image values of shape (..., C, H, W) to uint8; uint8 is returned unchanged.

    Floats must be in [0, 1] and become round(255 * value). Raises SourceError for NaN and for another range, type or
    number of channels.
    """
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        hint = "; move the channels to the front" if images.ndim >= 3 and images.shape[-1] in (1, 3) else ""
        raise SourceError(f"{what} have shape {tuple(images.shape)}, expected (..., C, H, W) with C = 1 or 3{hint}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise SourceError(f"{what} have type {images.dtype}, expected uint8 or floats in [0, 1]")
    if images.numel():
        _check_range(images, what)
    return quantize(images.float())


def _check_range(images: Tensor, what: str) -> None:
    if not torch.isfinite(images).all():
        raise SourceError(f"{what} contain NaN or infinite values; expected numbers in [0, 1]")
    low, high = float(images.min()), float(images.max())
    rounding = 1e-6  # float32 arithmetic on [0, 1] may leave it by this much
    if low >= -rounding and high <= 1 + rounding:
        return
    hint = "scale them to [0, 1]"
    if low >= 0 and high <= 255:
        hint = "these look like 0..255: pass them as uint8 or divide by 255"
    elif low >= -1 and high <= 1:
        hint = "these look like -1..1: pass (x + 1) / 2"
    raise SourceError(f"{what} have values from {low:g} to {high:g}, expected [0, 1]; {hint}")


def content_hash(image: Tensor) -> str:
    """Return the blake2b hash (16 bytes, hex) of shape and pixels of a uint8 image (C, H, W)."""
    digest = hashlib.blake2b("x".join(str(n) for n in image.shape).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
