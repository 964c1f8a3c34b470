"""Anomaly maps drawn over the scored images: where in an image a detector finds something that normal images lack."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from farout.core.chunking import blocks_containing
from farout.core.errors import FaroutError
from farout.core.names import expand_path
from farout.core.progress import task
from farout.data.decoding import save_png, to_pil
from farout.data.image_source import Policy
from farout.data.read_settings import DEFAULT_READING, ReadSettings
from farout.detectors.base import Detector
from farout.detectors.calibration import check_fitted
from farout.detectors.declarations import HeatMaps
from farout.report.heat_colors import colorize, normalize_map

__all__ = ["FOLDER", "check_has_maps", "draw_overlay", "overlay_path", "write_overlays"]

FOLDER = "maps"
"""Folder of the overlays inside a folder of scores."""
_SMALLEST_SIDE = 224
_OPACITY = 0.75
_UNSAFE_CHARACTERS = re.compile(r'[\x00-\x1f\x7f<>:"\\|?*%]')
_LONGEST_NAME = 240
_README = (
    "Maps show {unit}. Colors begin at 0 and are brightest at {brightest:g} or more.\n"
    "The scale is the same for all images and all runs.\n"
)


def check_has_maps(detector: Detector) -> None:
    """Raise FaroutError for a detector that does not localize anomalies within an image."""
    if detector.heat_maps is None:
        raise FaroutError(
            f"{type(detector).__name__} computes one score per image and no maps; use `patches`, `reconstruction` or "
            "`denoising`"
        )


def write_overlays(
    detector: Detector,
    images: Any,
    out: str | Path,
    *,
    limit: int | None = None,
    policy: Policy = "nan",
    reading: ReadSettings = DEFAULT_READING,
) -> int:
    """Write `out/<key>.png`, the image with its map, for every readable image.

    One batch at a time is in memory. Existing files are kept, so an interrupted run can be continued; `out` must
    belong to the same detector and images (`score_folder` refuses others in its folder). A batch with a missing image
    is measured as a whole, so that its maps have the same bytes as in a run without interruption.

    Args:
        detector: a fitted detector with maps.
        images: any image source.
        out: folder of the overlays.
        limit: use a seeded random sample of this many images, as in `score_folder`; None: all.
        policy: what to do with an unreadable image: leave it out, or `raise`.
        reading: how image files are read, as in `score_folder`.

    Returns:
        Number of files written by this call.

    Raises:
        FaroutError: the detector has no maps or is not fitted.
    """
    check_has_maps(detector)
    check_fitted(detector)
    source, out = detector.open_images(images, policy=policy, limit=limit, reading=reading), expand_path(out)
    out.mkdir(parents=True, exist_ok=True)
    heat_maps = detector.heat_maps or HeatMaps()
    (out / "README.txt").write_text(_README.format(unit=heat_maps.unit, brightest=heat_maps.maximum), encoding="utf-8")
    paths = {index: out / overlay_path(key) for index, key in enumerate(source.keys)}
    missing = {index for index, path in paths.items() if not path.is_file()}
    blocks = blocks_containing(missing, detector.batch_size, len(source))
    planned = [index for block in blocks for index in block]
    count = 0
    with task(f"maps of {source.name}", len(planned)) as bar:
        for batch in detector.load_batches(source.subset(planned)):
            indices = [planned[index] for index in batch.indices]
            if missing.intersection(indices):
                maps = detector.measure(batch, maps=True).maps
                assert maps is not None
                for index, anomaly_map in zip(indices, maps, strict=True):
                    if index in missing:
                        picture = draw_overlay(
                            source[index], anomaly_map, detector.preprocessing.crop, heat_maps.maximum
                        )
                        save_png(picture, paths[index], out / ".working")
                        count += 1
            bar.advance(len(batch.keys))
    return count


def overlay_path(key: str) -> str:
    """Relative path, with forward slashes, of the overlay of an image; unique per key and never outside the folder.

    `a/b.jpg` becomes `a/b.jpg.png`. Characters that some file systems refuse, and names such as `..`, are written as
    %XX; a name of more than 240 bytes is cut and ends in its hash.
    """
    return "/".join(_safe_name(part) for part in key.split("/")) + ".png"


def _safe_name(part: str) -> str:
    if part.strip(".") == "":
        return "%2E" * len(part) or "%"
    text = _UNSAFE_CHARACTERS.sub(lambda found: f"%{ord(found[0]):02X}", part)
    if len(text.encode()) <= _LONGEST_NAME:
        return text
    return text.encode()[:200].decode(errors="ignore") + "%" + hashlib.sha256(part.encode()).hexdigest()[:16]


def draw_overlay(
    image: Tensor, anomaly_map: Tensor, crop: int | None = None, maximum: float = HeatMaps.maximum
) -> Image.Image:
    """Draw a map over its image; the higher the value, the more opaque.

    Args:
        image: (C, H, W), uint8, in its native size; it is enlarged until the longer side has at least 224 pixels.
        anomaly_map: (h, w); NaN is drawn in the brightest color, because it is never normal.
        crop: side of the central crop that the map covers; None: the whole image.
        maximum: value from which on the color is at its strongest.

    Returns:
        RGB picture in the aspect ratio of the image.
    """
    height, width = image.shape[-2:]
    factor = max(1.0, _SMALLEST_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = to_pil(image).convert("RGB").resize(size, Image.Resampling.BICUBIC)

    # resize the map to the part of the picture that it covers; the rest is 0
    covered = [side if crop is None else min(side, crop) for side in (height, width)]
    map_height, map_width = (
        max(1, round(part * total / side)) for part, total, side in zip(covered, size[::-1], (height, width))
    )
    resized = Image.fromarray(normalize_map(anomaly_map, maximum).numpy()).resize(
        (map_width, map_height), Image.Resampling.BILINEAR
    )
    values = np.zeros(size[::-1], dtype=np.float32)
    top, left = (values.shape[0] - map_height) // 2, (values.shape[1] - map_width) // 2
    values[top : top + map_height, left : left + map_width] = np.asarray(resized)

    opacity = _OPACITY * np.sqrt(values)[..., None]
    mixed = (1 - opacity) * np.asarray(picture, dtype=np.float64) / 255 + opacity * colorize(values, "inferno")
    return Image.fromarray((mixed * 255).round().astype(np.uint8))
