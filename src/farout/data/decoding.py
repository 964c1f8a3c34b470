"""Conversion of encoded bytes, PIL images and arrays to tensors, and of all values to 8 bits.

| input | output |
|---|---|
| gray (`L`), one bit (`1`) | 1 channel, 0..255 |
| gray with more than 8 bits or floating point (`I;16`, `I`, `F`), DICOM | 1 channel, native values; `scale_to_uint8` |
| RGB with 16 bits a channel (PNG; TIFF with the extra `tiff`), EXR | 3 channels, native values; `scale_to_uint8` |
| RGB, YCbCr, HSV, CMYK | 3 channels, through PIL's conversion to RGB |
| palette | 3 channels, the palette's colors |
| alpha, or a transparent color, in any mode | 3 channels, composited on white |
| several frames (GIF, TIFF, WebP, APNG) | one frame, the first unless another is chosen |

EXIF orientation is applied. A large image can be decoded in a reduced size, see `LeastSize`. Only the formats of
`FORMATS` are decoded, whatever else Pillow has: PostScript would start Ghostscript, and others are stubs that call
handlers of other packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, SourceError, UnreachableStoreError, UnreadableImageError
from farout.core.profiling import timed
from farout.data.read_settings import DEFAULT_READING, ReadSettings, ValueRange, format_value_range

__all__ = [
    "EXTRA_OF_SUFFIX",
    "FORMATS",
    "LARGE_PIXELS",
    "MULTI_FRAME_SUFFIXES",
    "DecodedImage",
    "LeastSize",
    "check_pixels",
    "content_hash",
    "count_frames",
    "decode",
    "describe_unknown_range",
    "frames_of",
    "from_pil",
    "full_range",
    "image_suffixes",
    "quantize",
    "range_of_tags",
    "reduce_pixels",
    "save_png",
    "scale_to_uint8",
    "to_pil",
    "to_uint8",
    "unreadable_errors",
]

FORMATS: Mapping[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "CUR": (".cur",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "ICNS": (".icns",),
    "ICO": (".ico",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo",),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "SUN": (".ras",),
    "TGA": (".icb", ".tga", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""Pillow's formats that are decoded, and the suffixes by which folders and globs recognize them."""

_EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "heic": ("pillow_heif", (".heic", ".heics", ".heif", ".heifs", ".hif")),
    "dicom": ("pydicom", (".dcm", ".dic", ".dicom")),
    "exr": ("OpenEXR", (".exr",)),
}
"""Extra of the package -> the module that it installs, and the suffixes that this module reads."""

EXTRA_OF_SUFFIX: Mapping[str, str] = {suffix: extra for extra, (_, all_of) in _EXTRAS.items() for suffix in all_of}
"""Suffix -> the extra that reads it."""

_ORIENTATION = 274
"""The tag of EXIF and TIFF."""

_RECOGNIZED_BY_CONTENT = tuple(name for name in FORMATS if name != "TGA")
"""TGA has no signature: almost any bytes are a TGA image, so it is recognized by its suffix only."""

_MULTI_FRAME = frozenset({"GIF", "TIFF", "WEBP", "PNG", "AVIF", "HEIF"})
"""Formats whose further frames are images like the first; those of MPO and ICO are other versions of it."""

MULTI_FRAME_SUFFIXES = frozenset(
    suffix for name in sorted(_MULTI_FRAME & set(FORMATS)) for suffix in FORMATS[name]
) | frozenset((*_EXTRAS["heic"][1], *_EXTRAS["dicom"][1]))
"""Suffixes of the formats that may have several frames."""


LARGE_PIXELS = 2**18
"""An image of more pixels is large: it may be decoded in a reduced size, and be identified by its encoded bytes."""

LeastSize = tuple[int, int]
"""Height and width that a large image has at least after it was decoded in a reduced size.

Height and width are divided by 8, 4 or 2, and rounded up; by 1 if half of a side is less. JPEG files are decoded in
that size, which is several times faster; of others, pixels are averaged, which makes the resizing faster.
"""


@dataclass(frozen=True)
class DecodedImage:
    """One image as its file stores it.

    Attributes:
        values: (C, H, W), C in {1, 3}: uint8 pixels, or values of another type that `scale_to_uint8` converts.
        value_range: the values that are black and white according to the file, or None.
        frames: the number of frames of the file.
        full_size: height and width of the image, where the values are those of a reduced size.
        encoded_hash: the hash of the encoded bytes of a large image, where a reduced size was allowed.
    """

    values: Tensor
    value_range: ValueRange | None = None
    frames: int = 1
    full_size: tuple[int, int] | None = None
    encoded_hash: str | None = None


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, that count as images; those of extras only where the extra is installed."""
    has_avif = features.check("avif")  # not in Pillow before 11.3
    suffixes = {suffix for name, all_of in FORMATS.items() if has_avif or name != "AVIF" for suffix in all_of}
    installed = {extra for extra, (module, _) in _EXTRAS.items() if importlib.util.find_spec(module) is not None}
    return frozenset(suffixes | {suffix for suffix, extra in EXTRA_OF_SUFFIX.items() if extra in installed})


@timed("decoding")
def decode(
    data: bytes,
    key: str,
    reading: ReadSettings = DEFAULT_READING,
    frame: int = 0,
    suffix: str | None = None,
    least_size: LeastSize | None = None,
) -> DecodedImage:
    """Decode one encoded image, in native size unless `least_size` is given.

    Args:
        data: the content of the file.
        key: key of the image, for messages.
        reading: limits.
        frame: index of the frame.
        suffix: suffix of the file, which distinguishes formats without signature (TGA); default: that of the key.
        least_size: a large image of 8 bits may be decoded in a reduced size.

    Raises:
        UnreadableImageError: starting with `key`, for whatever a decoder raises.
    """
    if not data:
        raise UnreadableImageError(f"{key}: the file is empty")
    suffix = Path(key).suffix if suffix is None else suffix
    with unreadable_errors(key):
        if _is_dicom(data, suffix):
            return _decode_dicom(data, reading, frame)
        if data[:4] == b"\x76\x2f\x31\x01":
            return _decode_exr(data, reading)
        deep = _decode_without_pillow(data, reading, frame)
        if deep is not None:
            return deep
        with _open_with_pillow(data, suffix, reading) as image:
            frames = frames_of(image)
            if frame:
                image.seek(frame)
            value_range = range_of_tags(image)
            if least_size is not None and image.width * image.height > LARGE_PIXELS and not _is_deep(image):
                return _decode_reduced(image, least_size, frames, _hash_encoded(data, frame))
            image.load()
            return DecodedImage(from_pil(image), value_range, frames)


def _decode_reduced(image: Image.Image, least_size: LeastSize, frames: int, encoded_hash: str) -> DecodedImage:
    """Decode an opened image of 8 bits in the smallest size that `least_size` allows."""
    turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)  # before the size changes
    width, height = image.size
    full_size = (width, height) if turned else (height, width)
    factor = reduction_factor(full_size, least_size)
    if image.format in ("JPEG", "MPO") and factor > 1:
        image.draft(None, (width // factor, height // factor))
    reduced = _to_gray_or_rgb(_turn_upright(image))
    factor //= round(full_size[0] / reduced.height)  # what the decoder has not done
    return DecodedImage(
        _pixels_of(reduced.reduce(factor) if factor > 1 else reduced), None, frames, full_size, encoded_hash
    )


def reduction_factor(size: tuple[int, int], least_size: LeastSize) -> int:
    """Return the factor by which height and width of a large image are divided: 8, 4, 2 or 1."""
    return next((k for k in (8, 4, 2) if size[0] >= k * least_size[0] and size[1] >= k * least_size[1]), 1)


def reduce_pixels(pixels: Tensor, least_size: LeastSize) -> Tensor:
    """Average the pixels of a large uint8 image (C, H, W), as one is decoded in a reduced size."""
    height, width = pixels.shape[1:]
    factor = reduction_factor((height, width), least_size) if height * width > LARGE_PIXELS else 1
    return pixels if factor == 1 else _pixels_of(to_pil(pixels).reduce(factor))


@timed("hashing")
def _hash_encoded(data: bytes, frame: int) -> str:
    """Return the blake2b hash (16 bytes, hex) of an encoded image; it is no hash of pixels, see `content_hash`."""
    return hashlib.blake2b(data, digest_size=16, person=b"encoded", salt=frame.to_bytes(8, "little")).hexdigest()


def count_frames(data: bytes, key: str, reading: ReadSettings = DEFAULT_READING) -> int:
    """Return the number of frames of an encoded image without decoding it; raises UnreadableImageError."""
    suffix = Path(key).suffix
    with unreadable_errors(key):
        if _is_dicom(data, suffix):
            return int(_read_dicom(data, header_only=True).get("NumberOfFrames") or 1)
        if data[:4] == b"\x76\x2f\x31\x01":
            return 1
        with _open_with_pillow(data, suffix, reading) as image:
            return frames_of(image)


@contextmanager
def unreadable_errors(key: str) -> Iterator[None]:
    """Convert whatever a decoder raises to an UnreadableImageError that starts with `key`.

    Decoders raise almost anything for broken data, also MemoryError for impossible sizes in a header.
    """
    try:
        yield
    except UnreachableStoreError:
        raise
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{key}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{key}: not an image in a format that farout reads") from error
    except Exception as error:
        reason = f"{error} ({type(error).__name__})" if str(error) else type(error).__name__
        raise UnreadableImageError(f"{key}: {reason}") from error


def _is_dicom(data: bytes, suffix: str) -> bool:
    return data[128:132] == b"DICM" or suffix.lower() in _EXTRAS["dicom"][1]


def check_pixels(width: int, height: int, reading: ReadSettings) -> None:
    """Raise UnreadableImageError, without a key, for an image without pixels or beyond the pixel limit."""
    if width < 1 or height < 1:
        raise UnreadableImageError(f"the image has {width} x {height} pixels")
    if width * height > reading.max_pixels:
        raise UnreadableImageError(
            f"the image has {width} x {height} pixels, and the limit is {reading.max_pixels} (--max-pixels)"
        )


def _open_with_pillow(data: bytes, suffix: str, reading: ReadSettings) -> Image.Image:
    """Open an image lazily with one of the formats of `FORMATS`; the pixel limit is checked before decoding."""
    if Image.MAX_IMAGE_PIXELS is not None and reading.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = reading.max_pixels  # Pillow's own limit, which has no argument
    formats = [*_RECOGNIZED_BY_CONTENT, *(["TGA"] if suffix.lower() in FORMATS["TGA"] else [])]
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1") and b"avif" not in data[12:64]:
        _require_extra("heic")
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = ["HEIF"]
    Image.init()  # loads all formats, of which Pillow loads the common ones only
    image = Image.open(io.BytesIO(data), formats=[name for name in formats if name in Image.OPEN])
    check_pixels(*image.size, reading)
    return image


def _require_extra(extra: str) -> None:
    module, suffixes = _EXTRAS[extra]
    if importlib.util.find_spec(module) is None:
        raise UnreadableImageError(f'{suffixes[0]} files require an extra: pip install "farout[{extra}]"')


def frames_of(image: Image.Image) -> int:
    """Return the number of frames of an image that are images like the first."""
    return getattr(image, "n_frames", 1) if image.format in _MULTI_FRAME else 1


def range_of_tags(image: Image.Image) -> ValueRange | None:
    """Return the values of black and white that a file of more than 8 bits states, or None."""
    if not image.mode.startswith("I"):
        return None
    if image.format == "PPM":  # Pillow scales them to 16 bits by the maximum in their header
        return 0.0, 65535.0
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))
    depth = bits[0] if isinstance(bits, tuple) else bits
    if 8 < depth < 16:
        return 0.0, float(2**depth - 1)
    for tag in (281, 341):  # MaxSampleValue, SMaxSampleValue: some programs write the maximum of this one image
        top = tags.get(tag)
        top = top[0] if isinstance(top, tuple) and top else top
        if isinstance(top, int | float) and 255 < top < 65535:
            return 0.0, float(2 ** int(top).bit_length() - 1)
    return None


def _decode_without_pillow(data: bytes, reading: ReadSettings, frame: int) -> DecodedImage | None:
    """Decode PNG and TIFF files that Pillow cannot decode or not exactly; None for other files.

    Of 16 bits in several channels Pillow keeps 8, signed values of 8 bits wrap, and it has few types of floating point.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6):
        width, height = struct.unpack(">II", data[16:24])
        check_pixels(width, height, reading)
        from torchvision.io import ImageReadMode, decode_png

        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            orientation = image.getexif().get(_ORIENTATION)
        values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
        return DecodedImage(_composite_on_white(_apply_orientation(values, orientation), 65535.0))
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            check_pixels(*image.size, reading)
            if frame:
                image.seek(frame)
            tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(258, (1,))
        if not isinstance(bits, tuple):
            return None
        is_deep_color = len(bits) > 1 and max(bits) > 8
        is_signed_byte = max(bits) == 8 and 2 in tags.get(339, ())  # Pillow takes it for unsigned
        if not is_deep_color and not is_signed_byte:
            return None
        what = f"a TIFF file of {len(bits)} channels with {max(bits)} bits"
    except UnidentifiedImageError:  # such as floating point of 64 bits or in several channels, and 64-bit integers
        what = "a TIFF file of this type"
    if importlib.util.find_spec("tifffile") is None:
        raise UnreadableImageError(f'{what} requires an extra: pip install "farout[tiff]"')
    return _decode_with_tifffile(data, reading, frame)


def _decode_with_tifffile(data: bytes, reading: ReadSettings, frame: int) -> DecodedImage:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[frame]
        check_pixels(page.imagewidth, page.imagelength, reading)
        if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4:
            raise UnreadableImageError(f"the image has shape {page.shape}, expected 1 to 4 channels")
        if page.photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
            raise UnreadableImageError(f"a TIFF file of more than 8 bits in {page.photometric.name}; expected RGB")
        depth, frames = page.bitspersample, len(file.pages)
        values = np.asarray(page.asarray())
        values = values[None] if page.axes == "YX" else values.transpose(2, 0, 1) if page.axes == "YXS" else values
        orientation = page.tags.valueof(274)
    top = float(np.iinfo(values.dtype).max) if values.dtype.kind == "u" else 1.0
    value_range = (0.0, float(2**depth - 1)) if values.dtype.kind == "u" and 8 < depth < 16 else None
    return DecodedImage(_composite_on_white(_apply_orientation(values, orientation), top), value_range, frames)


def _apply_orientation(values: np.ndarray, orientation: object) -> np.ndarray:
    """Turn (C, H, W) as `ImageOps.exif_transpose` does: orientation 1 to 8 of EXIF and TIFF; others change nothing."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1, :]
    return values


def _composite_on_white(values: np.ndarray, white: float) -> Tensor:
    """Convert (C, H, W) with 1 to 4 channels to 1 or 3; channels 2 and 4 are alpha, from 0 to `white`."""
    if values.ndim != 3 or values.shape[0] not in (1, 2, 3, 4):
        raise UnreadableImageError(f"the image has shape {values.shape}, expected 1 to 4 channels")
    if values.shape[0] in (2, 4):
        alpha = values[-1:].astype(np.float64) / white
        composited = values[:-1] * alpha + white * (1 - alpha)
        values = np.rint(composited).astype(values.dtype) if values.dtype.kind in "ui" else composited
    return _to_tensor(values)


def _to_tensor(values: np.ndarray) -> Tensor:
    """Convert native values to a tensor of type uint8, uint16, int32 or float32."""
    values = values.astype(values.dtype.newbyteorder("="), copy=False)  # torch has no foreign byte orders
    kind = values.dtype.kind
    if values.dtype not in (np.uint8, np.uint16):
        if kind in "iu" and values.size and int(values.min()) >= -(2**31) and int(values.max()) < 2**31:
            values = values.astype(np.int32)
        else:
            values = values.astype(np.float32)
    return torch.from_numpy(np.array(values, order="C"))  # a copy: arrays of PIL images are read-only


def _read_dicom(data: bytes, header_only: bool) -> Any:
    _require_extra("dicom")
    import pydicom

    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=header_only, force=data[128:132] != b"DICM")


def _decode_dicom(data: bytes, reading: ReadSettings, frame: int) -> DecodedImage:
    """Decode a DICOM image: rescaled values (Hounsfield units for CT), with the window of the file as its range.

    The window is that of the linear function (DICOM PS3.3, C.11.2.1.2.1). Without a window the range is that of the
    stored bits. MONOCHROME1, where low values are white, is inverted.
    """
    header = _read_dicom(data, header_only=True)
    check_pixels(int(header.get("Columns") or 0), int(header.get("Rows") or 0), reading)
    frames = int(header.get("NumberOfFrames") or 1)
    from pydicom.pixels.utils import pixel_array

    values = np.asarray(pixel_array(_read_dicom(data, header_only=False), index=frame if frames > 1 else None))
    if header.get("SamplesPerPixel", 1) == 3:
        bits = int(header.get("BitsStored", 8))
        color = _to_tensor(values.transpose(2, 0, 1))
        return DecodedImage(color, None if bits <= 8 else (0.0, float(2**bits - 1)), frames)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        colors = np.asarray(apply_color_lut(values, header))
        return DecodedImage(_to_tensor(colors.transpose(2, 0, 1)), None, frames)
    bits, signed = int(header.BitsStored), bool(header.get("PixelRepresentation"))
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    slope, offset = float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)
    values = values.astype(np.float32) * np.float32(slope) + np.float32(offset)
    low, high = sorted((low * slope + offset, high * slope + offset))
    center, width = (_first_number(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 1:
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        values, low, high = -values, -high, -low
    return DecodedImage(_to_tensor(values)[None], (low, high), frames)


def _first_number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, str | int | float) else value[0] if hasattr(value, "__len__") else value)


def _decode_exr(data: bytes, reading: ReadSettings) -> DecodedImage:
    """Decode the channels R, G, B, or Y, of an EXR file; it has no range of its own."""
    _require_extra("exr")
    import tempfile

    import OpenEXR

    width, height = _exr_size(data)
    check_pixels(width, height, reading)
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:  # the library reads paths only
        file.write(data)
        file.flush()
        with OpenEXR.File(file.name, separate_channels=True) as opened:
            channels = {name: np.asarray(channel.pixels) for name, channel in opened.channels().items()}
    names = next((each for each in (("R", "G", "B"), ("Y",)) if set(each) <= set(channels)), None)
    if names is None:
        raise UnreadableImageError(f"the EXR file has channels {', '.join(channels)}; expected R, G, B or Y")
    return DecodedImage(_to_tensor(np.stack([channels[name] for name in names]).astype(np.float32)))


def _exr_size(data: bytes) -> tuple[int, int]:
    """Return width and height from the attribute `dataWindow` (type box2i) of an EXR header."""
    name = b"dataWindow\0box2i\0"
    start = data.find(name)
    if start < 0 or len(data) < start + len(name) + 20:
        raise UnreadableImageError("the EXR header has no dataWindow")
    x0, y0, x1, y1 = struct.unpack("<4i", data[start + len(name) + 4 : start + len(name) + 20])
    return x1 - x0 + 1, y1 - y0 + 1


def from_pil(image: Image.Image) -> Tensor:
    """Convert a PIL image to (C, H, W) by the table of this module: uint8, or native values of the modes I and F."""
    image = _turn_upright(image)
    return _to_tensor(np.asarray(image))[None] if _is_deep(image) else _pixels_of(_to_gray_or_rgb(image))


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; `exif_transpose` copies also images that need none."""
    image.load()
    return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _is_deep(image: Image.Image) -> bool:
    """Whether the image has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def _to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits to mode L or RGB by the table of this module."""
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels_of(image: Image.Image) -> Tensor:
    """Return the pixels (C, H, W) of an image of mode L or RGB."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


@timed("decoding")
def scale_to_uint8(values: Tensor, value_range: ValueRange | None) -> Tensor:
    """Convert native values (C, H, W) to uint8: round(255 (v - low) / (high - low)), clipped; uint8 is unchanged.

    Args:
        values: pixels, native values.
        value_range: the values that become black and white. None: 0 to 65535 for uint16, and [0, 1] for floating
            point, where other values are an error; the range of other types is not known.

    Raises:
        UnreadableImageError: the values contain NaN, or a value range is required. The message has no key.
    """
    if values.dtype == torch.uint8:
        return values
    array = values.numpy()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UnreadableImageError("the image contains NaN or infinite values")
    if value_range is None:
        low, high = float(array.min()), float(array.max())
        if array.dtype == np.uint16:
            value_range = (0.0, 65535.0)
        elif array.dtype.kind == "f" and low >= 0 and high <= 1:
            value_range = (0.0, 1.0)
        else:
            raise UnreadableImageError(describe_unknown_range(str(array.dtype), low, high))
    bottom, top = value_range
    scaled = (array.astype(np.float64) - bottom) * (255 / (top - bottom))
    return torch.from_numpy(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def full_range(kind: np.dtype[Any]) -> ValueRange:
    """Return the values that a type can hold for uint16, and [0, 1] for others, which `scale_to_uint8` checks."""
    return (0.0, 65535.0) if kind == np.uint16 else (0.0, 1.0)


def describe_unknown_range(kind: str, low: float, high: float) -> str:
    """Return the message for values of a type without a usual range, with the likely range."""
    if low >= 0:
        top = 1 if high <= 1 else 2 ** max(8, int(high).bit_length()) - 1
        likely = format_value_range((0, top))
    else:
        likely = "-1:1" if low >= -1 and high <= 1 else f"{low:g}:{high:g}"
    return f"{kind} values from {low:g} to {high:g} have no usual range; give it, for example --value-range {likely}"


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
    with store.atomic_file(path, working, flush=False) as temporary:
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


@timed("hashing")
def content_hash(image: Tensor) -> str:
    """Return the blake2b hash (16 bytes, hex) of shape and pixels of a uint8 image (C, H, W)."""
    digest = hashlib.blake2b("x".join(str(n) for n in image.shape).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
