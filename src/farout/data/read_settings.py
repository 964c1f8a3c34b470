"""Settings that decide how image files become 8-bit pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from farout.core.errors import FaroutError

__all__ = ["DEFAULT_READING", "FULL_RANGE", "ReadSettings", "ValueRange", "format_value_range", "parse_value_range"]

ValueRange = tuple[float, float]
"""The values (low, high) that become black and white; values outside are clipped."""

FULL_RANGE: Literal["full"] = "full"
"""Value range `full`: the values that the type of the image can hold, 0 to 65535 for 16 bits."""


@dataclass(frozen=True)
class ReadSettings:
    """How image files become 8-bit pixels.

    Args:
        value_range: values that become black and white, as LOW:HIGH (in Python also a pair), for images with more than
            8 bits or floating-point values, such as 0:4095 or -1000:3000; `full`: all values of the type; default: that
            of the fitted detector, else the range in the file's own tags, else estimated over the images of the source.
        frames: `first` reads the first frame of a file with several (TIFF, GIF, WebP, APNG), `all` makes every frame
            an image.
        max_pixels: files with more pixels are unreadable, before they are decoded; the default is Pillow's limit.
        max_bytes: files with more bytes are unreadable; for an archive or array, the size of one member.
    """

    value_range: str | tuple[float, float] | None = None
    frames: Literal["first", "all"] = "first"
    max_pixels: int = 89_478_485
    max_bytes: int = 2**30

    def to_dict(self) -> dict[str, str]:
        """Return the settings that decide pixels and keys, as plain values."""
        value_range = self.value_range
        text = format_value_range(value_range) if isinstance(value_range, tuple) else str(value_range)
        return {"value_range": text, "frames": self.frames}

    def __post_init__(self) -> None:
        if isinstance(self.value_range, str) and self.value_range != FULL_RANGE:
            object.__setattr__(self, "value_range", parse_value_range(self.value_range))
        elif isinstance(self.value_range, tuple | list):
            object.__setattr__(self, "value_range", _check_value_range(*self.value_range, self.value_range))
        if self.frames not in ("first", "all"):
            raise FaroutError(f"frames is {self.frames!r}; expected first or all")
        if self.max_pixels < 1 or self.max_bytes < 1:
            raise FaroutError(
                f"max_pixels is {self.max_pixels} and max_bytes {self.max_bytes}; expected at least 1 each"
            )


DEFAULT_READING = ReadSettings()


def parse_value_range(text: str) -> ValueRange:
    """Parse LOW:HIGH, such as 0:4095; raises FaroutError."""
    low, _, high = text.partition(":")
    try:
        return _check_value_range(float(low), float(high), text)
    except ValueError:
        raise FaroutError(f"the value range is {text!r}; expected LOW:HIGH, such as 0:4095") from None


def _check_value_range(low: float, high: float, given: object) -> ValueRange:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise FaroutError(f"the value range is {given!r}; expected two finite numbers, the lower one first")
    return float(low), float(high)


def format_value_range(value_range: ValueRange) -> str:
    """The inverse of `parse_value_range`."""
    return ":".join(f"{value:.9g}" for value in value_range)
