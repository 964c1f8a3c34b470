"""From encoded bytes, PIL images and arrays to uint8 tensors, with stated conversions.

| what comes in | what comes out |
|---|---|
| grey (`L`), one bit (`1`) | 1 channel, 0..255 |
| 16-bit grey (`I;16`, `I` within 0..65535) | 1 channel, scaled: round(value / 257), never clipped |
| floating-point grey (`F`) within 0..1 | 1 channel, round(value * 255) |
| RGB, YCbCr, HSV, CMYK | 3 channels, through PIL's conversion to RGB |
| palette | 3 channels, the palette's colours |
| alpha, or a transparent colour, in any mode | 3 channels, composited on white |
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
from PIL import Image, ImageOps
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
"""What Pillow's decoders raise for broken data; anything else is a defect and is let through."""


def decode(data: bytes, key: str) -> Tensor:
    """Decodes one encoded image to uint8 `(C, H, W)`, C in {1, 3}, native size.

    Raises UnreadableImageError, starting with `key`, for anything that is not a whole image.
    """
    if not data:
        raise UnreadableImageError(f"{key}: the file is empty")
    with unreadable_errors(key), Image.open(io.BytesIO(data)) as image:
        image.load()
        return from_pil(image)


@contextmanager
def unreadable_errors(key: str) -> Iterator[None]:
    """Whatever Pillow raises inside for broken data is an UnreadableImageError that starts with `key`."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{key}: {error}") from error
    except _BROKEN as error:
        raise UnreadableImageError(f"{key}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    return f"{error} ({type(error).__name__})" if str(error) else type(error).__name__


def from_pil(image: Image.Image) -> Tensor:
    """Converts a PIL image to uint8 `(C, H, W)` by the table of this module.

    Raises UnreadableImageError (without a key) for values that cannot be brought to 8 bits without a guess.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return torch.from_numpy(_grey_to_8_bits(np.asarray(image)))[None]
    if image.has_transparency_data:
        image = _on_white(image)
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def _on_white(image: Image.Image) -> Image.Image:
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def _grey_to_8_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        top, scale = 1.0, 255.0
    else:
        top, scale = 65535.0, 1 / 257
    if not (low >= 0 and high <= top):
        raise UnreadableImageError(f"grey values {low:g}..{high:g}, expected 0..{top:g}; save it with 8 or 16 bits")
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Converts `(C, H, W)`, C in {1, 3}, uint8 or floats as `quantised` takes them, to a PIL image of mode L or RGB."""
    if image.is_floating_point():
        image = quantize(image)
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def save_png(picture: Image.Image | Tensor, path: Path, working: Path | None = None) -> None:
    """Writes a picture, or an image as `to_pil` takes it, so that what stands at `path` is whole; `working` as in
    `store.atomic_file`. Raises FaroutError for a tensor of values that are not numbers, which would become black.
    """
    if isinstance(picture, Tensor):
        if not bool(torch.isfinite(picture).all()):
            raise FaroutError(f"the image {path} would hold values that are not numbers; use precision fp32")
        picture = to_pil(picture)
    with store.atomic_file(path, working) as temporary:
        picture.save(temporary, format="PNG")


def quantize(images: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8, round(255 * value); values beyond are clipped."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_uint8(images: Tensor, what: str = "images") -> Tensor:
    """Checks image values of shape `(..., C, H, W)` and brings them to uint8; uint8 passes unchanged.

    Floats must lie in [0, 1] and are quantised: round(255 * value). Raises SourceError for NaN, another range, type or
    number of channels, and names what it found.
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
        raise SourceError(f"{what} hold NaN or infinite values; expected numbers in [0, 1]")
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
    """Hex blake2b (16 bytes) of the shape and pixels of a uint8 image `(C, H, W)`."""
    digest = hashlib.blake2b("x".join(str(n) for n in image.shape).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
