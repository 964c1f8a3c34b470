"""From an image to the input of a network: crop, native size, JPEG, network size, channels, value range.

A preprocessing is stored with every model. All steps up to the last run on 8-bit pixels in Pillow, whose resampling is
integer arithmetic: the result does not depend on threads or batches.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from farout.core.errors import FaroutError, MisleadingResultWarning, SourceError
from farout.core.profiling import timed
from farout.data.decoding import LARGE_PIXELS, LeastSize, to_pil
from farout.data.image_source import ImageSource
from farout.data.read_settings import ReadSettings, ValueRange

__all__ = ["Kernel", "Preprocessing", "Protocol", "Scaling", "find_mismatches", "is_all_gray"]

Protocol = Literal["native", "direct", "common"]
Scaling = Literal["fixed", "minmax"]
Kernel = Literal["bicubic", "bilinear", "nearest"]
"""Interpolation of the resizing; bicubic and bilinear are antialiased."""
_MAX_SIDE, _MAX_PIXELS = 2**16, 2**28
_GAP = 2
"""With reduced decoding, images have at least this many times the size to which they are reduced next."""


@dataclass(frozen=True)
class Preprocessing:
    """Turns uint8 `(C, H, W)` of any size into float32 `(channels, *size)` in [0, 1].

    The steps, in order: central crop of `crop` x `crop` pixels (a shorter side is kept); resize to `native`, the
    in-distribution native size (protocols `native` and `common`); one JPEG encoding of `jpeg_quality`, 4:2:0
    (protocol `common`); resize to `size`; gray is replicated to RGB, RGB becomes luminance (ITU-R 601); then
    division by 255 (`fixed`), or per-image min-max over all channels (`minmax`: a constant image becomes zeros).

    The protocol `native` resizes all images to the native size of the in-distribution images first, so that blur alone
    cannot distinguish them; `direct` omits this, as some papers do. Sizes are (height, width) in pixels; resizing is
    by `kernel` with antialiasing and does not keep the aspect ratio. With `fill` the first resize keeps it: the image
    covers the target, and the rest is cut off on both sides. `value_range` is the range of the fitted images with more
    than 8 bits, which are converted to 8 bits when they are read; scored images are converted alike.

    With `reduced_decoding`, images of more than 512 x 512 pixels are read in a smaller size, at least `least_size`
    (`ImageSource.read`), and a native size of more pixels is replaced by a smaller one of the same shape, twice the
    network's size or more: what is finer is lost in the network's size anyway. A JPEG encoding (protocol `common`) is
    at the native size, and a crop requires native pixels. Raises FaroutError for values out of range.
    """

    size: tuple[int, int]
    channels: int
    native: tuple[int, int]
    protocol: Protocol = "native"
    crop: int | None = None
    scaling: Scaling = "fixed"
    jpeg_quality: int = 90
    kernel: Kernel = "bicubic"
    fill: bool = False
    value_range: ValueRange | None = None
    reduced_decoding: bool = False

    def __post_init__(self) -> None:
        sizes = (*self.size, *self.native, self.crop if self.crop is not None else 1)
        if len(self.size) != 2 or len(self.native) != 2 or min(sizes) < 1:
            raise FaroutError(f"size {self.size}, native {self.native}, crop {self.crop}: expected positive pixels")
        if max(math.prod(self.size), math.prod(self.native)) > _MAX_PIXELS or max(*self.size, *self.native) > _MAX_SIDE:
            raise FaroutError(
                f"size {self.size}, native {self.native}: expected sides of at most {_MAX_SIDE:,} pixels, and at most "
                f"{_MAX_PIXELS:,} pixels"
            )
        if self.channels not in (1, 3) or not 1 <= self.jpeg_quality <= 100:
            raise FaroutError(
                f"channels {self.channels} (expected 1 or 3), jpeg_quality {self.jpeg_quality} (1 to 100)"
            )
        if self.protocol not in get_args(Protocol) or self.scaling not in get_args(Scaling):
            choices = f"{', '.join(get_args(Protocol))} and {', '.join(get_args(Scaling))}"
            raise FaroutError(f"protocol {self.protocol!r}, scaling {self.scaling!r}: expected {choices}")
        ReadSettings(value_range=self.value_range)  # raises for a wrong range
        if self.kernel not in get_args(Kernel):
            raise FaroutError(f"kernel {self.kernel!r}: expected {', '.join(get_args(Kernel))}")

    @timed("resizing")
    def __call__(self, image: Tensor, shrink: Kernel | None = None) -> Tensor:
        """Prepares one image; raises ValueError for anything but uint8 `(C, H, W)` with C in {1, 3}.

        `shrink` is the kernel of the first resize of an image that is larger than its target; None: `kernel`.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"got {image.dtype} of shape {tuple(image.shape)}, expected uint8 (1 or 3, H, W)")
        pixels = image if self._is_identity(image) else self._through_pillow(image, shrink)
        return _min_max(pixels) if self.scaling == "minmax" else pixels.float() / 255

    def _is_identity(self, image: Tensor) -> bool:
        """Whether no step changes the pixels, so that Pillow is not required."""
        channels, *size = image.shape
        uncropped = self.crop is None or max(size) <= self.crop
        same = tuple(size) == self.size and (self.protocol == "direct" or tuple(size) == self.native)
        return uncropped and same and channels == self.channels and self.protocol != "common"

    def _through_pillow(self, image: Tensor, shrink: Kernel | None) -> Tensor:
        picture = self._first_steps(image, shrink)
        picture = _resize(picture, self.size, self.kernel).convert("L" if self.channels == 1 else "RGB")
        pixels = torch.from_numpy(np.array(picture))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1).contiguous()

    @property
    def first_size(self) -> tuple[int, int]:
        """Height and width after the first resize."""
        return self.size if self.protocol == "direct" else self._reduced_native or self.native

    @property
    def _reduced_native(self) -> tuple[int, int] | None:
        """The smaller size that replaces the native one; None: the native size is used."""
        height, width = self.native
        is_exact = self.protocol != "native" or self.crop is not None or self.kernel == "nearest"
        if not self.reduced_decoding or is_exact or height * width <= LARGE_PIXELS:
            return None
        least_height, least_width = _GAP * self.size[0], _GAP * self.size[1]
        if 2 * least_height > height or 2 * least_width > width:
            return None
        if least_height * width >= least_width * height:
            return least_height, -(-width * least_height // height)
        return -(-height * least_width // width), least_width

    @property
    def least_size(self) -> LeastSize | None:
        """Height and width that large images have at least when they are read; None: all are read in native size."""
        if not self.reduced_decoding:
            return None
        if self.crop is not None or self.kernel == "nearest":
            return _MAX_SIDE, _MAX_SIDE
        height, width = self.first_size
        return self._reduced_native or (_GAP * height, _GAP * width)

    def resize_first(self, image: Tensor) -> Tensor:
        """Crop, first resize and JPEG encoding of one image: uint8 RGB (3, *first_size)."""
        picture = self._first_steps(image, None).convert("RGB")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def _first_steps(self, image: Tensor, shrink: Kernel | None) -> Image.Image:
        picture, first = _crop(to_pil(image), self.crop), self.first_size
        larger = picture.width > first[1] or picture.height > first[0]
        kernel = shrink if shrink is not None and larger else self.kernel
        picture = _resize_to_cover(picture, first, kernel) if self.fill else _resize(picture, first, kernel)
        return _through_jpeg(picture, self.jpeg_quality) if self.protocol == "common" else picture

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.json`; `kernel` and later settings only if they differ from their defaults,
        so that the hash of older models stays the same.
        """
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        optional = {"kernel": "bicubic", "fill": False, "value_range": None, "reduced_decoding": False}
        return {name: value for name, value in plain.items() if name not in optional or value != optional[name]}

    @classmethod
    def for_source(
        cls,
        source: ImageSource,
        *,
        size: int | None = None,
        channels: int | None = None,
        protocol: Protocol = "native",
        crop: int | None = None,
        scaling: Scaling = "fixed",
        largest: int = 64,
    ) -> Preprocessing:
        """Return the preprocessing of a model that is fitted to `source`, with sizes from a sample of 64 images.

        `native` is the most common native size (after the crop; between equals, the larger area). A given `size` is
        the side of a square. Without it, the network's size is the native one, and where its longer side is above
        `largest` pixels, that side becomes `largest`, aspect kept, with a MisleadingResultWarning that names the
        factor. Channels are 3 when any sampled image is RGB. `reduced_decoding` is that of the source. Raises
        SourceError when no sampled image is readable.
        """
        shapes = source.shapes()
        if not shapes:
            reason = next((f"{key}: {why}" for key, why in source.unreadable.items()), "it contains no images")
            raise SourceError(f"none of the sampled images of {source.name} is readable: {reason}")
        native = _common_size(shapes, crop)
        network = (size, size) if size is not None else _limit_size(native, largest, source.name)
        return cls(
            size=network,
            channels=channels if channels is not None else max(shape[0] for shape in shapes),
            native=native,
            protocol=protocol,
            crop=crop,
            scaling=scaling,
            value_range=source.value_range,
            reduced_decoding=source.reduced_decoding,
        )


def _common_size(shapes: Counter[tuple[int, int, int]], crop: int | None) -> tuple[int, int]:
    sizes: Counter[tuple[int, int]] = Counter()
    for (_, height, width), count in shapes.items():
        sizes[(min(height, crop or height), min(width, crop or width))] += count
    return max(sizes, key=lambda s: (sizes[s], s[0] * s[1], s))


def _limit_size(native: tuple[int, int], largest: int, name: str) -> tuple[int, int]:
    longer = max(native)
    if longer <= largest:
        return native
    height, width = (max(1, round(side * largest / longer)) for side in native)
    warnings.warn(
        f"images of {name} are {native[0]}x{native[1]} pixels and are shrunk {longer / largest:.3g} times to "
        f"{height}x{width}: finer detail is lost; give a size to keep more",
        MisleadingResultWarning,
        stacklevel=3,
    )
    return height, width


def _crop(picture: Image.Image, crop: int | None) -> Image.Image:
    if crop is None:
        return picture
    width, height = min(crop, picture.width), min(crop, picture.height)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _resize(picture: Image.Image, size: tuple[int, int], kernel: Kernel) -> Image.Image:
    height, width = size
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling[kernel.upper()])


def _resize_to_cover(picture: Image.Image, size: tuple[int, int], kernel: Kernel) -> Image.Image:
    """Resize the picture until it covers `size` (height, width), and crop its center."""
    height, width = size
    if height * picture.width >= width * picture.height:
        covering = (height, height * picture.width // picture.height)
    else:
        covering = (width * picture.height // picture.width, width)
    picture = _resize(picture, covering, kernel)
    left, top = round((covering[1] - width) / 2), round((covering[0] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(encoded) as decoded:
        decoded.load()
        return decoded


def _min_max(pixels: Tensor) -> Tensor:
    low, high = pixels.min().float(), pixels.max().float()
    return (pixels.float() - low) / (high - low).clamp(min=1)


def find_mismatches(
    source: ImageSource, preprocessing: Preprocessing, sample: int = 64, *, fitted_gray: bool = False
) -> list[str]:
    """Return warnings about images of `source` that do not match a model with this preprocessing; empty if all match.

    Args:
        source: the images, before the variant.
        preprocessing: preprocessing of the model.
        sample: number of images that are checked, evenly spaced: for another native size than the fitted one, gray
            images for an RGB model, and RGB images for a gray one.
        fitted_gray: whether an RGB model was fitted with gray images only, so that RGB images do not match.
    """
    shapes = source.shapes(sample)
    total = sum(shapes.values())
    mismatches = (
        _find_size_mismatches(shapes, preprocessing),
        _find_channel_mismatches(shapes, preprocessing.channels, fitted_gray),
    )
    return [f"{source.name}: {count} of {total} sampled images {what}" for count, what in mismatches if count]


def _find_size_mismatches(shapes: Counter[tuple[int, int, int]], preprocessing: Preprocessing) -> tuple[int, str]:
    fitted = preprocessing.native
    sizes: Counter[tuple[int, int]] = Counter()
    for shape, count in shapes.items():
        size = _common_size(Counter({shape: 1}), preprocessing.crop)
        if size != fitted:
            sizes[size] += count
    if not sizes:
        return 0, ""
    common = sizes.most_common(1)[0][0]
    effect = {
        "native": "they are resized to it first",
        "common": "they are resized to it first",
        "direct": "resizing alone can distinguish them (protocol direct)",
    }[preprocessing.protocol]
    text = f"are not of the fitted native size {fitted[0]}x{fitted[1]} (most often {common[0]}x{common[1]}); {effect}"
    return sizes.total(), text


def is_all_gray(source: ImageSource, sample: int = 64) -> bool:
    """Return whether up to `sample` images, evenly spaced, all have one channel."""
    return all(shape[0] == 1 for shape in source.shapes(sample))


def _find_channel_mismatches(
    shapes: Counter[tuple[int, int, int]], channels: int, fitted_gray: bool
) -> tuple[int, str]:
    expected = 1 if fitted_gray else channels
    other = sum(count for shape, count in shapes.items() if shape[0] != expected)
    if channels == 1:
        return other, "are RGB and become luminance for this gray model: their color is lost"
    if fitted_gray:
        return other, "are RGB, and the fitted ones were all gray: color can distinguish them"
    return other, "are gray and are replicated to RGB for this RGB model"
